"""Whether a branch treats the rows of a batch one by one, so that it may run on some of them only.

The branch runs on fake tensors with a large prime number of rows. It is taken to be row by row if the size of
each result that depends on the rows has that prime as a factor just once (a mean over the batch has it not at
all, a product of rows with rows twice), if every operator is known to keep rows apart where shapes do not
tell (`_gating.rowrules`), and if the result has one entry per row. The statistics of BatchNorm are the one
exception, as they are the statistics of whatever batch there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from surgeon._gating.rowrules import PRIME, UNKNOWN, hazard
from surgeon._tracing.example import generators_kept, no_autocast_cache, no_inference_mode, tensors, untouched
from surgeon._tracing.fake import held_open
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.record import quiet

aten = torch.ops.aten

_NORMS = {
    *(aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional),
    *(aten._batch_norm_with_update, aten._batch_norm_with_update_functional, aten.cudnn_batch_norm),
}


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


class _RowLog(OpLog):
    """Looks at each operator that depends on the rows."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__(fake)
        self.statistics = False
        self.reason = ""
        self.mixes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made, packet = [t for t in tensors(out) if self.active(t)], func.overloadpacket
        if not made:
            return out
        if packet in _NORMS:
            self.statistics |= "_with_update" in str(packet) or any(a is True for a in args)
            made = made[:1]
        else:
            what = hazard(func, args, kwargs or {}, self.active)
            if what:
                self._refuse(what, packet)
        if any(t.numel() % PRIME or t.numel() // PRIME % PRIME == 0 for t in made):
            self._refuse("mixes the rows of a batch", packet)
        return out

    def _refuse(self, what: str, packet: Any) -> None:
        self.mixes |= what != UNKNOWN
        name = str(packet).rpartition(".")[2].strip("_")
        self.reason = self.reason or f"the branch {what} ({name})"


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
    try:
        shape, log = _run(run, block, inputs, rows, dim)
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
    run: Callable[..., Tensor], block: nn.Module, inputs: Sequence[Any], rows: Sequence[int], dim: int
) -> tuple[tuple[int, ...], _RowLog]:
    log = _RowLog(FakeTensorMode(allow_non_fake_inputs=True))
    with no_inference_mode(), untouched(block), held_open(), generators_kept(), no_autocast_cache(), quiet():
        given = pytree.tree_map_only(Tensor, lambda t: _blank(log.fake, t), list(inputs))
        for i in rows:
            given[i] = _resized(log.fake, inputs[i], dim)
            log.root(given[i])
        with torch.no_grad(), log.fake, log:
            out = run(block, *given)
    return tuple(out.shape), log


def _blank(fake: FakeTensorMode, like: Tensor) -> Tensor:
    with fake:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _resized(fake: FakeTensorMode, like: Tensor, dim: int) -> Tensor:
    """A fake tensor of that many rows, its dimensions laid out in memory in the order of ``like``'s."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: (-strides[d], d))
    sizes = [PRIME if d == dim else like.shape[d] for d in order]
    with fake:
        flat = torch.empty(sizes, dtype=like.dtype, device=like.device)
        return flat.permute([order.index(d) for d in range(like.ndim)])


def nested(value: Any) -> bool:
    """Whether ``value`` is a nest that holds tensors rather than one tensor."""
    return not isinstance(value, Tensor) and bool(tensors(value))
