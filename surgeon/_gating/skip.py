"""What runs when a gate drops: the branch on the surviving rows only, or not at all.

With survival probability ``p`` and evaluation scale ``c``, unit ``"sample"`` runs the branch on ``k`` of the
``B`` rows, drawn without replacement, and adds ``(c / p) * branch(x[rows])`` to those rows. ``k`` is ``p B``
rounded up or down at random so that its mean is ``p B``; hence each row survives with probability exactly
``p``, and its expectation is ``c * branch(x)``. ``k = 0`` is the shortcut, ``k = B`` the plain sum.

Rows are gathered and added back by their number, by the functions of `_gating.rowops`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from surgeon._gating.adds import combine, masked_add
from surgeon._gating.gate import Gate
from surgeon._gating.idle import with_idle
from surgeon._gating.lifted import Lifted, autocast, weights_of
from surgeon._gating.rowops import Spread, Taken, joined
from surgeon._torch import transformed, under_vmap
from surgeon._tracing.fake import coins

Adding = Callable[..., Tensor]


def batch_add(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, fresh: bool, block: nn.Module, *inputs: Any
) -> Tensor:
    """Training, unit ``"batch"``: runs the branch only if the coin says so.

    Args:
        lifted: The branch.
        gate: The gate.
        shortcut: The shortcut's value.
        onto: Which side the original addition wrote to; see `combine`.
        fresh: Whether the result must not share memory with the shortcut, as something later writes to it.
        block: The block.
        *inputs: What the branch reads.
    """
    if gate.drop_rate > 0:
        if under_vmap() or lifted.asks_ranks(gate, block):
            return masked_add(gate, shortcut, lifted.run(block, *inputs), onto)
        if not gate.survives():
            return _dropped(lifted, gate, shortcut, onto, fresh, block, inputs)
    compiler = gate.compiler if onto != "shortcut" and not lifted.gates else None
    if compiler is not None and not (is_compiling() or transformed()):
        own = weights_of(block, lifted.owns)
        return compiler.add(lifted.run, own, block, shortcut, gate.scale / gate.keep, onto, inputs)
    return _whole(lifted, gate, shortcut, onto, block, inputs, gate.correction())


def rows_add(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, fresh: bool, block: nn.Module, *inputs: Any
) -> Tensor:
    """Training, unit ``"sample"``: runs the branch on the rows that survive; the arguments are as above."""
    if is_compiling() and gate.decided.ranks is None:
        return _compiled_add(lifted, gate, shortcut, onto, block, inputs)
    if gate.drop_rate == 0:
        return _whole(lifted, gate, shortcut, onto, block, inputs, gate.correction())
    if masks(lifted, gate, shortcut, inputs) or lifted.asks_ranks(gate, block):
        return masked_add(gate, shortcut, lifted.run(block, *inputs), onto)
    count = shortcut.shape[0]
    kept = gate.survivors(count)
    factor = factor_of(gate, count, kept, block)
    if kept == count:
        return _whole(lifted, gate, shortcut, onto, block, inputs, factor)
    if kept == 0:
        return _dropped(lifted, gate, shortcut, onto, fresh, block, inputs)
    rows = gate.rows(count, kept, shortcut.device)
    into, taken = lifted.gathered(shortcut, onto, rows, inputs)
    result = lifted.on_rows(block, inputs, taken, rows)
    if gate.watch is not None:
        _, result = gate.watch.see(shortcut[rows], result)
    return _put_back(into, result, rows, factor, onto)


def masks(lifted: Lifted, gate: Gate, shortcut: Tensor, inputs: Sequence[Any]) -> bool:
    """Whether this call computes every row: gathering would not pay, or an input is not one entry per row."""
    if gate.drop_rate == 0:
        return False
    count = shortcut.shape[0]
    gathers = not gate.decided.by_cost or coins.stopped or gate.skipping(shortcut.device.type, count)
    return not gathers or under_vmap() or lifted.odd(count, inputs)


def factor_of(gate: Gate, count: int, kept: int, block: nn.Module) -> float:
    """What survivors are multiplied by: ``c / p``, or ``c B / k`` where their number is always the same."""
    if gate.decided.rounding == "random":
        return gate.correction()
    if count == 1 and gate.drop_rate > 0 and not is_compiling():
        warnings.warn(
            f"a gate of a {type(block).__name__} never drops: rounding='fixed' keeps the one row of a batch "
            "of one. Train on more rows, or apply with rounding='random'",
            stacklevel=2,
        )
    return gate.scale * count / max(kept, 1)


def _compiled_add(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, block: nn.Module, inputs: Sequence[Any]
) -> Tensor:
    """The rows that survive within one graph, which holds their number: no coin is looked at in Python.

    The graph runs ``p B`` rows, rounded up; how many of them count is drawn inside. The rate is read from a
    tensor, so that a change of it compiles nothing as long as there is room.
    """
    count, decided = shortcut.shape[0], gate.decided
    if (decided.by_cost and not gate.gathers) or lifted.odd(count, inputs) or lifted.asks_ranks(gate, block):
        return masked_add(gate, shortcut, lifted.run(block, *inputs), onto)
    device, fixed = shortcut.device, decided.rounding == "fixed"
    kept = gate.survivors(count) if fixed else gate.most(count)
    order = torch.randperm(count, device=device)
    if kept == count:
        result = lifted.run(block, *inputs)
        weights = None if fixed else gate.weights(count, count, device)[order]
        return combine(shortcut, _weighed(result, gate.scale if weights is None else weights), onto)
    rows, places, taken = order[:kept], order.argsort(), list(inputs)
    for i in lifted.rows:
        if inputs[i].shape[0] == count:  # else one entry for all
            taken[i] = Taken.apply(inputs[i], rows, places)
    result = lifted.run(block, *taken)
    weights = None if fixed else gate.weights(count, kept, device)
    result = _weighed(result, factor_of(gate, count, kept, block) if weights is None else weights)
    result = result.expand(kept, *shortcut.shape[1:])
    return combine(shortcut, Spread.apply(result, rows, places), onto)


def _weighed(result: Tensor, factor: Tensor | float) -> Tensor:
    if isinstance(factor, Tensor):
        factor = factor.to(result.dtype).view(-1, *[1] * (result.ndim - 1))
    return result * factor


def _whole(
    lifted: Lifted,
    gate: Gate,
    shortcut: Tensor,
    onto: str,
    block: nn.Module,
    inputs: Sequence[Any],
    factor: float,
) -> Tensor:
    result = lifted.run(block, *inputs)
    if gate.watch is not None:
        shortcut, result = gate.watch.see(shortcut, result)
    return combine(shortcut, result, onto, factor)


def _put_back(into: Tensor, result: Tensor, rows: Tensor, factor: float, onto: str) -> Tensor:
    result = result.expand(len(rows), *into.shape[1:])  # one place of a sample may stand for all of them
    if onto == "shortcut":
        return into.index_add_(0, rows, result.to(into.dtype), alpha=factor)
    if into.dtype != result.dtype:
        dtype = result.dtype if onto == "branch" else torch.promote_types(into.dtype, result.dtype)
        into, result = into.to(dtype), result.to(dtype)
    return joined(into, result, rows, factor)


def _dropped(
    lifted: Lifted,
    gate: Gate,
    shortcut: Tensor,
    onto: str,
    fresh: bool,
    block: nn.Module,
    inputs: Sequence[Any],
) -> Tensor:
    """The shortcut alone; what only the branch would have used gets no gradient, or zeros.

    Where all before the branch is frozen, its parameters alone make that the result has a backward. They do
    so when it is dropped, too: else a step in which everything trainable is dropped would end in an error.
    """
    if onto != "shortcut" and not is_compiling():
        dtype = _result_type(lifted, gate, shortcut, onto, block, inputs)
        if dtype != shortcut.dtype:
            fresh, shortcut = False, shortcut.to(dtype)
    needed = (not shortcut.requires_grad or gate.zeroes) and torch.is_grad_enabled()
    idle = lifted.idle(block, inputs) if needed else []
    if idle:
        return with_idle(gate, shortcut, idle, "same" if onto == "shortcut" else "copy" if fresh else "view")
    return shortcut.clone() if fresh else shortcut


def _result_type(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, block: nn.Module, inputs: Sequence[Any]
) -> torch.dtype:
    """What the sum would be made of: under autocast, or with weights of another type, more than the shortcut.

    Once for each state of autocast the branch is run to know, on fake tensors.
    """
    cast, weights = autocast(shortcut.device), lifted.types(block)
    if cast is None and weights <= {shortcut.dtype}:
        return shortcut.dtype
    key = shortcut.dtype, cast, weights
    if key not in gate.types:
        if lifted.hooked(block):
            return shortcut.dtype
        made = lifted.on_fake(block, inputs)
        gate.types[key] = None if made is None else made.dtype
    branch = gate.types[key] or shortcut.dtype
    return branch if onto == "branch" else torch.promote_types(shortcut.dtype, branch)
