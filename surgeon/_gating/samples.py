"""How many samples an example has, and along which dimension of each sum they lie.

The first size of the model's first tensor is taken for the batch, and a sum's samples lie along its first
dimension, as a rule. Where a sum has another first size, or the same size twice, a second look tells: the
model is recorded once more with twice as many samples, and what grows is where they lie. If no sum grows, it
was no batch (a mask over positions, say), and the first size of the next argument is tried. Where no second
look can tell, a sum whose first size is not that of the batch, while just one other is, has them along that.

A model that is itself given its sequence first shows it in its attention or recurrence: a branch that mixes
the entries of the first dimension and keeps those of the second apart, while no branch does the opposite.
"""

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Samples:
    """What the sum of one gate tells about them.

    Attributes:
        shape: Of the sum.
        mixes: Whether the branch mixes the entries of the first dimension.
        apart: Whether it keeps those of a dimension apart; looked at on fake tensors when called.
    """

    shape: tuple[int, ...]
    mixes: bool
    apart: Callable[[int], bool]


def dimensions(found: Sequence[Samples], batch: int, along: Sequence[int | None]) -> list[int]:
    """For each sum the dimension of its samples.

    Args:
        found: The sums of one model, at an example.
        batch: How many samples the example has, if they lie along its first dimension.
        along: The dimension of each sum that grows with the batch, where that is known.
    """
    first = [_by_shape(s.shape, batch) if d is None else d for s, d in zip(found, along, strict=True)]
    given = [
        s for s, d in zip(found, first, strict=True) if len(s.shape) > 2 and s.shape[0] == batch and not d
    ]
    second = _sequence_first(given)
    return [d or int(second and len(s.shape) > 2) for s, d in zip(found, first, strict=True)]


def doubtful(shape: tuple[int, ...], batch: int | None) -> bool:
    """Whether a shape may be that of parts of samples, or of samples that lie along another dimension."""
    return shape[:1] != (batch,) and batch in shape


def _by_shape(shape: tuple[int, ...], batch: int) -> int:
    """A dimension other than the first, if it alone has the size of the batch."""
    fitting = [d for d, size in enumerate(shape) if size == batch]
    of_parts = bool(shape) and shape[0] % batch == 0  # windows or patches of each sample, one after the other
    return fitting[0] if len(fitting) == 1 and not of_parts else 0


def _sequence_first(found: Sequence[Samples]) -> bool:
    if not any(s.mixes and s.apart(1) for s in found):
        return False
    return all(s.mixes or s.apart(1) for s in found)
