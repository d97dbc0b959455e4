"""Along which dimension the samples of a batch lie, where a gate drops sample by sample.

Most networks have them along the first. Two signs speak against it. A sum that grows along another when the
batch does was transposed inside the model (`surgeon._gating.batch` looks; where it cannot, a sum whose first
size is not that of the batch, while just one other is, counts as such). And a model that is itself given its
sequence first shows it in its attention or recurrence: a branch that mixes the entries of the first dimension
and keeps those of the second apart, while no branch of the model does the opposite.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


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
