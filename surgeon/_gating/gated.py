"""The gates that a model carries, under the names that follow from where their blocks are now.

A gate holds no name and no order. Blocks are reordered, doubled, cut, or built into another model after
`surgeon.apply`; so both are derived whenever somebody asks, from the modules as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._finding.findings import gate_name
from surgeon._gating.block import gating_of
from surgeon._gating.decided import Decision
from surgeon._gating.forwards import Gating
from surgeon._gating.gate import Gate
from surgeon._torch import pytree
from surgeon._tracing.example import Example, inputs


@dataclass(frozen=True, slots=True)
class Placed:
    """One gate, and where it is.

    Attributes:
        name: Qualified name of its residual add.
        block_name: Qualified name of the block.
        block: The block.
        gate: The gate.
    """

    name: str
    block_name: str
    block: nn.Module
    gate: Gate


def is_gated(model: nn.Module) -> bool:
    """Whether any module of ``model`` carries a gate."""
    return any(True for _ in gated_blocks(model))


def gated_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Gating]]:
    """Qualified name, block and gating of every gated block; one that is there twice has its first name."""
    for name, module in model.named_modules():
        gating = gating_of(module)
        if gating is not None:
            yield name, module, gating


def gates_of(model: nn.Module) -> list[Gate]:
    """Every gate of ``model`` that is not folded, in execution order."""
    return [placed.gate for placed in placed_gates(model)]


def placed_gates(model: nn.Module) -> list[Placed]:
    """Every gate of ``model`` that is not folded, with its present name, in execution order."""
    return [placed for group in grouped_gates(model) for placed in group]


def grouped_gates(model: nn.Module) -> list[list[Placed]]:
    """The same, those that one call of `surgeon.apply` has put into one network together.

    The order is the one in which these places ran then; where a place is new (a block was added), it is the
    order in which the model lists its modules.
    """
    seen: dict[int, Placed] = {}
    for name, block, gating in gated_blocks(model):
        for gate in gating.gates:
            if not gate.folded:
                one = Placed(gate_name(name, gate.branch.ordinal), name, block, gate)
                seen.setdefault(id(gate), one)  # a shallow copy of a block has the very same gates
    calls: dict[tuple[str, ...], list[Placed]] = {}
    for placed in seen.values():
        calls.setdefault(placed.gate.decided.ran, []).append(placed)
    return [group for ran, placed in calls.items() for group in _networks(placed, ran)]


def scales_by_name(model: nn.Module) -> dict[str, float]:
    """The evaluation scale of each gate that has one, under every name that its residual add goes by."""
    return {
        gate_name(name, gate.branch.ordinal): gate.scale
        for name, module in model.named_modules(remove_duplicate=False)
        if (gating := gating_of(module)) is not None
        for gate in gating.gates
        if gate.scale != 1.0
    }


def recorded_inputs(
    model: nn.Module, decided: Decision, example: Example = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as arguments; without one, of the shapes that `apply` saw.

    They are on the model's device, and where the model has been cast since, they are of its new type.
    """
    if example is not None:
        return inputs(model, example)
    weight = first_weight(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def zeros(tensor: Tensor) -> Tensor:
        dtype = tensor.dtype if weight is None or tensor.dtype != decided.dtype else weight.dtype
        return torch.zeros_like(tensor, device=device, dtype=dtype)

    args, kwargs = pytree.tree_map_only(Tensor, zeros, (decided.args, decided.kwargs))
    return args, kwargs


def first_weight(model: nn.Module) -> Tensor | None:
    """The first parameter or buffer of real numbers, whose type and device stand for the model's."""
    state = (*model.parameters(), *model.buffers())
    return next((tensor for tensor in state if tensor.is_floating_point()), None)


def _networks(placed: Sequence[Placed], ran: Sequence[str]) -> list[list[Placed]]:
    """Gates of one call of `surgeon.apply` by the network they are in now, each in execution order.

    A network that was built into a larger one has its name before all of its places: two twins in one model
    are two networks. A part that was taken out of one lacks the name that it had there.
    """
    turns = {name: turn for turn, name in enumerate(ran)}
    names = [one.name for one in placed]
    cut = (name.removesuffix(names[0]) for name in ran if f".{name}".endswith(f".{names[0]}"))
    for prefix in cut:
        if all(prefix + name in turns for name in names):
            return [sorted(placed, key=lambda one: turns[prefix + one.name])]
    built_in: dict[str, list[tuple[int, Placed]]] = {}
    for one in placed:
        ends = [one.name[start:] for start in _starts(one.name) if one.name[start:] in turns]
        if not ends:
            return [list(placed)]
        built_in.setdefault(one.name.removesuffix(ends[0]), []).append((turns[ends[0]], one))
    return [[one for _, one in sorted(group, key=lambda pair: pair[0])] for group in built_in.values()]


def gated_network(model: nn.Module) -> str | None:
    """Where in ``model`` the network is that `surgeon.apply` was given: ``""`` if it is the model itself.

    None without gates. Where several networks have gates, or a part was taken out of one, it is the model.
    """
    placed = placed_gates(model)
    inside = {_before(one.name, one.gate.decided.ran) for one in placed}
    if not placed:
        return None
    return inside.pop().removesuffix(".") if len(inside) == 1 else ""


def _before(name: str, ran: Sequence[str]) -> str:
    """What stands before the name that a residual add had when `apply` saw it."""
    return next((name[:start] for start in _starts(name) if name[start:] in ran), "")


def _starts(name: str) -> list[int]:
    """Where the parts of a dotted name begin."""
    return [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
