"""What the code of a forward mentions besides its module: class attributes, numbers of its file and closures.

Python finds these without asking the module, so nothing notices when traced code reads them. But the names
are in the code, and where they lead to a plain value, that value decides what runs like an attribute does.
"""

import argparse
import inspect
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import _lru_cache_wrapper
from typing import Any

from torch import Tensor, nn

from surgeon._tracing.outside import is_library
from surgeon._tracing.state import PLAIN

_FUNCTIONS = 200  # looked into for one forward
_ITEMS = 64  # of a nest that counts as plain
_DEEP = 3  # settings in settings
_NESTS = (list, tuple, set, frozenset, dict)
_CLASS = {"isinstance", "type", "__class__"}
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a plain value lies: in a file or a cell of a closure, or where names lead from there."""

    holder: Any
    names: tuple[str, ...]

    def value(self) -> Any:
        """What lies there now; None if it is gone."""
        first, *rest = self.names
        file = isinstance(self.holder, dict)
        found = self.holder.get(first) if file else getattr(self.holder, first, None)
        for name in rest:
            found = getattr(found, name, None)
        return found

    def __str__(self) -> str:
        return ".".join(self.names)


@dataclass(frozen=True, slots=True)
class Mentions:
    """What the code of one forward mentions.

    Attributes:
        attributes: Names of plain class attributes of the block, dotted where they are those of settings.
        places: Where other plain values lie.
        classes: Whether it may ask for the class of a child.
    """

    attributes: tuple[str, ...]
    places: tuple[Place, ...]
    classes: bool


def mentions(block: nn.Module) -> Mentions:
    """What the forward of ``block`` mentions, and the methods and functions that it calls by name."""
    functions = list(_functions(block))
    names = {name for function in functions for name in _names(function.__code__)}
    held = {name: _static(type(block), name) for name in names}
    attributes = {".".join(path) for path in _plain(held, names)}
    places: dict[tuple[int, tuple[str, ...]], Place] = {}
    for function in functions:
        own = _names(function.__code__)
        file = {name: function.__globals__[name] for name in own & function.__globals__.keys()}
        found = [Place(function.__globals__, path) for path in _plain(file, own)]
        for cell in function.__closure__ or ():
            inside = _plain({"cell_contents": _content(cell)}, own)
            found += [Place(cell, path) for path in inside]
        places |= {(id(place.holder), place.names): place for place in found}
    return Mentions(tuple(sorted(attributes)), tuple(places.values()), not names.isdisjoint(_CLASS))


def _functions(block: nn.Module) -> Iterator[types.FunctionType]:
    """The forward, and what its code names of methods and of functions that the block holds, or its file."""
    cls = type(block)
    todo: list[Any] = [getattr(cls, "_ungated_forward", cls.forward)]
    seen = set[types.CodeType]()
    while todo and len(seen) < _FUNCTIONS:
        function = todo.pop()
        if type(function) is _lru_cache_wrapper:
            function = function.__wrapped__
        own = type(function) is types.FunctionType
        if not own or function.__code__ in seen or is_library(function.__module__):
            continue
        seen.add(function.__code__)
        yield function
        todo += [_content(cell) for cell in function.__closure__ or ()]
        names = _names(function.__code__)
        around = [function.__globals__[name] for name in names & function.__globals__.keys()]
        holders = [*cls.__mro__, *(one for one in around if _holds_settings(one))]
        todo += [*around, *(block.__dict__[name] for name in names & block.__dict__.keys())]
        todo += [_code(holder.__dict__.get(name)) for holder in holders for name in names]


def _code(held: Any) -> Any:
    """The function behind a method or a property."""
    if type(held) is property:
        return held.fget
    return held.__func__ if type(held) in (staticmethod, classmethod) else held


def _names(code: types.CodeType) -> set[str]:
    inside = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return set(code.co_names).union(*map(_names, inside))


def _plain(held: dict[str, Any], names: Iterable[str], depth: int = _DEEP) -> Iterator[tuple[str, ...]]:
    """The paths that lead from what is held to a plain value, by the given names."""
    for first, value in held.items():
        if _is_plain(value):
            yield (first,)
        elif depth and _holds_settings(value):
            further = {name: _static(value, name) for name in names if not name.startswith("__")}
            yield from ((first, *rest) for rest in _plain(further, names, depth - 1))


class _Nothing:
    """In place of an attribute that is not there; nothing plain."""


def _static(thing: Any, name: str) -> Any:
    return inspect.getattr_static(thing, name, _Nothing)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _Nothing


def _holds_settings(value: Any) -> bool:
    """A module of the user's, a class or an object of one; nothing that computes."""
    cls = value if issubclass(type(value), type) else type(value)
    if issubclass(cls, types.ModuleType):
        return cls is not value and not is_library(value.__name__)
    if cls is _Nothing or issubclass(cls, (Tensor, nn.Module, types.FunctionType, property)):
        return False
    ordinary = issubclass(cls, _NAMESPACES) or not is_library(cls.__module__)
    return ordinary and hasattr(value, "__dict__")


def _is_plain(value: Any, depth: int = _DEEP) -> bool:
    if type(value) in _NESTS:
        if len(value) > _ITEMS or not depth:
            return False
        items = [*value, *value.values()] if type(value) is dict else list(value)
        return all(_is_plain(item, depth - 1) for item in items)
    return issubclass(type(value), PLAIN)
