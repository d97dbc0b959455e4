"""Whether a branch treats the rows of a batch one by one, so that it may run on some of them only.

The branch runs on fake tensors with a large prime number of rows. It is taken to be row by row if the size of
each result that depends on the rows has that prime as a factor just once (a mean over the batch has it not at
all, a product of rows with rows twice), if every operator is known to keep rows apart where shapes do not
tell (`_gating.rowrules`), and if the result has one entry per row. The statistics of BatchNorm are the one
exception, as they are the statistics of whatever batch there is.

A branch may also compute with the number of its rows (a mean by hand, ``arange`` over the batch): on some of
the rows it would be another number. So it runs a second time, on another number of rows, and every number
that an operator gets has to be the same, those that only tell a shape excepted.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._gating.rowrules import PRIME, UNKNOWN, hazard
from surgeon._torch import FakeTensorMode, no_dispatch, pytree
from surgeon._tracing.aten import Family, family, named
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.record import quiet
from surgeon._tracing.undisturbed import undisturbed

_OTHER = 2 * PRIME - 1
# Arguments by which operators are told a shape, whatever they are called with.
_SIZES = {"size", "stride", "repeats", "N", "group", "groups"}
_FEW = 1000
_Numbers = list[tuple[Any, bool]]


@dataclass(frozen=True, slots=True)
class Rowwise:
    """What came out.

    Attributes:
        reason: Why the branch cannot run on some rows only; ``""`` if it can.
        statistics: It computes statistics over its rows (BatchNorm in training).
        mixes: It was seen to mix rows.
    """

    reason: str
    statistics: bool = False
    mixes: bool = False


class _MixedError(Exception):
    """Ends the look at a branch: a loop over rows would go on for long."""


class _NumberLog(OpLog):
    """Notes the numbers that operators get."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__(fake)
        self.numbers: list[tuple[str, _Numbers]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.numbers.append((_spoken(func), _numbers(func, args, kwargs or {})))
        return super().__torch_dispatch__(func, types, args, kwargs)


class _RowLog(_NumberLog):
    """Looks at each operator that depends on the rows, or on a tensor made with one entry per row."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__(fake)
        self.statistics = False
        self.reason = ""
        self.mixes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = tensors((args, kwargs))
        of_rows, active = any(map(self._of_rows, read)), any(map(self.active, read))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = tensors(out)
        if not of_rows or not made or _spoken(func).startswith("new_"):
            return out
        if family(func) is Family.BATCH_NORMS:
            self.statistics |= "_with_update" in func._schema.name or any(a is True for a in args)
            made = made[:1]
        else:
            what = hazard(func, args, kwargs or {}, self._of_rows)
            if what:
                self._refuse(what, func, active)
        if any(t.numel() and (t.numel() % PRIME or t.numel() // PRIME % PRIME == 0) for t in made):
            self._refuse("mixes the rows of a batch", func, active)
        return out

    def _of_rows(self, tensor: Tensor) -> bool:
        return self.active(tensor) or (tensor.numel() > 0 and tensor.numel() % PRIME == 0)

    def _refuse(self, what: str, func: Any, active: bool) -> None:
        self.reason = self.reason or f"the branch {what} ({_spoken(func)})"
        self.mixes |= active and what != UNKNOWN
        if self.mixes:
            raise _MixedError


def _spoken(func: Any) -> str:
    return named(func._schema.name).rpartition(".")[2]


def _numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Numbers:
    """Every number among the arguments of an operator, and whether it tells a shape."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    found = [(v, name in _SIZES) for name, value in given.items() for v in pytree.tree_leaves(value)]
    if _spoken(func) == "lift_fresh":  # a tensor made of Python's numbers
        with no_dispatch():
            listed = args[0].flatten().tolist() if args[0].numel() < _FEW else []
        found += [(number, False) for number in (*args[0].shape, *listed)]
    return [(value, size) for value, size in found if not isinstance(value, Tensor)]


def _counts(numbers: _Numbers, others: _Numbers) -> bool:
    """Whether numbers on `PRIME` rows and on `_OTHER` differ, sizes in proportion to the rows excepted."""
    return len(numbers) != len(others) or any(
        a is not b and a != b and not (size and a * _OTHER == b * PRIME)
        for (a, size), (b, _) in zip(numbers, others, strict=True)
    )


def _computed(log: _NumberLog, other: _NumberLog) -> str:
    """The first operator that got another number on another number of rows; ``""`` if none did."""
    end: tuple[str, _Numbers] = ("", [])
    pairs = itertools.zip_longest(log.numbers, other.numbers, fillvalue=end)
    return next((a or b for (a, given), (b, also) in pairs if a != b or _counts(given, also)), "")


def rowwise(
    run: Callable[..., Tensor], block: nn.Module, inputs: Sequence[Any], rows: Sequence[int], dim: int = 0
) -> Rowwise:
    """Looks at ``run(block, *inputs)``; nothing is computed and ``block`` is left as it was.

    Args:
        run: The branch.
        block: Its block, in the mode it will run in.
        inputs: What it reads; fake tensors.
        rows: Which of them have one entry per row, by place.
        dim: The dimension along which rows lie.
    """
    log = _RowLog(FakeTensorMode(allow_non_fake_inputs=True))
    try:
        shape = _run(log, PRIME, run, block, inputs, rows, dim)
        if not log.reason:
            other = _NumberLog(FakeTensorMode(allow_non_fake_inputs=True))
            _run(other, _OTHER, run, block, inputs, rows, dim)
            what = _computed(log, other)
            log.reason = f"the branch computes with the number of its rows ({what})" if what else ""
    except _MixedError:
        return Rowwise(log.reason, log.statistics, mixes=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
        text = str(error).splitlines()[0] if str(error) else ""
        return Rowwise(
            f"the branch does not run on another number of rows ({type(error).__name__}: {text[:80]})"
        )
    reason = log.reason
    if not reason and shape[dim : dim + 1] != (PRIME,):
        reason = "the first dimension of what the branch gives is not that of its rows"
    return Rowwise(reason, log.statistics, log.mixes)


def _run(
    log: OpLog,
    count: int,
    run: Callable[..., Tensor],
    block: nn.Module,
    inputs: Sequence[Any],
    rows: Sequence[int],
    dim: int,
) -> tuple[int, ...]:
    """Runs the branch on ``count`` rows under ``log``; the shape of what it gives."""
    with undisturbed(block), quiet():
        given = pytree.tree_map_only(Tensor, lambda t: _blank(log.fake, t), list(inputs))
        for i in rows:
            given[i] = _resized(log.fake, inputs[i], dim, count)
            log.root(given[i])
        with torch.no_grad(), log.fake, log:
            out = run(block, *given)
    return tuple(out.shape)


def _blank(fake: FakeTensorMode, like: Tensor) -> Tensor:
    with fake:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _resized(fake: FakeTensorMode, like: Tensor, dim: int, count: int) -> Tensor:
    """A fake tensor of ``count`` rows, its dimensions laid out in memory in the order of ``like``'s."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: (-strides[d], d))
    sizes = [count if d == dim else like.shape[d] for d in order]
    with fake:
        flat = torch.empty(sizes, dtype=like.dtype, device=like.device)
        return flat.permute([order.index(d) for d in range(like.ndim)])


def nested(value: Any) -> bool:
    """Whether ``value`` is a nest that holds tensors rather than one tensor."""
    return not isinstance(value, Tensor) and bool(tensors(value))
