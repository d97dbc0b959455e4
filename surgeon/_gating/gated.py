"""The gates that a model carries."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._gating.block import gating_of
from surgeon._gating.forwards import Gating
from surgeon._gating.gate import Gate
from surgeon._torch import pytree
from surgeon._tracing.example import Example, inputs


def is_gated(model: nn.Module) -> bool:
    """Whether any module of ``model`` carries a gate."""
    return any(True for _ in gated_blocks(model))


def gated_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Gating]]:
    """Qualified name, block and gating of every gated block."""
    for name, module in model.named_modules():
        gating = gating_of(module)
        if gating is not None:
            yield name, module, gating


def gates_of(model: nn.Module) -> list[Gate]:
    """Every gate of ``model`` that is not folded, in execution order."""
    held = (gate for _, _, gating in gated_blocks(model) for gate in gating.gates)
    return sorted((gate for gate in held if not gate.folded), key=lambda gate: gate.order)


def recorded_inputs(
    model: nn.Module, gate: Gate, example: Example = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as arguments; without one, of the shapes that `apply` saw, on the model's device."""
    if example is not None:
        return inputs(model, example)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: torch.zeros_like(t, device=device), (gate.origin.args, gate.origin.kwargs)
    )
    return args, kwargs
