"""Along which dimension the samples of a batch lie, where a gate drops sample by sample.

Most networks have them along the first. Two signs speak against it. A sum whose first size is not that of the
batch, while just one other is, was transposed inside the model. And a model that is itself given its sequence
first shows it in its attention: a branch that mixes the entries of the first dimension and keeps those of the
second apart, while no branch of the model does the opposite.
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


def dimensions(found: Sequence[Samples], batch: int) -> list[int]:
    """For each sum the dimension of its samples.

    Args:
        found: The sums of one model, at an example.
        batch: How many samples the example has, if they lie along its first dimension.
    """
    second = _sequence_first([s for s in found if len(s.shape) > 2 and s.shape[0] == batch])
    return [_by_shape(s.shape, batch) or int(second and len(s.shape) > 2) for s in found]


def _by_shape(shape: tuple[int, ...], batch: int) -> int:
    """A dimension other than the first, if it alone has the size of the batch."""
    fitting = [d for d, size in enumerate(shape) if size == batch]
    of_parts = bool(shape) and shape[0] % batch == 0  # windows or patches of each sample, one after the other
    return fitting[0] if len(fitting) == 1 and not of_parts else 0


def _sequence_first(found: Sequence[Samples]) -> bool:
    if not any(s.mixes and s.apart(1) for s in found):
        return False
    return all(s.mixes or s.apart(1) for s in found)
