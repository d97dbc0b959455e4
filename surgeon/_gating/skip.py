"""What runs when a gate drops: the branch on the surviving rows only, or not at all.

With survival probability ``p`` and evaluation scale ``c``, unit ``"sample"`` runs the branch on ``k`` of the
``B`` rows, drawn without replacement, and adds ``(c / p) * branch(x[rows])`` to those rows. ``k`` is ``p B``
rounded up or down at random so that its mean is ``p B``; hence each row survives with probability exactly
``p``, and its expectation is ``c * branch(x)``. ``k = 0`` is the shortcut, ``k = B`` the plain sum.

Rows are gathered and added back by their number, in ascending order, by the functions of `_gating.rowops`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from surgeon._gating.gate import Branch, Gate, combine, masked_add
from surgeon._gating.ranks import several
from surgeon._gating.rowops import SMALL, joined, parted, take
from surgeon._gating.saved import saved_once
from surgeon._torch import FakeTensorMode, saves_may_change, transformed, under_vmap
from surgeon._tracing.fake import held, to_fake
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.state import attribute
from surgeon._tracing.undisturbed import undisturbed


@dataclass(frozen=True, slots=True)
class Lifted:
    """The branch of one residual add as a function of its own.

    Attributes:
        run: ``run(block, *inputs)``, the gates of sums inside it last.
        rows: Which inputs have one entry per sample, or one for all, by place; the others go in whole.
        owns: Submodules and parameters of the block that it uses.
        feeds: Which inputs reach the result through the branch alone, by place; of a nest a part may.
        kept: Which of ``rows`` autograd keeps whole anyway, see `surgeon._gating.saved`.
        single: Tensors that have one entry for all and must have, by the input's place and theirs in it.
        gates: The gates of sums inside the branch, by their place among those of the block.
    """

    run: Branch
    rows: tuple[int, ...]
    owns: tuple[str, ...]
    feeds: tuple[int, ...]
    kept: tuple[int, ...] = ()
    single: tuple[tuple[int, int], ...] = ()
    gates: tuple[int, ...] = ()


Form = Callable[..., Tensor]


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
        if under_vmap() or _asks_ranks(lifted, gate, block):
            return masked_add(gate, shortcut, lifted.run(block, *inputs), onto)
        if not gate.survives():
            return _dropped(lifted, gate, shortcut, onto, fresh, block, inputs)
    if gate.compiler is not None and not (onto or lifted.gates or is_compiling() or transformed()):
        owns = [attribute(block, name) for name in lifted.owns]
        return gate.compiler.add(lifted.run, owns, block, shortcut, gate.scale / gate.keep, inputs)
    return _whole(lifted, shortcut, onto, block, inputs, gate.correction())


def rows_add(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, fresh: bool, block: nn.Module, *inputs: Any
) -> Tensor:
    """Training, unit ``"sample"``: runs the branch on the rows that survive; the arguments are as above."""
    if is_compiling() and gate.decided.ranks is None:
        return _compiled_add(lifted, gate, shortcut, onto, block, inputs)
    if gate.drop_rate == 0:
        return _whole(lifted, shortcut, onto, block, inputs, gate.correction())
    if _masks(lifted, gate, shortcut, inputs) or _asks_ranks(lifted, gate, block):
        return masked_add(gate, shortcut, lifted.run(block, *inputs), onto)
    count = shortcut.shape[0]
    kept = gate.survivors(count)
    factor = _factor(gate, count, kept, block)
    if kept == count:
        return _whole(lifted, shortcut, onto, block, inputs, factor)
    if kept == 0:
        return _dropped(lifted, gate, shortcut, onto, fresh, block, inputs)
    rows = gate.rows(count, kept, shortcut.device)
    into, taken = _gathered(lifted, shortcut, onto, rows, inputs)
    result = _run(lifted, block, inputs, taken, rows)
    return _put_back(into, result, rows, factor, onto)


def _masks(lifted: Lifted, gate: Gate, shortcut: Tensor, inputs: Sequence[Any]) -> bool:
    """Whether this call computes every row: gathering would not pay, or an input is not one entry per row."""
    if gate.drop_rate == 0:
        return False
    count = shortcut.shape[0]
    gathers = not gate.decided.by_cost or held.open or gate.skipping(shortcut.device.type, count)
    return not gathers or under_vmap() or _odd(lifted, count, inputs)


def _odd(lifted: Lifted, count: int, inputs: Sequence[Any]) -> bool:
    """Whether an input has neither one entry per row nor one for all."""
    if any(inputs[i].shape[0] not in (1, count) for i in lifted.rows):
        return True
    return bool(lifted.single) and any(tensors(inputs[i])[place].shape[0] != 1 for i, place in lifted.single)


def _factor(gate: Gate, count: int, kept: int, block: nn.Module) -> float:
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
    if (
        (decided.by_cost and not gate.gathers)
        or _odd(lifted, count, inputs)
        or _asks_ranks(lifted, gate, block)
    ):
        return masked_add(gate, shortcut, lifted.run(block, *inputs), onto)
    device, fixed = shortcut.device, decided.rounding == "fixed"
    kept = gate.survivors(count) if fixed else gate.most(count)
    order = torch.randperm(count, device=device)
    if kept == count:
        result = lifted.run(block, *inputs)
        weights = None if fixed else gate.weights(count, count, device)[order]
        return combine(shortcut, _weighed(result, gate.scale if weights is None else weights), onto)
    rows = order[:kept]
    into, taken = _gathered(lifted, shortcut, onto, rows, inputs)
    result = lifted.run(block, *taken)
    weights = None if fixed else gate.weights(count, kept, device)
    result = _weighed(result, _factor(gate, count, kept, block) if weights is None else weights)
    return _put_back(into, result, rows, 1.0, onto)


def _weighed(result: Tensor, factor: Tensor | float) -> Tensor:
    if isinstance(factor, Tensor):
        factor = factor.to(result.dtype).view(-1, *[1] * (result.ndim - 1))
    return result * factor


def _asks_ranks(lifted: Lifted, gate: Gate, block: nn.Module) -> bool:
    """Whether the branch takes statistics over ranks that draw otherwise: all of them have to run it."""
    if not several() or gate.decided.ranks is not None:
        return False
    return any(isinstance(module, nn.SyncBatchNorm) for module in _modules(lifted, block))


def _whole(
    lifted: Lifted, shortcut: Tensor, onto: str, block: nn.Module, inputs: Sequence[Any], factor: float
) -> Tensor:
    result = lifted.run(block, *inputs)
    return combine(shortcut, result if factor == 1.0 else result * factor, onto)


# --- rows ---------------------------------------------------------------------


def _gathered(
    lifted: Lifted, shortcut: Tensor, onto: str, rows: Tensor, inputs: Sequence[Any]
) -> tuple[Tensor, list[Any]]:
    """What the result is added to, and the branch's inputs for the surviving rows."""
    into, own = shortcut, None
    if onto != "shortcut" and any(inputs[i] is shortcut for i in lifted.rows):
        into, own = parted(shortcut, rows)
    taken = list(inputs)
    for i in lifted.rows:
        value: Tensor = inputs[i]
        if value is shortcut and own is not None:
            taken[i] = own
        elif value.shape[0] == shortcut.shape[0]:  # else one entry for all, which is spread over any number
            taken[i] = take(value, rows)
    return into, taken


def _run(lifted: Lifted, block: nn.Module, inputs: Sequence[Any], taken: list[Any], rows: Tensor) -> Tensor:
    """The branch on the rows that were taken."""
    parts = []
    if lifted.kept and not is_compiling():
        parts = [(taken[i], inputs[i]) for i in lifted.kept if _worth_hooks(inputs[i])]
    if not parts or not saves_may_change():
        return lifted.run(block, *taken)
    with saved_once(parts, rows):
        return lifted.run(block, *taken)


def _worth_hooks(whole: Tensor) -> bool:
    """Whether to keep a tensor from being saved twice; a small one takes less than the hooks' time."""
    return whole.requires_grad and whole.numel() >= SMALL


def _put_back(into: Tensor, result: Tensor, rows: Tensor, factor: float, onto: str) -> Tensor:
    result = result.expand(len(rows), *into.shape[1:])  # one place of a sample may stand for all of them
    if onto == "shortcut":
        return into.index_add_(0, rows, result.to(into.dtype), alpha=factor)
    if into.dtype != result.dtype:
        dtype = result.dtype if onto == "branch" else torch.promote_types(into.dtype, result.dtype)
        into, result = into.to(dtype), result.to(dtype)
    return joined(into, result, rows, factor)


# --- nothing ------------------------------------------------------------------


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
    idle = list(_idle(lifted, block, inputs)) if needed else []
    if idle:
        return with_idle(gate, shortcut, idle, "same" if onto == "shortcut" else "copy" if fresh else "view")
    return shortcut.clone() if fresh else shortcut


def with_idle(gate: Gate, value: Tensor, idle: Sequence[Tensor], sharing: str = "view") -> Tensor:
    """A value as it is; idle tensors, which took no part in it, get gradients of zeros from it, or none."""
    function = _IdleTransformed if transformed() else _Idle
    return function.apply(value, sharing, gate.zeroes, *idle)  # type: ignore[no-any-return]


def _result_type(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, block: nn.Module, inputs: Sequence[Any]
) -> torch.dtype:
    """What the sum would be made of: under autocast, or with weights of another type, more than the shortcut.

    Once for each state of autocast the branch is run to know, on fake tensors.
    """
    kind = shortcut.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    autocast = torch.get_autocast_dtype(kind) if casts else None
    weights = _types(lifted, block)
    if autocast is None and weights <= {shortcut.dtype}:
        return shortcut.dtype
    key = shortcut.dtype, autocast, weights
    if key not in gate.types:
        if any(m._forward_pre_hooks or m._forward_hooks for m in _modules(lifted, block)):
            return shortcut.dtype  # they would see fake tensors
        made = branch_result(lifted, block, inputs)
        gate.types[key] = None if made is None else made.dtype
    branch = gate.types[key] or shortcut.dtype
    return branch if onto == "branch" else torch.promote_types(shortcut.dtype, branch)


def branch_result(lifted: Lifted, block: nn.Module, inputs: Sequence[Any]) -> Tensor | None:
    """What the branch gives, as a fake tensor; None if it does not run on such."""
    log = OpLog(FakeTensorMode(allow_non_fake_inputs=True))
    with undisturbed(block), torch.no_grad(), suppress(Exception):
        given = to_fake(log.fake, tuple(inputs))
        with log.fake, log:
            return lifted.run(block, *given)
    return None


def _types(lifted: Lifted, block: nn.Module) -> frozenset[torch.dtype]:
    """The types of the branch's weights. They may change at any time, so this asks each, without detours."""
    found, todo = set[torch.dtype](), [attribute(block, name) for name in lifted.owns]
    while todo:
        one = todo.pop()
        if isinstance(one, nn.Module):
            todo += one._modules.values()
            found.update([t.dtype for t in one._parameters.values() if t is not None])
        elif isinstance(one, Tensor):
            found.add(one.dtype)
    return frozenset([dtype for dtype in found if dtype.is_floating_point])


def _modules(lifted: Lifted, block: nn.Module) -> Iterator[nn.Module]:
    for name in lifted.owns:
        value = attribute(block, name)
        yield from value.modules() if isinstance(value, nn.Module) else ()


def _owned(lifted: Lifted, block: nn.Module) -> Iterator[Tensor]:
    for name in lifted.owns:
        value = attribute(block, name)
        own = value.parameters() if isinstance(value, nn.Module) else (value,)
        yield from (t for t in own if isinstance(t, Tensor))


def _idle(lifted: Lifted, block: nn.Module, inputs: Sequence[Any]) -> Iterable[Tensor]:
    """Every tensor that would have had its gradient from the branch alone, parameters once.

    Inputs are not compared: a compiled graph that looks at their identity holds for one step.
    """
    found = {id(t): t for t in _owned(lifted, block)}
    given = [t for i in lifted.feeds for t in tensors(inputs[i])]
    return (t for t in (*found.values(), *given) if t.requires_grad)


class _Idle(torch.autograd.Function):
    """Passes its first argument through and gives the others a gradient of zeros, or none."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, sharing: str, zeroes: bool, *idle: Tensor) -> Tensor:
        _note(ctx, value, sharing, zeroes, idle)
        return _passed(value, sharing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _zeros(ctx, grad)


class _IdleTransformed(torch.autograd.Function):
    """The same in the style that `torch.func` and forward mode ask for, which takes several times as long."""

    @staticmethod
    def forward(value: Tensor, sharing: str, _zeroes: bool, *_idle: Tensor) -> Tensor:
        return _passed(value, sharing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        value, sharing, zeroes, *idle = inputs
        _note(ctx, value, sharing, zeroes, idle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _zeros(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        """Of a shortcut that is not differentiated there is none."""
        return None if tangent is None else _passed(tangent, ctx.sharing)


def _note(ctx: Any, value: Tensor, sharing: str, zeroes: bool, idle: Sequence[Tensor]) -> None:
    ctx.sharing, ctx.zeroes = sharing, zeroes
    ctx.like = [(t.shape, t.dtype, t.device) for t in idle]
    ctx.idle = idle if any(type(t) not in (Tensor, nn.Parameter) for t in idle) else None
    if sharing == "same":
        ctx.mark_dirty(value)


def _zeros(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    own = grad if ctx.needs_input_grad[0] else None
    idle: list[Tensor | None] = [None] * len(ctx.like)
    if ctx.zeroes and ctx.idle is not None:  # sharded tensors and the like know how to make their own zeros
        idle = [torch.zeros_like(t) for t in ctx.idle]
    elif ctx.zeroes:
        idle = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
    return own, None, None, *idle


def _passed(value: Tensor, sharing: str) -> Tensor:
    if sharing == "same":
        return value
    return value.clone() if sharing == "copy" else value.view_as(value)
