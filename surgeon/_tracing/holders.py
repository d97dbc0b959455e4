"""What a forward can reach beside tensors and modules, and what that holds: to compare, and to put back.

From the attributes of modules (and other values, by name) the way leads through nests, objects, closures and
defaults of functions, context variables; so far that no ordinary model ends it, and no further.
"""

import argparse
import copy
import functools
import io
import operator
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgeon._tracing.state import PLAIN, held_by, is_iterator, is_library
from surgeon.errors import TraceError

_DEEP = 6  # settings in a list in settings
_MANY = 10_000  # holders in all, and items of one that is looked into
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, threading.local)
_NESTS = (list, dict, set, deque, tuple, frozenset)
_OPAQUE = (*PLAIN, complex, bytes, Tensor, type, types.ModuleType, types.BuiltinFunctionType)


@dataclass(slots=True)
class Holder:
    """Something that holds values which may be exchanged.

    Attributes:
        name: What it is called from the model on.
        thing: A nest, a small array, the attributes of an object, an object with slots, a cell, a
            context variable.
        items: What it held; names count as well.
        lent: What it has held since its iterators were exchanged for others; None if it has none.
    """

    name: str
    thing: Any
    items: list[Any]
    lent: list[Any] | None = None

    @classmethod
    def of(cls, name: str, thing: Any) -> "Holder":
        """Of what it holds now."""
        return cls(name, thing, _items(thing))

    def lend(self) -> None:
        """Exchanges the iterators among what it holds for others, until it is put back.

        A file or a connection stays: it may be anybody's, and another thread may use it meanwhile.
        """
        places = [i for i, item in enumerate(self.items) if is_iterator(item) and not _closes(item)]
        if places and not isinstance(self.thing, (tuple, frozenset, set)):
            self.lent = list(self.items)
            for i in places:
                self.lent[i] = stand_in(self.name, self.items[i])
            _fill(self.thing, self.lent)

    def changed(self) -> bool:
        """Whether it holds something else now."""
        return not same(_items(self.thing), self.items if self.lent is None else self.lent)

    def put_back(self) -> None:
        """Only where something has changed: a class of one's own (diffusers' FrozenDict) may forbid it."""
        if not all_is(_items(self.thing), self.items):
            _fill(self.thing, self.items)


def holders(roots: Mapping[str, Any], apart: Iterable[nn.Module] = ()) -> list[Holder]:
    """Everything with exchangeable contents that is reached from some values, each once.

    Modules are looked into like other objects, but for those ``apart``.
    """
    known = set(map(id, apart))
    found: dict[int, Holder] = {}
    todo = deque((name, value, 0) for name, value in roots.items())
    while todo and len(found) < _MANY:
        name, value, depth = todo.popleft()
        if isinstance(value, _OPAQUE) or id(value) in known or depth > _DEEP:
            continue
        held = thing(value)
        if held is None:
            todo.extend((name, part, depth) for part in _parts(value))
        elif id(held) not in found:
            found[id(held)] = Holder.of(name, held)
            if len(found[id(held)].items) < _MANY:
                todo.extend((label, item, depth + 1) for label, item in _labelled(name, value, held))
    return list(found.values())


def thing(value: Any) -> Any:
    """What of a value holds others; None if nothing does, or what its parts do."""
    if isinstance(value, (*_NESTS, types.CellType, ContextVar)):
        return value
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return None
    if is_library(type(value).__module__) and not isinstance(value, (*_NAMESPACES, nn.Module)):
        return None if _memory(value) is None else value
    held = getattr(value, "__dict__", None)
    return value if not held and held_by(value) else held


def _memory(value: Any) -> memoryview | None:
    """The bytes of an array that may be written to; None of one that is large, and of what is none."""
    try:
        memory = memoryview(value).cast("B")
    except (TypeError, ValueError):
        return None
    return None if memory.readonly or len(memory) > _MANY else memory


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, types.FunctionType) and not is_library(value.__module__):
        return (*(value.__closure__ or ()), *(value.__defaults__ or ()), value.__kwdefaults__)
    return ()


def _labelled(name: str, value: Any, thing: Any) -> Iterator[tuple[str, Any]]:
    """What a thing holds that may hold something itself, by name."""
    if thing is not value:  # the attributes of an object
        # What a module has of nn.Module leads to all of a network, where the module is another block's.
        own = not isinstance(value, nn.Module)
        return (
            (f"{name}.{key}", item)
            for key, item in thing.items()
            if (own or key[0] != "_") and not isinstance(item, _OPAQUE)
        )
    if isinstance(thing, dict):
        return (
            (f"{name}[{key!r}]", item) for key, item in dict.items(thing) if not isinstance(item, _OPAQUE)
        )
    return ((name, item) for item in _items(thing) if not isinstance(item, _OPAQUE))


def _items(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return [*dict.keys(thing), *dict.values(thing)]
    if isinstance(thing, types.CellType):
        return contents(thing)
    if isinstance(thing, ContextVar):
        return [thing.get(_EMPTY)]
    if isinstance(thing, _NESTS):
        return list(thing)
    memory = _memory(thing)
    if memory is not None:
        return list(memory)
    held = held_by(thing)
    return [*held.keys(), *held.values()]


_EMPTY = object()


def contents(cell: types.CellType) -> list[Any]:
    """What a cell of a closure holds, if anything."""
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []


def all_is(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def same(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the same objects, or equal ones that are plain."""
    return all_is(now, before) or (len(now) == len(before) and all(map(same_value, now, before)))


def same_value(now: Any, before: Any) -> bool:
    """Whether two values are the very same, or equal and plain."""
    return now is before or (type(now) is type(before) and isinstance(now, PLAIN) and now == before)


def _fill(thing: Any, items: list[Any]) -> None:
    half = len(items) // 2
    if isinstance(thing, dict):
        thing.clear()
        thing.update(zip(items[:half], items[half:], strict=True))
    elif isinstance(thing, (list, deque)):
        thing.clear()
        thing.extend(items)
    elif isinstance(thing, set):
        thing.clear()
        thing.update(items)
    elif isinstance(thing, types.CellType):
        thing.cell_contents = items[0]
    elif isinstance(thing, ContextVar):
        if items[0] is not _EMPTY:
            thing.set(items[0])
    elif (memory := _memory(thing)) is not None:
        memory[:] = bytes(items)
    elif not isinstance(thing, (tuple, frozenset)):
        for name, value in zip(items[:half], items[half:], strict=True):
            setattr(thing, name, value)


# --- iterators --------------------------------------------------------------------------------------


class _Untakable:
    """In place of an iterator that cannot be copied: what is taken from it could not be put back."""

    def __init__(self, name: str, kind: type) -> None:
        self.name, self.kind = name, kind

    def __iter__(self) -> "_Untakable":
        return self

    def __next__(self) -> Any:
        raise TraceError(
            f"the forward takes from {self.name}, a {self.kind.__name__}, and what is taken there cannot be "
            "put back. Take from it outside of the model, or keep a list and a number"
        )


def _closes(value: Any) -> bool:
    """Whether something ends with a value, such as a connection: no copy may be made of it."""
    return hasattr(type(value), "__del__") and not isinstance(value, types.GeneratorType)


def _is_written(value: Any) -> bool:
    """Whether a value is a file to write to, such as a log, from which nothing is taken."""
    return isinstance(value, io.IOBase) and not value.closed and value.writable()


def stand_in(name: str, value: Any) -> Any:
    """An iterator that goes on where another one is, without taking from that."""
    if _is_written(value):
        return value
    if _closes(value):
        return _Untakable(name, type(value))
    try:
        return copy.copy(value)
    except TypeError:  # a generator, a file
        return _Untakable(name, type(value))
