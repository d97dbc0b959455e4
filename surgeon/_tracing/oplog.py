"""Sees every ATen operator that runs, and follows which tensors depend on which inputs and weights."""

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from surgeon._torch import FakeTensor, FakeTensorMode, TorchDispatchMode
from surgeon._tracing.aten import Family, family, form_only, may_add
from surgeon._tracing.fake import Shadows, storage
from surgeon._tracing.nests import mapped, tensors


@dataclass(frozen=True, slots=True)
class Op:
    """One ATen operator as it ran.

    Attributes:
        func: The operator's overload.
        active: How many of its tensor arguments depend on a model input.
        weighted: Whether a Parameter, or what is computed from Parameters alone, is among its arguments.
        depthwise: Whether it is a convolution with one input channel per group.
        random: Elements drawn from a random number generator, 0 if none.
        flops: Floating-point operations by PyTorch's own formulas.
        made: Bytes of the floating-point tensors that it made; views and writes in place make none.
    """

    func: Any
    active: int
    weighted: bool
    depthwise: bool
    random: int
    flops: int
    made: int = 0

    @property
    def family(self) -> Family | None:
        """Its family; ``None`` if it is in none."""
        return family(self.func)


Layout = tuple[torch.Size, tuple[int, ...], int]


def layout(tensor: Tensor) -> Layout:
    """The shape, strides and offset of a tensor: which part of its storage it shows."""
    if tensor.layout != torch.strided:
        return torch.Size() if tensor.is_nested else tensor.shape, (), 0
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


@dataclass(frozen=True, slots=True)
class Step:
    """One operator that made a value from active tensors; views make none.

    Attributes:
        op: Its place in the log, -1 for an input of the model.
        owner: Place of the call whose forward ran it.
        adds: It adds two activations, or two tensors with a common ancestor.
        sources: For each tensor it read, the step that made what is in its storage, -1 for a constant.
        read: How they were read: the shape, strides and offset of each.
        made: The same of its first result.
        floating: Whether that holds floating-point numbers.
    """

    op: int
    owner: int
    adds: bool
    sources: tuple[int, ...]
    read: tuple[Layout, ...]
    made: Layout
    floating: bool


def _numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class OpLog(TorchDispatchMode):
    """Logs every ATen operator and follows which storages depend on which model inputs and weights.

    Ancestry is a bit set kept per storage, so that a write through a view reaches the whole tensor. A
    tensor is active when a model input is among its ancestors.

    Attributes:
        touched: The storages whose numbers some operator has read since the set was last cleared.
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
        self.steps: list[Step] = []
        self._pieces: dict[int, tuple[int, int, int]] = {}
        self._made_at: dict[int, int] = {}
        self.touched: set[int] = set()

    def root(self, tensor: Tensor) -> None:
        """Declares ``tensor`` to be a model input."""
        self._inputs |= 1 << self._roots
        self._add_root(tensor)
        self._step([tensor], [], adds=False, op=-1)

    def shadow(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for ``tensor``, always the same; itself in a log of real tensors."""
        if isinstance(tensor, FakeTensor):
            return tensor
        found = tensor if self.real else self._shadows.of(tensor)
        if isinstance(tensor, nn.Parameter) and storage(found) not in self._weights:
            self._weights.add(storage(found))
            self._add_root(found)
        return found

    def active(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` depends on a model input."""
        return bool(self._ancestry.get(storage(tensor), 0) & self._inputs)

    def made_at(self, tensor: Tensor) -> int:
        """The step that made what is in a tensor's storage now; -1 for a weight or constant."""
        return self._made_at.get(storage(tensor), -1)

    def between(self, start: int, end: int) -> list[Step]:
        """The steps on the ways from one step to another, that one included; none if there is no way."""
        if start < 0:
            return []
        reached = {start}
        for step in range(start + 1, end + 1):
            if not reached.isdisjoint(self.steps[step].sources):
                reached.add(step)
        if end not in reached or end == start:
            return []
        needed, way = {end}, list[Step]()
        for step in range(end, start, -1):
            if step in needed and step in reached:
                way.append(self.steps[step])
                needed.update(self.steps[step].sources)
        return way

    def behind(self, results: Iterable[Tensor]) -> set[int]:
        """Places in the log of the operators that something in ``results`` was computed by."""
        needed = {self.made_at(t) for t in results}
        for step in range(len(self.steps) - 1, -1, -1):
            if step in needed:
                needed.update(self.steps[step].sources)
        return {self.steps[step].op for step in needed if step >= 0}

    def _step(self, made: list[Tensor], read: list[Tensor], *, adds: bool, op: int) -> None:
        sources = tuple([self.made_at(t) for t in read])
        layouts, floats = tuple([layout(t) for t in read]), made[0].is_floating_point()
        self.steps.append(Step(op, self.stack[-1], adds, sources, layouts, layout(made[0]), floats))
        self._made_at.update({storage(t): len(self.steps) - 1 for t in made})

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
        if func.namespace == "prim":  # where a tensor is, and the like
            return func(*args, **(kwargs or {}))
        # A real tensor (a weight, a buffer) must not reach the operator: an in-place one would write to it.
        args, kwargs = mapped(self._shadowed, (args, kwargs or {}))
        read = tensors((args[1:] if form_only(func) else args, kwargs))
        memory = [storage(t) for t in read]
        bits = [self._ancestry.get(m, 0) for m in memory]
        active = sum(1 for b in bits if b & self._inputs)
        out = func(*args, **kwargs)
        written = tensors(out)
        terms = self._terms(family(func), args, read)
        adds = terms > 1 and bool(active) and _numbers(written[0])
        if may_add(func):
            put = family(func) is Family.PUTS and args[3:4] != (True,)  # in the place of what was there
            adds = not put and self._adds_features(args)
            self.additions[self.stack[-1]] += adds
        elif adds:
            adds = active > 1 or any(a & b for a, b in itertools.combinations(bits, 2)) or len(read) == 1
            (self.additions if adds else self.biases)[self.stack[-1]] += terms - 1
        self.touched.update(memory)
        union = functools.reduce(operator.or_, bits, 0)
        for t in written if union else ():
            self._mark(t, union)
        if active and written and not func.is_view:
            self._step(written, read, adds=adds, op=len(self.ops))
            if family(func) in {Family.STACKS, Family.CATS} and active > 1:
                self._note_pieces(written[0], read, args[1] if len(args) > 1 else 0)
        weighted = any(b and not b & self._inputs for b in bits)
        self.ops.append(_op(func, args, kwargs, out, memory, active, weighted))
        return out

    def _adds_features(self, args: Any) -> bool:
        """Whether the first tensor and another one depend on an input of the model."""
        onto, *others = tensors(args)
        return _numbers(onto) and self.active(onto) and any(_numbers(t) and self.active(t) for t in others)

    def _terms(self, kind: Family | None, args: Any, read: list[Tensor]) -> int:
        """How many tensors the operator adds up: two, or those that were put together before; else 0."""
        if kind in {Family.SUMS, Family.FUSED}:
            return 2 if len(read) > 1 else 0
        if kind is not Family.REDUCTIONS or len(args) < 2 or not args[1]:
            return 0
        apart, count, owner = self._pieces.get(self.made_at(read[0]), (-1, 0, -1))
        over = any((read[0].stride(d), read[0].shape[d]) == (apart, count) for d in args[1])
        return count if over and owner == self.stack[-1] else 0

    def _note_pieces(self, whole: Tensor, pieces: list[Tensor], dim: int) -> None:
        """Notes how far apart the pieces lie that are put together: views change no strides."""
        sizes = {piece.shape[dim] if piece.ndim == whole.ndim else 1 for piece in pieces}
        if len(sizes) == 1 and whole.layout == torch.strided:
            apart = sizes.pop() * whole.stride(dim)
            self._pieces[len(self.steps) - 1] = apart, len(pieces), self.stack[-1]


def _op(func: Any, args: Any, kwargs: Any, out: Any, memory: list[int], active: int, weighted: bool) -> Op:
    packet = func.overloadpacket
    made = tensors(out)
    random = made[0].numel() if torch.Tag.nondeterministic_seeded in func.tags and made else 0
    flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    depthwise = family(func) is Family.CONVOLUTIONS and args[1].shape[1] == 1 and args[0].shape[1] > 1
    new = [t for t in made if t.is_floating_point() and not func.is_view and storage(t) not in memory]
    return Op(
        func,
        active,
        weighted,
        depthwise,
        random,
        int(flops),
        sum(t.numel() * t.element_size() for t in new if t.layout is torch.strided),
    )
