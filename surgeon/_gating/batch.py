"""How many samples an example has, and which dimension of each sum grows with them.

The first size of the model's first tensor is taken for the batch. Where a sum has another first size, or the
same size twice, a second look tells: the model is recorded once more with twice as many samples, and what
grows is where they lie. If no sum grows, it was no batch (a mask over positions, say), and the first size of
the next argument is tried.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgeon._torch import pytree
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import Step
from surgeon._tracing.record import Recording, record
from surgeon.errors import RecordError

Sum = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of an example.

    Attributes:
        size: How many there are; ``None`` if the example has no tensor.
        along: The dimension along which they lie, for each sum for which a second look told.
    """

    size: int | None
    along: Mapping[Sum, int] = field(default_factory=dict)


def batch_of(recording: Recording, sums: Sequence[Sum]) -> Batch:
    """Finds the samples of a recorded example; the model is left as it was.

    Args:
        recording: Of the model.
        sums: The residual adds, each by the place of the call that makes it and by its shape.
    """
    first = recording.calls[0]
    sizes = list(dict.fromkeys(t.shape[0] for t in tensors((first.args, first.kwargs)) if t.ndim))
    if not sizes or not any(_unclear(shape, sizes[0]) for _, shape in sums):
        return Batch(sizes[0] if sizes else None)
    for size in sizes:
        along = _grown(recording, size, sums)
        if along:
            return Batch(size, along)
    return Batch(sizes[0])


def _unclear(shape: tuple[int, ...], size: int) -> bool:
    return shape[:1] != (size,) or size in shape[1:]


def _grown(recording: Recording, size: int, sums: Sequence[Sum]) -> dict[Sum, int]:
    """For each sum the one dimension that grows when every tensor of this first size has twice as many."""

    def twice(tensor: Tensor) -> Tensor:
        grows = tensor.shape[:1] == (size,)
        shape = (2 * size, *tensor.shape[1:]) if grows else tensor.shape
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)

    first = recording.calls[0]
    if recording.log.real:
        return {}
    with suppress(RecordError):
        given = pytree.tree_map_only(Tensor, twice, (first.args, first.kwargs))
        other = record(first.module, *given, training=recording.training)
        before, after = _steps(recording), _steps(other)
        if [step.owner for step in before] == [step.owner for step in after]:
            steps = zip(before, after, strict=True)
            pairs = [(a.owner, a.made[0], b.made[0]) for a, b in steps]
            return {one: found[0] for one in sums if (found := _dimensions(one, pairs))}
    return {}


def _steps(recording: Recording) -> list[Step]:
    """The additions of the forward; traces may have added others to the log."""
    return [step for step in recording.log.steps if step.adds and step.op < recording.calls[0].last_op]


def _dimensions(one: Sum, pairs: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> list[int]:
    """Where the sums of one call and shape have grown, if that is in one and the same dimension."""
    place, shape = one
    grown = {
        tuple(d for d, size in enumerate(shape) if after[d] != size)
        for owner, before, after in pairs
        if owner == place and tuple(before) == shape
    }
    alone = grown.pop() if len(grown) == 1 else ()
    return list(alone) if len(alone) == 1 else []
