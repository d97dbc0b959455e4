"""What autograd keeps of a batch of which a branch computes some rows.

Where the operator that made the batch needs its own result in its backward (a ReLU does), the whole batch is
kept anyway, and a branch that saves the rows it took would keep them twice. There autograd saves the numbers
of the rows instead, and takes them again when the branch's backward asks for them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from surgeon._gating.rowops import take
from surgeon._torch import top_saving_hooks
from surgeon._tracing.aten import Family, named
from surgeon._tracing.oplog import OpLog

# By PyTorch's derivative formulas these read their result; some more do in place, having nothing else left.
_READ_RESULT = {Family.RELUS, Family.SQUASHES, Family.SOFTMAXES}
_READ_RESULT_IN_PLACE = {"leaky_relu", "elu", "hardtanh"}


def keeps_result(log: OpLog, step: int) -> bool:
    """Whether autograd keeps the tensor that a step of the recording made, for the step's own backward."""
    place = log.steps[step].op if step >= 0 else -1
    if place < 0:
        return False
    schema = log.ops[place].func._schema
    in_place = schema.is_mutable and named(schema.name) in _READ_RESULT_IN_PLACE
    return in_place or log.ops[place].family in _READ_RESULT


@contextmanager
def saved_once(parts: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Iterator[None]:
    """Inside, autograd saves ``rows`` and the whole in place of a part that was taken from it.

    Hooks that were there before (of activation checkpointing, say) get the whole to pack.

    Args:
        parts: Part and whole, where ``part`` is ``take(whole, rows)`` and nothing writes to it.
        rows: Numbers of the rows.
    """
    outer: Any = top_saving_hooks()
    pack, unpack = outer or (Tensor.detach, _same)
    versions = [whole._version for _, whole in parts]

    def save(tensor: Tensor) -> tuple[Any, int | None]:
        for i, (part, whole) in enumerate(parts):
            if _shows(tensor, part):
                return pack(whole.detach()), versions[i]
        return pack(tensor), None

    def load(saved: tuple[Any, int | None]) -> Tensor:
        packed, version = saved
        tensor: Tensor = unpack(packed)
        if version is None:
            return tensor
        if not outer and tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a batch of shape {list(tensor.shape)} of which a branch took some rows"
            )
        return take(tensor, rows)

    with saved_tensors_hooks(save, load):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _shows(tensor: Tensor, part: Tensor) -> bool:
    return (
        tensor.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        and tensor.shape == part.shape
        and tensor.stride() == part.stride()
        and tensor.dtype == part.dtype
    )
