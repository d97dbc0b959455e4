"""The structural columns of the coverage table; the only place that knows the libraries' own gates."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.ops import StochasticDepth

from surgeon._finding.analysis import Analysis
from surgeon._finding.findings import Findings
from surgeon._tracing.nests import tensors

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
        "unexplained": untraced,
    }


def recall(model: nn.Module, analysis: Analysis) -> dict[str, Any]:
    """The model's own live gates, and which of them a gate of ours stands in for."""
    findings = analysis.findings
    own = {name: module for name, module in model.named_modules() if isinstance(module, _OWN_GATES)}
    live = {name for name, module in own.items() if _rate(module) > 0}
    called = {call.module for call in analysis.recording.calls}
    names = {module: name for name, module in own.items()}
    reached = {names[module] for module in called if module in names} & live
    taken = {name for residual in findings for name in residual.replaces}
    blocks = {name.rpartition(".")[0] for name in reached}
    beyond = [r for r in findings if not r.replaces and reached and r.block not in blocks]
    missed = _why_missed(model, analysis, sorted(reached - taken))
    return {
        "own": len(own),
        "own_live": len(reached),
        "own_never_called": len(live - reached - (own.keys() - live)),
        "recalled": len(reached & taken),
        "missed": missed,
        "beyond": sorted({r.block_type for r in beyond}),
    }


def _why_missed(model: nn.Module, analysis: Analysis, missed: Sequence[str]) -> dict[str, str]:
    """What is special about own gates that surgeon does not stand in for.

    Each gives zeros once, and its block (the module that holds it) is looked at through autograd: does
    what the block gives still depend on what it took, and does it depend on what the gate gave?
    """
    gave: dict[str, Tensor] = {}
    took: dict[str, list[Tensor]] = {}
    made: dict[str, list[Tensor]] = {}

    def watch(name: str, site: nn.Module) -> Iterator[Any]:
        block = model.get_submodule(name.rpartition(".")[0])

        def drop(_site: nn.Module, _args: Any, output: Tensor) -> Tensor:
            gave[name] = torch.zeros_like(output).requires_grad_()
            return gave[name].clone()  # not the leaf: it may be written to

        def before(_block: nn.Module, args: Any) -> Any:
            fresh = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), args)
            took[name] = tensors(fresh)
            return pytree.tree_map_only(Tensor, torch.clone, fresh)

        def after(_block: nn.Module, _args: Any, output: Any) -> None:
            made[name] = tensors(output)

        yield site.register_forward_hook(drop)
        yield block.register_forward_pre_hook(before)
        yield block.register_forward_hook(after)

    call = analysis.recording.calls[0]
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: torch.zeros(t.shape, device="meta"), (call.args, call.kwargs)
    )
    hooks = [hook for name in missed for hook in watch(name, model.get_submodule(name))]
    try:
        if missed:
            model.train()(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _verdict(made[name], took[name], gave[name], analysis, name) for name in missed}


def _verdict(made: list[Tensor], took: list[Tensor], gave: Tensor, analysis: Analysis, name: str) -> str:
    total = sum((t.sum() for t in made if t.requires_grad), torch.zeros((), device=gave.device))
    *inputs_, output = torch.autograd.grad(total, [*took, gave], allow_unused=True)
    if output is None:
        return "nothing reads what it gives"
    if all(gradient is None for gradient in inputs_):
        return "its block has no shortcut: a drop loses the input"
    block, _, leaf = name.rpartition(".")
    on_shortcut = any(r.block == block and leaf in r.shortcut.split() for r in analysis.findings)
    return "on the shortcut of a residual add" if on_shortcut else "beside a shortcut"


def _rate(module: nn.Module) -> float:
    return float(getattr(module, "drop_prob" if isinstance(module, DropPath) else "p"))
