"""The checks behind the columns of the coverage table; the only place that knows the libraries' own gates."""

import itertools
from collections import Counter
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.ops import StochasticDepth

import surgeon
from surgeon._example import inputs, tensors
from surgeon._record import record
from surgeon._residual import Findings
from surgeon._surgery import gates_of

_OWN_GATES = (DropPath, StochasticDepth)


def census(findings: Findings) -> dict[str, Any]:
    """How many residual adds of each kind, how many additions refused for each reason."""
    kinds = Counter(r.kind for r in findings)
    reasons = Counter(r.code for r in findings.refused)
    untraced = [
        f"{r.name}: {r.reason}" for r in findings.refused if r.code in ("untraceable", "form", "aliased")
    ]
    return {
        "gates": len(findings),
        "identity": kinds["identity"],
        "projection": kinds["projection"],
        "refused": dict(reasons.most_common()),
        "unexplained": untraced[:3],
    }


def recall(model: nn.Module, given: Any, findings: Findings) -> dict[str, Any]:
    """The model's own live gates, and which of them a gate of ours stands in for."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, _OWN_GATES)}
    live = {name for name, module in own.items() if _rate(module) > 0}
    called = {call.module for call in record(model, *inputs(model, given)).calls}
    names = {module: name for name, module in own.items()}
    reached = {names[module] for module in called if module in names} & live
    taken = {name for residual in findings for name in residual.replaces}
    blocks = {name.rpartition(".")[0] for name in reached}
    beyond = [r for r in findings if not r.replaces and reached and r.block not in blocks]
    return {
        "own": len(own),
        "own_live": len(reached),
        "own_never_called": len(live - reached - (own.keys() - live)),
        "recalled": len(reached & taken),
        "missed": sorted(reached - taken),
        "beyond": sorted({r.block_type for r in beyond}),
    }


def _rate(module: nn.Module) -> float:
    return float(module.drop_prob if isinstance(module, DropPath) else module.p)


def restores(model: nn.Module) -> bool:
    """Whether `remove` gives every module its class and attributes back; the model is gated before."""
    keys = list(model.state_dict())
    surgeon.remove(model)
    clean = all("_surgeon" not in m.__dict__ and not hasattr(type(m), "_ungated") for m in model.modules())
    return clean and list(model.state_dict()) == keys


def numbers(model: nn.Module, given: Any) -> dict[str, Any]:
    """Evaluation bit for bit, a training step, every gate live; on real tensors."""
    randomise(model)
    args, kwargs = pytree.tree_map_only(Tensor, torch.randn_like, inputs(model, given))
    model.eval()
    before = _outputs(model, args, kwargs)
    surgeon.apply(model, schedule="uniform", drop_rate=0.5, example=given)
    row: dict[str, Any] = {"eval_equal": _equal(before, _outputs(model, args, kwargs))}
    row["live"] = _live(model, args, kwargs)
    surgeon.set_drop_rate(model, 0.0)
    gated = _trained(model, args, kwargs)
    surgeon.remove(model)
    plain = _trained(model, args, kwargs)
    row["train_ok"] = plain is None or (gated is not None and plain <= gated)
    return row


def _trained(model: nn.Module, args: Any, kwargs: Any) -> set[str] | None:
    """The parameters that get a gradient in a training step; None if it fails or is not finite."""
    model.train()
    model.zero_grad()
    try:
        outputs = tensors(model(*args, **kwargs))
        loss = sum((t.square().mean() for t in outputs if t.is_floating_point()), torch.zeros(()))
        loss.backward()
    except (RuntimeError, ValueError, AssertionError):
        return None
    return {n for n, p in model.named_parameters() if p.grad is not None} if loss.isfinite() else None


def _live(model: nn.Module, args: Any, kwargs: Any) -> int:
    """How many gates change the output when their branch alone counts for nothing."""
    plain, live = _outputs(model, args, kwargs), 0
    for gate in gates_of(model):
        gate.scale = 0.0
        live += not _equal(plain, _outputs(model, args, kwargs))
        gate.scale = 1.0
    return live


def randomise(model: nn.Module) -> None:
    """Statistics, scales and zero-initialised weights away from values that hide what a branch does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point() and (tensor.ndim <= 1 or not tensor.any()):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def _outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t.detach().clone() for t in tensors(model(*args, **kwargs))]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
