"""What runs when a gate drops: the branch on the surviving rows only, or not at all.

With survival probability ``p`` and evaluation scale ``c``, unit ``"sample"`` runs the branch on ``k`` of the
``B`` rows, drawn without replacement, and adds ``(c / p) * branch(x[rows])`` to those rows. ``k`` is ``p B``
rounded up or down at random so that its mean is ``p B``; hence each row survives with probability exactly
``p``, and its expectation is ``c * branch(x)``. ``k = 0`` is the shortcut, ``k = B`` the plain sum.

Rows are gathered and added back by their number, in ascending order, by the functions of `_gating.rowops`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._gating.gate import Branch, Gate, combine, masked_add
from surgeon._gating.ranks import several
from surgeon._gating.rowops import joined, parted, take
from surgeon._gating.saved import saved_once
from surgeon._torch import FakeTensorMode, saves_may_change, under_vmap
from surgeon._tracing.example import generators_kept, no_autocast_cache, tensors, untouched
from surgeon._tracing.fake import held_open, to_fake
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.reads import attribute


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
    if under_vmap() or _asks_ranks(lifted, gate, block):
        return masked_add(gate, shortcut, lifted.run(block, *inputs), onto)
    if gate.drop_rate > 0 and not gate.survives():
        return _dropped(lifted, gate, shortcut, onto, fresh, block, inputs)
    return _whole(lifted, gate, shortcut, onto, block, inputs)


def rows_add(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, fresh: bool, block: nn.Module, *inputs: Any
) -> Tensor:
    """Training, unit ``"sample"``: runs the branch on the rows that survive; the arguments are as above."""
    if _masks(lifted, gate, shortcut, inputs) or _asks_ranks(lifted, gate, block):
        return masked_add(gate, shortcut, lifted.run(block, *inputs), onto)
    count = shortcut.shape[0]
    kept = count if gate.drop_rate == 0 else gate.survivors(count)
    if kept == count:
        return _whole(lifted, gate, shortcut, onto, block, inputs)
    if kept == 0:
        return _dropped(lifted, gate, shortcut, onto, fresh, block, inputs)
    rows = gate.rows(count, kept, shortcut.device)
    into, taken = _gathered(lifted, shortcut, onto, rows, inputs)
    result = _run(lifted, block, inputs, taken, rows)
    return _put_back(into, result, rows, gate.correction(), onto)


def _masks(lifted: Lifted, gate: Gate, shortcut: Tensor, inputs: Sequence[Any]) -> bool:
    """Whether this call computes every row: gathering would not pay, or an input is not one entry per row."""
    if gate.decided.by_cost and torch.compiler.is_compiling():
        return True  # one graph; a number of rows that changes would break it
    if gate.drop_rate == 0:
        return False
    if under_vmap():
        return True
    known = (1, shortcut.shape[0])
    if not gate.skipping(shortcut.device.type, shortcut.shape[0]):
        return True
    if any(inputs[i].shape[0] not in known for i in lifted.rows):
        return True
    return any(tensors(inputs[i])[place].shape[0] != 1 for i, place in lifted.single)


def _asks_ranks(lifted: Lifted, gate: Gate, block: nn.Module) -> bool:
    """Whether the branch takes statistics over ranks that draw otherwise: all of them have to run it."""
    if gate.decided.ranks is not None or not several():
        return False
    return any(isinstance(module, nn.SyncBatchNorm) for module in _modules(lifted, block))


def _whole(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, block: nn.Module, inputs: Sequence[Any]
) -> Tensor:
    result = lifted.run(block, *inputs)
    factor = gate.correction()
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
    parts = [(taken[i], inputs[i]) for i in lifted.kept if inputs[i].requires_grad]
    if not parts or torch.compiler.is_compiling() or not saves_may_change():
        return lifted.run(block, *taken)
    with saved_once(parts, rows):
        return lifted.run(block, *taken)


def _put_back(into: Tensor, result: Tensor, rows: Tensor, factor: float, onto: str) -> Tensor:
    if onto == "shortcut":
        return into.index_add_(0, rows, result.to(into.dtype), alpha=factor)
    dtype = result.dtype if onto == "branch" else torch.promote_types(into.dtype, result.dtype)
    return joined(into.to(dtype), result.to(dtype), rows, factor)


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
    if not torch.compiler.is_compiling():
        dtype = _result_type(lifted, gate, shortcut, onto, block, inputs)
        fresh, shortcut = fresh and dtype == shortcut.dtype, shortcut.to(dtype)
    needed = torch.is_grad_enabled() and (gate.zeroes or not shortcut.requires_grad)
    idle = list(_idle(lifted, block, inputs)) if needed else []
    if idle:
        return with_idle(gate, shortcut, idle, "same" if onto == "shortcut" else "copy" if fresh else "view")
    return shortcut.clone() if fresh else shortcut


def with_idle(gate: Gate, value: Tensor, idle: Sequence[Tensor], sharing: str = "view") -> Tensor:
    """A value as it is; idle tensors, which took no part in it, get gradients of zeros from it, or none."""
    function = _Idle if torch.compiler.is_compiling() else _IdleForward
    return function.apply(value, sharing, gate.zeroes, *idle)  # type: ignore[no-any-return]


def _result_type(
    lifted: Lifted, gate: Gate, shortcut: Tensor, onto: str, block: nn.Module, inputs: Sequence[Any]
) -> torch.dtype:
    """What the sum would be made of: under autocast, or with weights of another type, more than the shortcut.

    Once for each state of autocast the branch is run to know, on fake tensors.
    """
    if onto == "shortcut":
        return shortcut.dtype
    kind = shortcut.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    autocast = torch.get_autocast_dtype(kind) if casts else None
    weights = frozenset(t.dtype for t in _owned(lifted, block) if t.is_floating_point())
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
    with generators_kept(), no_autocast_cache(), torch.no_grad(), untouched(block), suppress(Exception):
        given = to_fake(log.fake, tuple(inputs))
        with log.fake, log, held_open():
            return lifted.run(block, *given)
    return None


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
    def forward(shortcut: Tensor, sharing: str, _zeroes: bool, *_idle: Tensor) -> Tensor:
        return _passed(shortcut, sharing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        shortcut, ctx.sharing, ctx.zeroes, *idle = inputs
        ctx.like = [(t.shape, t.dtype, t.device) for t in idle]
        ctx.idle = idle if any(type(t) not in (Tensor, nn.Parameter) for t in idle) else None
        if ctx.sharing == "same":
            ctx.mark_dirty(shortcut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad if ctx.needs_input_grad[0] else None, None, None, *_Idle.gradients(ctx))

    @staticmethod
    def gradients(ctx: Any) -> list[Tensor | None]:
        if not ctx.zeroes:
            return [None] * len(ctx.like)
        if ctx.idle is not None:  # sharded tensors and the like know how to make their own zeros
            return [torch.zeros_like(t) for t in ctx.idle]
        return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]


class _IdleForward(_Idle):
    """With forward mode, which a compiler does not want to see."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        """Of a shortcut that is not differentiated there is none."""
        return None if tangent is None else _passed(tangent, ctx.sharing)


def _passed(value: Tensor, sharing: str) -> Tensor:
    if sharing == "same":
        return value
    return value.clone() if sharing == "copy" else value.view_as(value)
