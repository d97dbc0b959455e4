"""What stands for a residual add whose branch is computed: masked in training, scaled in evaluation."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._finding.paths import writes_to
from surgeon._gating.decided import BranchFacts, Decision
from surgeon._gating.gate import Gate
from surgeon._mark import mark


def open_gate() -> Gate:
    """A gate that never drops and scales nothing: the sum as it was."""
    return Gate(Decision(unit="batch"), BranchFacts(), 0.0)


def masked_value(gate: Gate, value: Tensor) -> Tensor:
    """Training, the branch computed: ``mask * value``."""
    # A compiled graph must not depend on the rate's value: it would be compiled anew with each change.
    if is_compiling() or gate.drop_rate > 0:
        return value * gate.mask(value)
    return value if gate.scale == 1.0 else value * gate.scale


def evaluating_value(gate: Gate, value: Tensor) -> Tensor:
    """Evaluation: ``c * value``; while a fold looks on, a mark instead of the factor."""
    if gate.marked_as is not None:
        marked: Tensor = mark(value, gate.marked_as)
        return marked
    return value if gate.scale == 1.0 else value * gate.scale


def masked_add(gate: Gate, shortcut: Tensor, branch: Tensor, onto: str) -> Tensor:
    """Training, the branch computed: ``shortcut + mask * branch``."""
    if gate.watch is not None:
        shortcut, branch = gate.watch.see(shortcut, branch)
    return combine(shortcut, masked_value(gate, branch), onto)


def evaluating_add(gate: Gate, shortcut: Tensor, branch: Tensor, onto: str) -> Tensor:
    """Evaluation: ``shortcut + c * branch``."""
    return combine(shortcut, evaluating_value(gate, branch), onto)


def combine(shortcut: Tensor, branch: Tensor, onto: str, factor: float = 1.0) -> Tensor:
    """Adds the two sides as the original did: into one, ``"shortcut"`` or ``"branch"``, or apart (``""``).

    The branch is multiplied by ``factor`` on the way, in one operator with the sum where that is possible.
    """
    if onto == "branch":
        return (branch if factor == 1.0 else branch * factor).add_(shortcut)
    if factor == 1.0:
        return shortcut.add_(branch) if onto else shortcut + branch
    return shortcut.add_(branch, alpha=factor) if onto else torch.add(shortcut, branch, alpha=factor)


def memory_order(flow: Flow, addition: Addition) -> tuple[int, ...]:
    """In which order of its dimensions a sum lies in memory; nothing where its shortcut lies alike.

    What reads the sum may ask for that: a view, a draw of as many numbers.
    """
    total, shortcut = (flow.fact(node).value for node in (addition.node, addition.shortcut))
    if writes_to(addition.node) is addition.shortcut or total.layout != torch.strided:
        return ()
    if all(a == b for a, b, n in zip(total.stride(), shortcut.stride(), total.shape, strict=True) if n > 1):
        return ()
    return tuple(sorted(range(total.ndim), key=lambda d: (-total.stride(d), d)))


def laid_out(value: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers, so that they lie one after another in memory in some order of the dimensions."""
    inner = value.permute(order)
    if inner.is_contiguous():
        return value
    return inner.contiguous().permute(sorted(range(len(order)), key=order.__getitem__))
