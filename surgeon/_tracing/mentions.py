"""What the code of a forward mentions besides its module: class attributes, numbers of its file and closures.

Python finds these without asking the module, so nothing notices when traced code reads them. But the names
are in the code, and where they lead to a plain value, that value decides what runs like an attribute does.
"""

import argparse
import functools
import inspect
import sys
import threading
import types
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import _lru_cache_wrapper
from typing import Any

from torch import Tensor, nn

from surgeon._tracing.key import Variable
from surgeon._tracing.state import PLAIN, is_iterator, is_library
from surgeon.errors import TraceError

_FUNCTIONS = 200  # looked into for one forward
_ITEMS = 64  # of a nest that counts as plain
_DEEP = 3  # settings in settings
_NESTS = (list, tuple, set, frozenset, dict)
_CODE = (types.FunctionType, types.BuiltinFunctionType, type, functools.partial)  # in a table of activations
_CLASS = {"isinstance", "type", "__class__"}
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, threading.local)


@dataclass(slots=True)
class Mentions:
    """What the code of one forward mentions.

    Attributes:
        attributes: Names of plain class attributes of the block, dotted where they are those of settings.
        variables: Where other plain values and functions lie.
        beside: Nests, objects and closures that it may change, by name.
        classes: Whether it may ask for the class of a child.
        foreign: Names of variables in files of other packages than the block's.
    """

    attributes: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()
    beside: dict[str, Any] = field(default_factory=dict)
    classes: bool = False
    foreign: set[str] = field(default_factory=set)


def mentions(block: nn.Module, forward: Any) -> Mentions:
    """What ``forward``, which ``block`` runs, mentions, and the methods and functions that it calls by name.

    Raises:
        TraceError: One of them is an iterator.
    """
    functions = list(_functions(block, forward))
    names = {name for function in functions for name in _names(function.__code__)}
    held = {name: _static(type(block), name) for name in names}
    attributes = {".".join(path) for path, value in _reached(held, names) if _is_plain(value)}
    found = Mentions(tuple(sorted(attributes)), classes=not names.isdisjoint(_CLASS))
    own = type(block).__module__.partition(".")[0]
    for function in functions:
        _look_around(function, found)
        if function.__module__.partition(".")[0] != own:
            found.foreign |= function.__globals__.keys() & _names(function.__code__)
    return found


def _look_around(function: types.FunctionType, found: Mentions) -> None:
    """Notes what one function names in its file and in what it imports, and what is in its closure."""
    names = _names(function.__code__)
    files = [(holder, name, holder[name]) for holder, name in _named(function, names)]
    cells = [(cell, "cell_contents", _content(cell)) for cell in function.__closure__ or ()]
    variables = {(id(one.holder), one.names): one for one in found.variables}
    for holder, name, value in (*files, *cells):
        for path, inner in _reached({name: value}, names):
            variable = Variable(holder, path)
            said = str(variable) if isinstance(holder, dict) else f"a closure of {function.__name__}"
            if is_iterator(inner):
                raise TraceError(
                    f"its forward names {said}, a {type(inner).__name__}, which each call moves on"
                )
            if _is_plain(inner) or _is_code(inner):
                variables[id(holder), path] = variable
            elif not isinstance(inner, (type, types.ModuleType)):
                found.beside[said] = inner
    for name in ("__defaults__", "__kwdefaults__"):
        if not _is_constant(value := getattr(function, name)):
            variables[id(function), (name,)] = Variable(function, (name,))
            found.beside[f"a default of {function.__name__}"] = value
    found.variables = tuple(variables.values())


def _named(function: types.FunctionType, names: Collection[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The variables of its file that a function names, and the modules that it imports: where, and how."""
    file = function.__globals__
    yield from ((file, name) for name in file.keys() & names)
    package = str(file.get("__package__") or "")
    above = ["", *(f"{package.rsplit('.', up)[0]}." for up in range(package.count(".") + 1) if package)]
    full = (prefix + name for name in names if name not in file for prefix in above)
    yield from ((sys.modules, name) for name in full if name in sys.modules and not is_library(name))


def _functions(block: nn.Module, forward: Any) -> Iterator[types.FunctionType]:
    """The forward, and what its code names of methods and of functions that the block holds, or its file."""
    cls = type(block)
    todo: list[Any] = [forward]
    seen = set[types.CodeType]()
    while todo and len(seen) < _FUNCTIONS:
        function = todo.pop()
        if type(function) is _lru_cache_wrapper:
            function = function.__wrapped__
        if type(function) is types.MethodType:
            function = function.__func__
        own = type(function) is types.FunctionType
        if not own or function.__code__ in seen or is_library(function.__module__):
            continue
        seen.add(function.__code__)
        yield function
        todo += [_content(cell) for cell in function.__closure__ or ()]
        names = _names(function.__code__)
        around = [holder[name] for holder, name in _named(function, names)]
        holders = [*cls.__mro__, *(one for one in around if _holds_settings(one))]
        held = [block.__dict__[name] for name in names & block.__dict__.keys()]
        calls = [type(one).__call__ for one in (*around, *held) if _is_callable(one)]
        todo += [*around, *held, *calls]
        todo += [_code(holder.__dict__.get(name)) for holder in holders for name in names]


def _is_callable(value: Any) -> bool:
    """Whether a value is an object that can be called as a function of the user's."""
    return (
        callable(value)
        and not isinstance(value, (type, nn.Module))
        and not is_library(type(value).__module__)
    )


def _code(held: Any) -> Any:
    """The function behind a method or a property."""
    if type(held) is property:
        return held.fget
    return held.__func__ if type(held) in (staticmethod, classmethod) else held


def _is_code(value: Any) -> bool:
    """Whether a value is a function of the user's."""
    return type(value) is types.FunctionType and not is_library(value.__module__)


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Every name that code has, also in a string, as for ``getattr``."""
    inside = [_names(one) for one in code.co_consts if isinstance(one, types.CodeType)]
    spelled = [one for one in code.co_consts if isinstance(one, str) and one.replace(".", "_").isidentifier()]
    return frozenset(code.co_names).union(spelled, *inside)


def _reached(
    held: dict[str, Any], names: Collection[str], depth: int = _DEEP
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is held, and what the given names lead to from there, with the names on the way."""
    for first, value in held.items():
        yield (first,), value
        if depth and not _is_plain(value) and _holds_settings(value):
            further = {name: _static(value, name) for name in names if not name.startswith("__")}
            yield from (((first, *rest), inner) for rest, inner in _reached(further, names, depth - 1))


class _Nothing:
    """In place of an attribute that is not there; nothing plain."""


def _static(thing: Any, name: str) -> Any:
    look: Any = getattr if isinstance(thing, threading.local) else inspect.getattr_static
    return look(thing, name, _Nothing)


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
    if cls is types.FunctionType:
        return bool(value.__dict__) and not is_library(value.__module__)
    if cls is _Nothing or issubclass(cls, (Tensor, nn.Module, property)):
        return False
    ordinary = issubclass(cls, _NAMESPACES) or not is_library(cls.__module__)
    return ordinary and hasattr(value, "__dict__")


def _is_constant(defaults: Any) -> bool:
    """Whether defaults of arguments can hold nothing else later."""
    values = defaults.values() if isinstance(defaults, dict) else defaults or ()
    return all(isinstance(value, (*PLAIN, type)) for value in values)


def _is_plain(value: Any, depth: int = _DEEP) -> bool:
    if type(value) in _NESTS:
        if len(value) > _ITEMS or not depth:
            return False
        items = [*value, *value.values()] if type(value) is dict else list(value)
        return all(isinstance(item, _CODE) or _is_plain(item, depth - 1) for item in items)
    return issubclass(type(value), (*PLAIN, ContextVar))
