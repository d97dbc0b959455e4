"""Runs a model once on fake tensors and notes what runs, in which order, on which arguments.

No arithmetic is done and no weight is touched: `FakeTensorMode` computes shapes only. Two observers look
on. `OpLog`, a dispatch mode, sees every ATen operator, also those inside leaf modules and functions, and
carries for each storage the set of model inputs and weights it depends on; so it knows every addition of
two tensors that share ancestry and tells it from shape arithmetic. Hooks on every module note the calls.
"""

import copy
import functools
import itertools
import logging
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surgeon._example import generators_kept, mode, no_autocast_cache, no_inference_mode, tensors, untouched
from surgeon._gate import held_open
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
        output: What it gave.
        wrote: Whether it changed one of its arguments in place.
        first_op, last_op: The range of operators that ran in it and below it.
        additions: Additions of two activations, or of two tensors with a common ancestor, that its own
            forward made.
        biases: Other additions of an activation and a tensor (weight, mask, table).
        rewritten: After it returned, something wrote in place to what it took or gave, or may do so since
            that leaves the model.
        made_at: For the storage of each tensor it got, the step of the log that made what is in it.
    """

    module: nn.Module
    parent: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first_op: int
    last_op: int = -1
    output: Any = None
    wrote: bool = False
    additions: int = 0
    biases: int = 0
    rewritten: bool = False
    made_at: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recording:
    """What one forward of a model did.

    Attributes:
        calls: Every module call in the order of entry; the model itself is the first.
        flops: FLOPs of the whole forward.
        training: Whether it ran as in training.
        log: The log of every operator.
    """

    calls: tuple[Call, ...]
    flops: int
    training: bool
    log: "OpLog" = field(repr=False)

    def replays(self, call: Call) -> dict[nn.Module, list[Call]]:
        """The calls made directly by ``call`` whose result a trace may take from here, by module, in order.

        Those that hand on or write to their arguments are run anew: the trace's arguments are other tensors.
        """
        if self.log.real:
            return {}
        found: dict[nn.Module, list[Call]] = {}
        index = next(i for i, c in enumerate(self.calls) if c is call)
        for child in self.calls[index + 1 :]:
            if child.parent == index:
                found.setdefault(child.module, []).append(child)
            elif child.parent < index:
                break
        return found

    def arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any], "OpLog"]:
        """A call's arguments as fake tensors, and the log that knows which of them are active.

        Objects among them (a cache, say) are copies, so that a trace can write to them.
        """
        if not self.log.real:
            return *twin((call.args, call.kwargs)), self.log
        log = OpLog(FakeTensorMode(allow_non_fake_inputs=True))
        args, kwargs = to_fake(log.fake, (call.args, call.kwargs))
        for ran, stands_for in zip(tensors((call.args, call.kwargs)), tensors((args, kwargs)), strict=True):
            if self.log.active(ran):
                log.root(stands_for)
        return args, kwargs, log


class OpLog(TorchDispatchMode):
    """Logs every ATen operator and follows which storages depend on which model inputs and weights.

    Ancestry is a bit set kept per storage, so that a write through a view reaches the whole tensor. A
    tensor is active when a model input is among its ancestors.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
        self.real = False
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
        self._steps: list[tuple[int, int, frozenset[int]]] = []
        self._made_at: dict[int, int] = {}

    def root(self, tensor: Tensor) -> None:
        """Declares ``tensor`` to be a model input."""
        self._inputs |= 1 << self._roots
        self._add_root(tensor)
        self._step([tensor], [], adds=False)

    def shadow(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for ``tensor``, always the same one for the same weight."""
        if isinstance(tensor, FakeTensor) or self.real:
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

    def made_at(self, tensor: Tensor) -> int:
        """The step that made what is in a tensor's storage now; -1 for a weight or constant."""
        return self._made_at.get(_storage(tensor), -1)

    def between(self, start: int, end: int) -> set[int] | None:
        """The calls whose own forward adds on a way from one step to another; ``None`` if there is no way."""
        if start < 0:
            return None
        reached = {start}
        for step in range(start + 1, end + 1):
            if not reached.isdisjoint(self._steps[step][2]):
                reached.add(step)
        if end not in reached or end == start:
            return None
        way, owners = {end}, set()
        for step in range(end, start, -1):
            if step in way and step in reached:
                adds, owner, sources = self._steps[step]
                way |= sources
                owners |= {owner} if adds else set()
        return owners

    def _step(self, made: list[Tensor], sources: list[int], *, adds: bool) -> None:
        self._steps.append((adds, self.stack[-1], frozenset(sources)))
        self._made_at.update({_storage(t): len(self._steps) - 1 for t in made})

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
        sources = [self.made_at(t) for t in read]
        out = func(*args, **kwargs)
        written = tensors(out)
        adds = False
        if func.overloadpacket not in _SHAPE_ONLY:
            union = functools.reduce(operator.or_, bits, 0)
            for t in written if union else ():
                self._mark(t, union)
        if func.overloadpacket in _SUMS and active and len(read) > 1 and written[0].is_floating_point():
            adds = active > 1 or any(a & b for a, b in itertools.combinations(bits, 2))
            (self.additions if adds else self.biases)[self.stack[-1]] += 1
        if active and not func.is_view:
            self._step(written, sources, adds=adds)
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
    """An identity of the memory behind a tensor, equal for views of it."""
    return int(tensor.untyped_storage()._cdata)


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """Runs ``model(*args, **kwargs)`` on fake tensors and returns what happened; the model is left as it was.

    First as in training. A model that cannot run so (a batch of one under BatchNorm, a detector without its
    targets) is run with each batch of one doubled, then as in evaluation, and where values decide shapes
    (non-maximum suppression) in evaluation on real tensors.

    Args:
        model: Any module, on any device.
        args: Positional arguments; tensors are replaced by fake ones.
        kwargs: Keyword arguments, likewise.

    Raises:
        RecordError: The model's own forward failed on these arguments in every way.
    """
    attempts = [(True, False, False), (True, True, False), (False, False, False), (False, False, True)]
    first: Exception | None = None
    for training, doubled, real in attempts:
        given = pytree.tree_map_only(Tensor, _doubled, (args, kwargs)) if doubled else (args, kwargs)
        if real and any(t.is_meta for t in (*model.parameters(), *tensors((args, kwargs)))):
            continue
        try:
            return _record(model, *given, training=training, real=real)
        except Exception as error:  # noqa: BLE001 - a model's forward may raise anything
            first = first or error
    raise RecordError(_failure(model, args, kwargs, first)) from first


def _doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.ndim > 1 and tensor.shape[0] == 1 else tensor


def _record(model: nn.Module, args: Any, kwargs: Any, *, training: bool, real: bool) -> Recording:
    log, calls = OpLog(FakeTensorMode(allow_non_fake_inputs=True)), list[Call]()
    log.real = real
    with ExitStack() as stack:
        for context in (untouched(model), mode(model, training), generators_kept(), no_autocast_cache()):
            stack.enter_context(context)
        stack.enter_context(held_open())
        stack.enter_context(_quiet())
        stack.enter_context(no_inference_mode())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_watch(model, log, calls))
        given = twin((args, kwargs)) if real else to_fake(log.fake, (args, kwargs))
        twin(given, log.root)
        if not real:
            stack.enter_context(log.fake)
        stack.enter_context(log)
        model(*given[0], **given[1])
    for index, call in enumerate(calls):
        call.additions, call.biases = log.additions[index], log.biases[index]
    return Recording(tuple(calls), sum(op.flops for op in log.ops), training, log)


@contextmanager
def _quiet() -> Iterator[None]:
    """A forward that fails on fake tensors is an answer here, not worth PyTorch's own error log."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def to_fake(fake: FakeTensorMode, tree: Any) -> Any:
    """The same nest with every tensor replaced by a fresh fake one of ``fake``; equal objects stay equal."""
    made: dict[int, Tensor] = {}

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            plain = tensor.layout == torch.strided and not isinstance(tensor, FakeTensor)
            made[id(tensor)] = _blank(fake, tensor) if plain else fake.from_tensor(tensor.detach())
        return made[id(tensor)]

    return twin(tree, convert)


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
                made.__dict__.update(pytree.tree_map(leaf, dict(value.__dict__)))
        return copies[id(value)]

    return pytree.tree_map(leaf, tree)


def _blank(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    with fake:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextmanager
def _watch(model: nn.Module, log: OpLog, calls: list[Call]) -> Iterator[None]:
    """Hooks on every module that keep the stack of running calls."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tensors((args, kwargs))
        kept_args, kept_kwargs = twin((args, kwargs))
        calls.append(Call(module, log.stack[-1], kept_args, kept_kwargs, len(log.ops)))
        calls[-1].made_at = {_storage(t): log.made_at(t) for t in given}
        entered.append([(t, t._version) for t in given])
        log.stack.append(len(calls) - 1)

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        call = calls[log.stack.pop()]
        call.last_op, call.output = len(log.ops), output
        call.wrote = any(t._version != version for t, version in entered.pop())
        seen.extend((call, t, t._version) for t in tensors((output, call.args, call.kwargs)))
        if call.parent == -1:
            final.update(_storage(t) for t in tensors(output))

    entered: list[list[tuple[Tensor, int]]] = []
    seen: list[tuple[Call, Tensor, int]] = []
    final: set[int] = set()
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
        for call, tensor, version in seen:
            call.rewritten |= tensor._version != version or _storage(tensor) in final
    finally:
        for handle in handles:
            handle.remove()


def _failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception | None) -> str:
    shapes = ", ".join(
        [_brief(a) for a in args] + [f"{name}={_brief(value)}" for name, value in kwargs.items()]
    )
    return (
        f"{type(model).__name__} could not be run on the example ({shapes}): "
        f"{type(error).__name__}: {error}. "
        "Give an example it accepts: example=tensor, example=(a, b) or example={'name': value}"
    )


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__
