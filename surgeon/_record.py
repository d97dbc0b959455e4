"""Runs a model once on fake tensors and notes what runs, in which order, on which arguments.

No arithmetic is done and no weight is touched: `FakeTensorMode` computes shapes only. Two observers look
on. `OpLog`, a dispatch mode, sees every ATen operator, also those inside leaf modules and functions, and
carries for each storage the set of model inputs and weights it depends on; so it knows every addition of
two tensors that share ancestry and tells it from shape arithmetic. Hooks on every module note the calls.
"""

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surgeon._example import mode, tensors, untouched
from surgeon.errors import RecordError

aten = torch.ops.aten

_SUMS = {aten.add, aten.add_, aten.addcmul, aten.addcmul_, aten.addcdiv, aten.addcdiv_}
# These read the size, dtype and device of their argument, never its numbers.
_SHAPE_ONLY = {
    *(aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full, aten.new_empty_strided),
    *(aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like),
}


@dataclass(frozen=True, slots=True)
class Op:
    """One ATen operator as it ran.

    Attributes:
        func: The operator's overload.
        active: How many of its tensor arguments depend on a model input.
        weighted: Whether a Parameter is among its arguments.
        depthwise: Whether it is a convolution with one input channel per group.
        random: Elements drawn from a random number generator, 0 if none.
        flops: Floating-point operations by PyTorch's own formulas.
    """

    func: Any
    active: int
    weighted: bool
    depthwise: bool
    random: int
    flops: int


@dataclass(slots=True)
class Call:
    """One call of a module.

    Attributes:
        module: The module.
        parent: Index of the call it was made from, -1 for the model itself.
        args, kwargs: What its forward got; tensors are fake.
        first_op, last_op: The range of operators that ran in it and below it.
        additions: Additions of two tensors with a common ancestor that its own forward made.
        biases: Other additions of an activation and a tensor (weight, mask, table).
        rewritten: Something wrote in place to what it returned, after it returned.
    """

    module: nn.Module
    parent: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first_op: int
    last_op: int = -1
    additions: int = 0
    biases: int = 0
    rewritten: bool = False


@dataclass(frozen=True, slots=True)
class Recording:
    """What one forward of a model did.

    Attributes:
        calls: Every module call in the order of entry; the model itself is the first.
        ops: Every ATen operator in order.
        fake: The mode whose fake tensors the calls' arguments are.
        flops: FLOPs of the whole forward.
        training: Whether modules were in training mode.
    """

    calls: tuple[Call, ...]
    ops: tuple[Op, ...]
    fake: FakeTensorMode
    training: bool
    log: "OpLog" = field(repr=False)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    def children(self, index: int) -> list[int]:
        """Indices of the calls made directly by call ``index``."""
        return [i for i, call in enumerate(self.calls) if call.parent == index]


class OpLog(TorchDispatchMode):
    """Logs every ATen operator and follows which storages depend on which model inputs and weights.

    Ancestry is a bit set kept per storage, so that a write through a view reaches the whole tensor. A
    tensor is active when a model input is among its ancestors.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.ops: list[Op] = []
        self.stack: list[int] = [-1]
        self.additions: Counter[int] = Counter()
        self.biases: Counter[int] = Counter()
        self._inputs = 0
        self._roots = 0
        self._weights: set[int] = set()
        self._shadows: dict[int, tuple[Tensor, Tensor]] = {}
        self._ancestry: dict[int, int] = {}
        self._alive: list[Any] = []

    def root(self, tensor: Tensor) -> None:
        """Declares ``tensor`` to be a model input."""
        self._inputs |= 1 << self._roots
        self._add_root(tensor)

    def shadow(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for ``tensor``, always the same one for the same weight."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._shadows:
            fake = self.fake.from_tensor(tensor)
            self._shadows[id(tensor)] = tensor, fake  # both kept alive: their ids stay theirs
            if isinstance(tensor, nn.Parameter):
                self._weights.add(_storage(fake))
                self._add_root(fake)
        return self._shadows[id(tensor)][1]

    def active(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` depends on a model input."""
        return bool(self._ancestry.get(_storage(tensor), 0) & self._inputs)

    def _add_root(self, tensor: Tensor) -> None:
        self._mark(tensor, 1 << self._roots)
        self._roots += 1

    def _mark(self, tensor: Tensor, bits: int) -> None:
        key = _storage(tensor)
        if key not in self._ancestry:
            self._alive.append(tensor)
            self._ancestry[key] = 0
        self._ancestry[key] |= bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A real tensor (a weight, a buffer) must not reach the operator: an in-place one would write to it.
        args, kwargs = pytree.tree_map_only(Tensor, self.shadow, (args, kwargs or {}))
        if func.namespace == "prim":
            return func(*args, **kwargs)
        read = tensors((args, kwargs))
        bits = [self._ancestry.get(_storage(t), 0) for t in read]
        active = sum(1 for b in bits if b & self._inputs)
        out = func(*args, **kwargs)
        written = tensors(out)
        if func.overloadpacket not in _SHAPE_ONLY:
            union = functools.reduce(operator.or_, bits, 0)
            for t in written if union else ():
                self._mark(t, union)
        if func.overloadpacket in _SUMS and active and len(read) > 1 and written[0].is_floating_point():
            related = any(a & b for a, b in itertools.combinations(bits, 2))
            (self.additions if related else self.biases)[self.stack[-1]] += 1
        self.ops.append(self._op(func, args, kwargs, out, read, active))
        return out

    def _op(self, func: Any, args: Any, kwargs: Any, out: Any, read: list[Tensor], active: int) -> Op:
        packet = func.overloadpacket
        made = tensors(out)
        random = made[0].numel() if torch.Tag.nondeterministic_seeded in func.tags and made else 0
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        depthwise = packet is aten.convolution and args[1].shape[1] == 1 and args[0].shape[1] > 1
        weighted = any(_storage(t) in self._weights for t in read)
        return Op(func, active, weighted, depthwise, random, int(flops))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = True) -> Recording:
    """Runs ``model(*args, **kwargs)`` on fake tensors and returns what happened; the model is left as it was.

    Args:
        model: Any module, on any device.
        args: Positional arguments; tensors are replaced by fake ones.
        kwargs: Keyword arguments, likewise.
        training: Record the training forward (the one in which existing stochastic depth is live) or the
            evaluating one.

    Raises:
        RecordError: The model's own forward failed on these arguments.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    log, calls = OpLog(fake), list[Call]()
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(mode(model, training))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_watch(model, log, calls))
        stack.enter_context(fake)
        fake_args, fake_kwargs = to_fake(fake, (args, kwargs))
        for tensor in tensors((fake_args, fake_kwargs)):
            log.root(tensor)
        stack.enter_context(log)
        try:
            model(*fake_args, **fake_kwargs)
        except Exception as error:
            raise RecordError(_failure(model, args, kwargs, error)) from error
    for index, call in enumerate(calls):
        call.additions, call.biases = log.additions[index], log.biases[index]
    return Recording(tuple(calls), tuple(log.ops), fake, training, log)


def to_fake(fake: FakeTensorMode, tree: Any) -> Any:
    """The same nest with every tensor replaced by a fresh fake one of ``fake``."""
    return pytree.tree_map_only(Tensor, lambda t: fake.from_tensor(t.detach()), tree)


@contextmanager
def _watch(model: nn.Module, log: OpLog, calls: list[Call]) -> Iterator[None]:
    """Hooks on every module that keep the stack of running calls."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(module, log.stack[-1], args, kwargs, len(log.ops)))
        log.stack.append(len(calls) - 1)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = calls[log.stack.pop()]
        call.last_op = len(log.ops)
        returned.extend((call, t, t._version) for t in tensors(output))

    returned: list[tuple[Call, Tensor, int]] = []
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
        for call, tensor, version in returned:
            call.rewritten |= tensor._version != version
    finally:
        for handle in handles:
            handle.remove()


def _failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> str:
    shapes = ", ".join(
        [_brief(a) for a in args] + [f"{name}={_brief(value)}" for name, value in kwargs.items()]
    )
    return (
        f"{type(model).__name__} could not be run on the example ({shapes}): {type(error).__name__}: {error}. "
        "Give an example it accepts: example=tensor, example=(a, b) or example={'name': value}"
    )


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__
