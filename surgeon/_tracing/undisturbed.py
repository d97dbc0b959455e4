"""How a model is left as it was: what an analysis changes for a while, and what a forward leaves behind.

A forward may store tensors on its module (LeViT caches its attention bias in evaluation) or in a list, an
object, a variable of its file; it may give a weight other memory (``weight.data = ...``) or draw random
numbers. What it leaves behind on fake tensors must not stay. `undisturbed` takes it back and tells what it
was: a forward that changes what it can reach has no graph that could stand for it.
"""

import gc
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._tracing.fake import coins_stopped
from surgeon._tracing.holders import Holder, holders, same_value, stand_in, thing
from surgeon._tracing.outside import nothing_left_outside
from surgeon._tracing.state import ATOMS, PLAIN, is_iterator


@contextmanager
def undisturbed(
    model: nn.Module,
    *,
    training: bool | None = None,
    beside: Mapping[str, Any] | None = None,
    left: list[str] | None = None,
) -> Iterator[list[str]]:
    """Inside, ``model`` may run on fake tensors; afterwards it is as it was, and so is what it can reach.

    Every gate stays open, inference mode is left, autocast remembers no cast; the random number generators
    of PyTorch, Python and NumPy, and whether gradients are on, are put back.

    Args:
        model: A model or a block.
        training: The mode that every module is in meanwhile; ``None`` for its own.
        beside: Other values, by name, to be put back as well.
        left: A list for what has held a proxy in the files of the model, in words.

    Yields:
        A list that has, afterwards, the names of what was changed inside; what modules below a block changed
        on themselves is among them.
    """
    changed: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(no_inference_mode())
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # a forward may turn them off
        stack.enter_context(coins_stopped())
        stack.enter_context(generators_kept())
        stack.enter_context(_no_autocast_cache())
        stack.enter_context(untouched(model, changed, beside, left))
        if training is not None:
            stack.enter_context(mode(model, training))
        yield changed


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets every module's ``training`` flag inside the block and restores each one afterwards.

    The flags are assigned directly: some models override ``train()`` with side effects.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def collected_later() -> Iterator[None]:
    """Keeps the garbage collector still inside: it would walk, again and again, what lives to the end."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, attributes (owner, name, value) of classes and files have other values."""
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _ABSENT:  # a class has it from another one
                delattr(owner, name)
            else:
                setattr(owner, name, value)


_ABSENT = object()


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the state of PyTorch's, Python's and NumPy's global random number generators afterwards."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Keeps autocast from remembering casts of weights: real and fake ones must not meet in its cache."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """Leaves inference mode inside, whose tensors have no version counters; the grad mode stays as it is."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def untouched(
    model: nn.Module,
    changed: list[str] | None = None,
    beside: Mapping[str, Any] | None = None,
    left: list[str] | None = None,
    *,
    attributes_only: bool = False,
) -> Iterator[None]:
    """Puts back what modules, and the nests and objects that they reach, hold; ``changed`` gets their names.

    Args:
        model: A model or a block.
        changed: A list for the names of what changed inside.
        beside: Other values, by name, to be put back as well.
        left: A list for what has held a proxy in the files of the model, in words.
        attributes_only: Leave the memory of weights alone, and the variables of the model's files.
    """
    before = [_Attributes(f"{name}." if name else "", module) for name, module in model.named_modules()]
    weights = [] if attributes_only else [tensor for one in before for tensor in one.weights()]
    memory = [(t, t.data) for t in weights if not nn.parameter.is_lazy(t)]
    roots, empty = _nests_and_objects(before)
    reached = holders({**roots, **(beside or {})}, apart=model.modules())
    held: list[_Attributes | Holder] = [*before, *reached]
    for one in held:
        one.lend()
    try:
        with nullcontext() if attributes_only else nothing_left_outside(model, left):
            yield
    finally:
        if changed is not None:
            changed += [name for one in before for name in one.moved()]
            moved = {id(holder.thing): holder.name for holder in reached if holder.changed()}
            changed += moved.values()  # by each name that it has
            changed += [name for name, value in roots.items() if moved and id(thing(value)) in moved]
            changed += [name for name, value in empty.items() if value]
        for one in held:
            one.put_back()
        for value in empty.values():
            if value:
                value.clear()
        for tensor, data in memory:
            if not _same_memory(tensor, data):
                tensor.data = data


def _nests_and_objects(modules: list["_Attributes"]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes that may lead to more, by name, and the nests that are empty.

    Most are nn.Module's own, of hooks and the like, and empty: there is nothing to look into. What a gated
    block learns while one looks at it stays.
    """
    roots, empty = dict[str, Any](), dict[str, Any]()
    for one in modules:
        for name, value in one.own.items():
            if type(value) in _NESTS:
                (roots if value else empty)[one.prefix + name] = value
            elif type(value) not in ATOMS and name != "_surgeon" and not isinstance(value, _ENDS):
                roots[one.prefix + name] = value
    return roots, empty


_NESTS = {dict, OrderedDict, list, set}
_ENDS = (Tensor, nn.Module, *PLAIN)


class _Attributes:
    """What one module holds itself."""

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self.prefix, self.module = prefix, module
        self.own = dict(module.__dict__)
        self.lent = self.own

    def weights(self) -> list[Tensor]:
        held = (*self.module._parameters.values(), *self.module._buffers.values())
        return [tensor for tensor in held if tensor is not None]

    def lend(self) -> None:
        values = [(name, value) for name, value in self.own.items() if type(value) not in _NESTS]
        taken = {name: value for name, value in values if is_iterator(value)}
        if taken:
            lent = {name: stand_in(f"self.{self.prefix}{name}", value) for name, value in taken.items()}
            self.lent = self.own | lent
            self._set(dict(self.lent))

    def moved(self) -> list[str]:
        """The names of what is other now, come or gone."""
        now = self.module.__dict__
        if _all_is(now, self.lent):
            return []
        names = [name for name in (*now, *(self.lent.keys() - now.keys())) if name != "_surgeon"]
        return [
            self.prefix + name
            for name in names
            if not same_value(now.get(name, names), self.lent.get(name, self))
        ]

    def put_back(self) -> None:
        if not _all_is(self.module.__dict__, self.own):
            self._set(self.own)

    def _set(self, attributes: dict[str, Any]) -> None:
        # At one stroke: another thread that runs the module must never find it bare.
        object.__setattr__(self.module, "__dict__", attributes)


def _all_is(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether the same names stand for the very same objects, in the same order."""
    return [*now] == [*before] and all(map(operator.is_, now.values(), before.values()))


def _same_memory(tensor: Tensor, data: Tensor) -> bool:
    try:
        return tensor.is_set_to(data)
    except (RuntimeError, NotImplementedError):  # without memory of its own: a subclass, a sparse tensor
        return True
