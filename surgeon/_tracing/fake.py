"""Fake stand-ins for tensors, and copies of the nests that hold them.

A stand-in has its tensor's size, strides, dtype and device, shares memory with others where its tensor does,
and holds no numbers. PyTorch's own converter covers every kind of tensor and takes half a millisecond; here
strided tensors without a subclass are made in a thirtieth of that, since a model may have thousands.
"""

import copy
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch import FakeTensor, FakeTensorMode, fake_of, no_dispatch
from surgeon._tracing.nests import mapped
from surgeon.errors import TraceError

NESTED = (
    "a nested tensor, whose sizes no analysis knows. Give the model a padded batch and a mask, or put the "
    "gates into the part of it that gets ordinary or sparse tensors"
)


def storage(tensor: Tensor) -> int:
    """An identity of the memory behind a tensor, equal for views of it; a sparse one is its own."""
    try:  # the layout of a fake tensor is asked for in Python, and this runs for every operator
        if type(tensor) is FakeTensor or tensor.layout == torch.strided:
            return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        pass
    return id(tensor)


class Shadows:
    """The stand-ins of real tensors, each always the same.

    Args:
        fake: The mode that the stand-ins belong to.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._memory: dict[int, torch.UntypedStorage] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._made

    def of(self, tensor: Tensor) -> Tensor:
        """The stand-in of ``tensor``."""
        if id(tensor) not in self._made:
            made = self._strided(tensor) if _is_plain(tensor) else self._converted(tensor)
            self._made[id(tensor)] = tensor, made  # both kept alive: their ids stay theirs
        return self._made[id(tensor)][1]

    def _converted(self, tensor: Tensor) -> Tensor:
        if tensor.is_nested:
            raise TraceError(f"it is given {NESTED}")
        return self.fake.from_tensor(tensor if tensor.is_leaf else tensor.detach())

    def _strided(self, tensor: Tensor) -> Tensor:
        memory, is_parameter = tensor.untyped_storage(), isinstance(tensor, nn.Parameter)
        with no_dispatch():
            if memory._cdata not in self._memory:
                self._memory[memory._cdata] = torch.UntypedStorage(memory.nbytes(), device="meta")
            meta = torch.empty(0, dtype=tensor.dtype, device="meta")
            meta.set_(self._memory[memory._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
            asks = is_parameter and tensor.requires_grad
            made = fake_of(self.fake, meta, tensor.device, requires_grad=asks)
        if is_parameter:
            made._is_param = True  # what isinstance(_, nn.Parameter) asks
        return made


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but sizes, strides and numbers in memory."""
    no_wrapper = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return (
        no_wrapper
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def to_fake(fake: FakeTensorMode, tree: Any) -> Any:
    """The same nest with every tensor replaced by a fresh fake one of ``fake``; equal objects stay equal."""
    return twin(tree, Shadows(fake).of)


def twin(tree: Any, of: Callable[[Tensor], Any] | None = None) -> Any:
    """A copy of a nest, and of the objects in it (a cache, a configuration) with all that they hold.

    Args:
        tree: The nest.
        of: What each tensor is replaced by, ``None`` for itself; tensors are never copied.
    """
    copies: dict[int, Any] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            made = of(value) if of else None
            return value if made is None else made
        if not hasattr(value, "__dict__") or callable(value) or isinstance(value, types.ModuleType):
            return value
        if id(value) not in copies:
            try:
                made = copies[id(value)] = copy.copy(value)
            except Exception:  # noqa: BLE001 - an object may refuse to be copied in any way; then it is shared
                made = copies[id(value)] = value
            if made is not value:  # immutable objects copy as themselves
                made.__dict__.update(mapped(leaf, dict(value.__dict__)))
        return copies[id(value)]

    return mapped(leaf, tree)


class _Coins(threading.local):
    """Whether none falls on this thread: every gate is open while one looks at a model that has gates."""

    stopped = False


coins = _Coins()


@contextmanager
def coins_stopped() -> Iterator[None]:
    """Inside, no coin drops a whole branch: on fake tensors a coin has no value to look at."""
    before, coins.stopped = coins.stopped, True
    try:
        yield
    finally:
        coins.stopped = before
