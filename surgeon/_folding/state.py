"""Parameters and buffers by the memory they lie in: what a fold may write, and under which names."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from surgeon._torch import FakeTensor


@dataclass(frozen=True, slots=True)
class Named:
    """One piece of memory in the model's state, with every name it goes by."""

    tensor: Tensor
    names: tuple[str, ...]
    writable: bool


def named_tensors(model: nn.Module) -> list[Named]:
    """Parameters and buffers, tied ones once.

    Two Parameters over the same memory count as one. Where memory is shared in part, or with a buffer,
    none of them may be written: what a scale on the one does to the other cannot be said. Nor may a
    Parameter be that holds one number in several places (``expand``).
    """
    groups: dict[object, list[tuple[str, Tensor]]] = {}
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in state:
        groups.setdefault(memory_of(tensor), []).append((name, tensor))
    blocked = _overlapping([group[0][1] for group in groups.values()])
    return [
        Named(
            group[0][1],
            tuple(name for name, _ in group),
            all(isinstance(t, nn.Parameter) for _, t in group)
            and id(group[0][1]) not in blocked
            and not repeats(group[0][1]),
        )
        for group in groups.values()
    ]


def address(tensor: Tensor) -> tuple[str, int] | None:
    """Device and beginning of the memory; None when there is none to speak of (meta, fake, empty)."""
    if isinstance(tensor, FakeTensor):
        return None
    try:
        start = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    except (RuntimeError, NotImplementedError):
        return None
    return (str(tensor.device), start) if start else None


def memory_of(tensor: Tensor) -> object:
    """Equal for two tensors that are the same entries of the same memory."""
    at = address(tensor)
    layout = (tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if at else ()
    return (at, layout) if at else id(tensor)


def repeats(tensor: Tensor) -> bool:
    """Whether two entries may be the same number in memory, so that it cannot be written entry by entry."""
    if address(tensor) is None:
        return False
    reach = 0
    for step, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += (size - 1) * step
    return False


def _overlapping(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of the tensors that share some of their memory with another one of the list."""
    spans: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for tensor in tensors:
        if at := address(tensor):
            first = tensor.storage_offset() * tensor.element_size()
            steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            last = first + (steps + 1) * tensor.element_size()
            spans.setdefault(at, []).append((int(first), int(last), id(tensor)))
    found: set[int] = set()
    for group in spans.values():
        group.sort()
        end, owner = -1, 0
        for first, last, one in group:
            if first < end:
                found |= {one, owner}
            if last > end:
                end, owner = last, one
    return found
