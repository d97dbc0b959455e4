"""What the code of a forward mentions besides its module: class attributes, numbers of its file and closures.

Python finds these without asking the module, so nothing notices when traced code reads them. But the names
are in the code, and where one leads to a plain value, that value decides what runs like an attribute does.
"""

import argparse
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgeon._tracing.outside import is_library
from surgeon._tracing.state import PLAIN

_FUNCTIONS = 200  # looked into for one forward
_ITEMS = 64  # of a nest that counts as plain
_CLASS = {"isinstance", "type", "__class__"}
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a plain value lies: a name in a file, an attribute of something there, or a cell of a closure."""

    holder: Any
    name: str

    def value(self) -> Any:
        """What lies there now; None if it is gone."""
        if isinstance(self.holder, dict):
            return self.holder.get(self.name)
        return getattr(self.holder, self.name, None)


@dataclass(frozen=True, slots=True)
class Mentions:
    """What the code of one forward mentions.

    Attributes:
        attributes: Names of plain class attributes of the block.
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
    attributes = sorted(n for n in names if _is_plain(inspect.getattr_static(type(block), n, block)))
    places = {(id(one.holder), one.name): one for function in functions for one in _around(function)}
    return Mentions(tuple(attributes), tuple(places.values()), not names.isdisjoint(_CLASS))


def _functions(block: nn.Module) -> Iterator[types.FunctionType]:
    """The forward, and what its code names of methods and of functions that the block holds, or its file."""
    cls = type(block)
    todo: list[Any] = [getattr(cls, "_ungated_forward", cls.forward)]
    seen = set[types.CodeType]()
    while todo and len(seen) < _FUNCTIONS:
        function = inspect.unwrap(todo.pop())
        own = isinstance(function, types.FunctionType)
        if not own or function.__code__ in seen or is_library(function.__module__):
            continue
        seen.add(function.__code__)
        yield function
        todo += [held for held in map(_content, function.__closure__ or ()) if callable(held)]
        for name in _names(function.__code__):
            method = inspect.getattr_static(cls, name, None)
            method = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            held = (method, block.__dict__.get(name), function.__globals__.get(name))
            todo += [one for one in held if callable(one)]


def _names(code: types.CodeType) -> set[str]:
    inside = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return set(code.co_names).union(*map(_names, inside))


def _around(function: types.FunctionType) -> Iterator[Place]:
    names, file = _names(function.__code__), function.__globals__
    for name in names & file.keys():
        if _is_plain(file[name]):
            yield Place(file, name)
        elif _holds_settings(file[name]):
            held = (one for one in names if not one.startswith("__"))
            static = ((one, inspect.getattr_static(file[name], one, file)) for one in held)
            yield from (Place(file[name], one) for one, value in static if _is_plain(value))
    for cell in function.__closure__ or ():
        if _is_plain(_content(cell)):
            yield Place(cell, "cell_contents")


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return cell


def _holds_settings(value: Any) -> bool:
    """A module of the user's, a class or an object of one; nothing that computes."""
    if isinstance(value, types.ModuleType):
        return not is_library(value.__name__)
    cls = value if isinstance(value, type) else type(value)
    if issubclass(cls, (Tensor, nn.Module, types.FunctionType)):
        return False
    return issubclass(cls, _NAMESPACES) or not is_library(cls.__module__)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        items = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return len(items) <= _ITEMS and all(isinstance(item, PLAIN) for item in items)
    return isinstance(value, PLAIN) and not isinstance(value, type)
