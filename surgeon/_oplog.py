"""Sees every ATen operator that runs, and follows which tensors depend on which inputs and weights."""

import functools
import itertools
import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surgeon._example import mapped, tensors
from surgeon._fake import Shadows, storage

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
        self._shadows = Shadows(fake)
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
        known = tensor in self._shadows
        fake = self._shadows.of(tensor)
        if not known and isinstance(tensor, nn.Parameter):
            self._weights.add(storage(fake))
            self._add_root(fake)
        return fake

    def active(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` depends on a model input."""
        return bool(self._ancestry.get(storage(tensor), 0) & self._inputs)

    def made_at(self, tensor: Tensor) -> int:
        """The step that made what is in a tensor's storage now; -1 for a weight or constant."""
        return self._made_at.get(storage(tensor), -1)

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
        self._made_at.update({storage(t): len(self._steps) - 1 for t in made})

    def _add_root(self, tensor: Tensor) -> None:
        self._mark(tensor, 1 << self._roots)
        self._roots += 1

    def _mark(self, tensor: Tensor, bits: int) -> None:
        key = storage(tensor)
        if key not in self._ancestry:
            self._alive.append(tensor)
            self._ancestry[key] = 0
        self._ancestry[key] |= bits

    def _shadowed(self, value: Any) -> Any:
        return self.shadow(value) if isinstance(value, Tensor) else value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A real tensor (a weight, a buffer) must not reach the operator: an in-place one would write to it.
        args, kwargs = mapped(self._shadowed, (args, kwargs or {}))
        if func.namespace == "prim":
            return func(*args, **kwargs)
        read = tensors((args, kwargs))
        bits = [self._ancestry.get(storage(t), 0) for t in read]
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
        weighted = any(storage(t) in self._weights for t in read)
        return Op(func, active, weighted, depthwise, random, int(flops))
