"""Notes which attributes of a block and its children a trace has read: numbers, flags, lists, methods.

What the traced code read, its graph holds as a constant: a gated forward must be made anew when it changes,
and two blocks share a trace only where they agree on it. While a trace runs, reading an attribute of any
module goes through here. No class of a module changes, so that a forward may ask for the type of a child. Of
an object that a module holds, such as a configuration, the traced code gets a view, which notes in turn what
is read of it; the children that a forward walks through (of an `nn.ModuleList`) are noted by their names.
"""

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from surgeon._torch import MODULE_GETATTR
from surgeon._tracing.holders import same_value
from surgeon._tracing.state import PLAIN, attribute, draws_numbers, held_by, is_iterator, is_library, state
from surgeon._tracing.undisturbed import replaced
from surgeon.errors import TraceError

# What PyTorch itself keeps on a module, and surgeon on a gated block.
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"_surgeon"}


class Reads:
    """The attributes that were read, by dotted name, with the `state` they had before the trace.

    Attributes:
        all: Those that any code read, plain ones of children included which ran as a whole.
        own: Those among them that the traced code itself read.
        fetched: The modules below the block that the traced code got hold of, by name.
    """

    def __init__(self) -> None:
        self.all: dict[str, Any] = {}
        self.own: set[str] = set()
        self.fetched: dict[str, nn.Module] = {}

    def note(self, name: str, value: Any, own: bool) -> None:
        if name not in self.all:
            self.all[name] = state(value)
        if own:
            self.own.add(name)

    def walked(self, called: set[str]) -> None:
        """Notes the children of the modules that were fetched, but for those that were called as a whole."""
        for path, module in self.fetched.items():
            if path not in called and (module._modules or type(module).forward is nn.Module.forward):
                self.note(f"{path}._modules", module._modules, own=True)

    def agree(self, block: nn.Module, beside: tuple[str, ...] = ()) -> bool:
        """Whether ``block`` has the same values under the same names.

        ``training`` flags are not compared, nor what begins with a name in ``beside``.
        """
        compared = (name for name in self.all if not name.endswith("training"))
        read = ((name, self.all[name]) for name in compared if not name.startswith(beside))
        return all(_same(state(attribute(block, name)), value) for name, value in read)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


@contextmanager
def noted(block: nn.Module, reads: Reads, tracer: "Listener") -> Iterator[None]:
    """Notes in ``reads`` what is read of ``block`` and below it inside the ``with``; within an fx trace.

    Nothing is taken from the modules, which other threads may run meanwhile.

    Raises:
        TraceError: From within, when the traced code assigns an attribute.
    """
    prefixes = {id(module): f"{path}." if path else "" for path, module in block.named_modules()}
    missing = getattr(*MODULE_GETATTR)

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if name in _INTERNAL or not tracer.here or id(module) not in prefixes:
            return value
        if tracer.listening:
            return _read(module, prefixes[id(module)], name, value, reads, tracer)
        if isinstance(value, PLAIN) and name in object.__getattribute__(module, "__dict__"):
            reads.note(prefixes[id(module)] + name, value, own=False)
        return value

    def look_further(module: nn.Module, name: str) -> Any:
        own = tracer.listening and id(module) in prefixes
        found = None
        try:
            found = missing(module, name)
        finally:
            if own and found is None:  # it may become something later
                reads.note(prefixes[id(module)] + name, None, own=True)
        if own and id(found) in prefixes and isinstance(found, nn.Module):
            reads.fetched[prefixes[id(found)][:-1]] = found
        return found

    with replaced(
        (*MODULE_GETATTR, look_further),
        (nn.Module, "__getattribute__", read),
        (nn.Module, "__setattr__", _refusing(nn.Module.__setattr__, prefixes, tracer)),
        (nn.Module, "__delattr__", _refusing(nn.Module.__delattr__, prefixes, tracer)),
    ):
        yield


def _refusing(write: Callable[..., None], prefixes: Mapping[int, str], tracer: "Listener") -> Any:
    """``write`` for all but the traced code, which may assign what is there already, and nothing else."""

    def guard(module: nn.Module, name: str, *value: Any) -> None:
        if not tracer.listening or id(module) not in prefixes:
            return write(module, name, *value)
        now = object.__getattribute__(module, "__dict__").get(name, guard)
        if value and same_value(value[0], now):
            return None
        raise TraceError(f"its forward assigns self.{prefixes[id(module)]}{name}")

    return guard


class Listener(Protocol):
    """What is needed of a tracer."""

    @property
    def listening(self) -> bool:
        """Whether the traced code itself is running."""

    @property
    def here(self) -> bool:
        """Whether this is the thread of the trace."""


def _read(module: nn.Module, prefix: str, name: str, value: Any, reads: Reads, tracer: Listener) -> Any:
    """What the traced code gets for an attribute that is there."""
    if name[:2] == "__":
        if name == "__dict__" and not _asked_by_library():
            raise TraceError("its forward looks into the __dict__ of a module")
        return value
    if isinstance(value, (Tensor, nn.Module)):
        return value
    if name not in object.__getattribute__(module, "__dict__"):
        held = getattr(type(module), name, None)
        if isinstance(held, property) or callable(held):
            if held is not getattr(nn.Module, name, None) and not _asked_by_library():
                code = isinstance(held, property)  # which may be exchanged, too
                reads.note(f"{prefix}@{name}" if code else prefix + name, held if code else value, own=True)
            return value
    return _seen(value, prefix + name, reads, tracer)


def _asked_by_library() -> bool:
    """Whether PyTorch's own Python reads the attribute, in the course of what the traced code has called."""
    return is_library(sys._getframe(3).f_globals.get("__name__"))


def _seen(value: Any, name: str, reads: Reads, tracer: Listener) -> Any:
    """What the traced code gets to see of a value that a module holds: a view of an object, else itself."""
    if draws_numbers(value):
        raise TraceError(f"its forward draws random numbers from self.{name}")
    if is_iterator(value):
        raise TraceError(
            f"its forward takes from self.{name}, a {type(value).__name__}, which each call moves on"
        )
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        view = None
    else:
        view = _view(value, name, reads, tracer)
    if view is None:
        reads.note(name, value, own=True)
    return value if view is None else view


def _view(value: Any, name: str, reads: Reads, tracer: Listener) -> Any:
    """A twin of an object that shares all it holds and notes what is read; ``None`` if it can have none."""
    cls = type(value)
    ordinary = type(cls) is type and isinstance(cls.__init_subclass__, types.BuiltinFunctionType)
    if not ordinary or not hasattr(value, "__dict__") or held_by(value).keys() != value.__dict__.keys():
        return None

    def read(self: Any, attribute: str) -> Any:
        try:
            found = super(view, self).__getattribute__(attribute)  # type: ignore[arg-type]
        except AttributeError:
            if tracer.listening:
                reads.note(f"{name}.{attribute}", None, own=True)
            raise
        if not tracer.listening or (attribute[:2] == "__" and attribute != "__dict__"):
            return found
        if attribute == "__dict__":
            reads.note(name, value, own=True)
            return found
        return found if callable(found) else _seen(found, f"{name}.{attribute}", reads, tracer)

    def write(_self: Any, attribute: str, _: Any = None) -> None:
        raise TraceError(f"its forward assigns self.{name}.{attribute}")

    body = {"__getattribute__": read, "__setattr__": write, "__delattr__": write, "__slots__": ()}
    try:
        view = type(cls.__name__, (cls,), body)
        twin: Any = object.__new__(view)
        object.__setattr__(twin, "__dict__", value.__dict__)
    except TypeError:  # a class that is built in or final
        return None
    return twin
