"""Whether the branch of one residual add may run on some of the rows, and which of its inputs have rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._gating.adds import open_gate
from surgeon._gating.lifted import Lifted
from surgeon._gating.rowwise import Rowwise, nested, rowwise
from surgeon._gating.samples import Samples
from surgeon._tracing.nests import tensors


@dataclass(frozen=True, slots=True)
class Subset:
    """The branch of one gate on some of the rows.

    Attributes:
        reason: Why it cannot run so; ``""`` if it can.
        statistics: It computes statistics over its rows.
        flops: FLOPs of its forward on one row.
        moved: Bytes of one row of the tensors that gathering and adding back touch.
        samples: What the sum tells about where the samples lie.
        lifted: The branch, with what was found of its inputs; ``None`` if it cannot move at all.
    """

    reason: str
    statistics: bool
    flops: int
    moved: int
    samples: Samples
    lifted: Lifted | None = None


def look(
    flow: Flow,
    addition: Addition,
    block: nn.Module,
    batch: int | None,
    part: tuple[Lifted, Sequence[fx.Node]] | None,
) -> Subset:
    """Looks at a branch on fake tensors; nothing is changed.

    Args:
        flow: The traced forward of the block.
        addition: The residual add.
        block: The block.
        batch: How many samples the example has, if this is its trace.
        part: The branch as a function of its own and the nodes that it reads; ``None`` if it cannot be one.
    """
    shortcut: Tensor = flow.fact(addition.shortcut).value
    if part is None:
        return Subset("", False, 0, 0, Samples(tuple(shortcut.shape), mixes=False, apart=lambda _: True))
    lifted, reads = part
    branch = _Branch(flow, block, lifted, reads, shortcut)
    outcome = branch.on_rows(batch)
    rows = shortcut.shape[0] if shortcut.ndim else 1
    moved = sum(_bytes(flow, node) for node in (*(reads[i] for i in branch.lifted.rows), addition.shortcut))
    samples = Samples(tuple(shortcut.shape), outcome.mixes, branch.apart)
    per_row = addition.flops // max(rows, 1), moved // max(rows, 1)
    return Subset(outcome.reason, outcome.statistics, *per_row, samples, branch.lifted)


def _bytes(flow: Flow, node: fx.Node) -> int:
    value = flow.fact(node).value
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


class _Branch:
    """A branch and the values that it reads on the example.

    A tensor that is computed from the input and has the shortcut's first size holds one entry per row. One
    that is not computed from it may do so too (positions, spread over the batch), and one with a single entry
    may hold one per row at another batch. Which it is shows when the branch runs.
    """

    def __init__(
        self, flow: Flow, block: nn.Module, lifted: Lifted, reads: Sequence[fx.Node], shortcut: Tensor
    ) -> None:
        self.block, self.lifted, self.shortcut = block, lifted, shortcut
        inner = len(lifted.gates)  # what they drop has no bearing on whether rows stay apart
        self.values = [*(flow.fact(node).value for node in reads), *[open_gate()] * inner]
        self.active = [*(flow.fact(node).active for node in reads), *[False] * inner]
        self.given = [i for i, node in enumerate(reads) if node.op != "get_attr"]

    def on_rows(self, batch: int | None) -> Rowwise:
        """Whether it treats its rows one by one; ``lifted`` then has those of its inputs that have rows."""
        if batch is not None and self.shortcut.shape[:1] != (batch,):
            return Rowwise(f"its result has the shape {list(self.shortcut.shape)}, the batch {batch} entries")
        if self.shortcut.ndim == 0:
            return Rowwise("the shortcut has no dimension")
        if any(map(self._nests_rows, self.values, self.active)):
            return Rowwise("the branch reads a nest of tensors with one entry per row")
        if not self.lifted.rows:
            return Rowwise("the branch reads nothing that has one entry per row")
        return self._settled(self._runs(self.lifted.rows))

    def _nests_rows(self, value: Any, active: bool) -> bool:
        """Whether an input is a nest with rows in it; it would have to be made anew of some of them."""
        count = self.shortcut.shape[:1]
        return active and nested(value) and any(t.shape[:1] == count for t in tensors(value))

    def _settled(self, outcome: Rowwise) -> Rowwise:
        sizes = {1} if not outcome.reason else {1, self.shortcut.shape[0]}
        more = [i for i in self._places(sizes) if i not in self.lifted.rows]
        wider = tuple(sorted((*self.lifted.rows, *more)))
        again = self._runs(wider) if more and not outcome.mixes else outcome
        if more and not again.reason:
            outcome, self.lifted = again, replace(self.lifted, rows=wider)
        single = [
            (i, place)
            for i in self.given
            for place, tensor in enumerate(tensors(self.values[i]))
            if i not in self.lifted.rows and tensor.shape[:1] == (1,)
        ]
        self.lifted = replace(self.lifted, single=tuple(single))
        return outcome

    def _places(self, sizes: set[int]) -> list[int]:
        """The inputs that are tensors of one of these first sizes; weights never change theirs."""
        values = [(i, self.values[i]) for i in self.given]
        return [i for i, v in values if isinstance(v, Tensor) and v.ndim and v.shape[0] in sizes]

    def _runs(self, rows: Sequence[int]) -> Rowwise:
        return rowwise(self.lifted.run, self.block, self.values, rows)

    def apart(self, dim: int) -> bool:
        """Whether it keeps the entries of a dimension apart."""
        size = self.shortcut.shape[dim]
        along = [
            i
            for i, (value, on) in enumerate(zip(self.values, self.active, strict=True))
            if on and isinstance(value, Tensor) and value.ndim > dim and value.shape[dim] == size
        ]
        return bool(along) and not rowwise(self.lifted.run, self.block, self.values, along, dim).reason
