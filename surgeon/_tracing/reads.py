"""Notes which attributes of a block and its children a trace has read: numbers, flags, lists, objects.

What the traced code read, its graph holds as a constant: a gated forward must be made anew when it changes,
and two blocks share a trace only where they agree on it. While a trace runs, the attributes of the modules
lie out of their sight, so that Python asks `nn.Module.__getattr__` for them, where it is noticed. No class of
a module changes, so that a forward may ask for the type of a child. Of an object that a module holds, such as
a configuration, the traced code gets a view, which notes in turn what is read of it; the children that a
forward walks through (those of an `nn.ModuleList`) are noted by their names.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn

from surgeon._torch import MODULE_GETATTR
from surgeon._tracing.state import PLAIN, draws_numbers, held_by, state
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


def attribute(block: nn.Module, name: str) -> Any:
    """The attribute of a dotted name (``"drop_path.drop_prob"``); ``None`` if there is none."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


@contextmanager
def noted(block: nn.Module, reads: Reads, listening: Callable[[], bool]) -> Iterator[None]:
    """Notes in ``reads`` what is read of ``block`` and below it inside the ``with``; within an fx trace.

    Args:
        block: The block; its attributes come back when the ``with`` ends, or stay what the code made of them.
        reads: Where to note.
        listening: Whether the traced code itself is running.
    """
    hidden: dict[int, tuple[str, dict[str, Any]]] = {}
    original = getattr(*MODULE_GETATTR)

    def look_up(module: nn.Module, name: str) -> Any:
        prefix, held = hidden.get(id(module), ("", {}))
        own = listening()
        if name not in held:
            try:
                found = original(module, name)
            except AttributeError:
                found = None
                raise
            finally:
                if own and found is None and id(module) in hidden:  # it may become something later
                    reads.note(prefix + name, None, own)
            if own and id(found) in hidden and isinstance(found, nn.Module):
                reads.fetched[hidden[id(found)][0][:-1]] = found
            return found
        value = held[name]
        if isinstance(value, PLAIN):
            reads.note(prefix + name, value, own)
        return _seen(value, prefix + name, reads, listening) if own else value

    modules = {f"{path}." if path else "": module for path, module in block.named_modules()}
    with mock.patch.object(*MODULE_GETATTR, look_up):
        try:
            for prefix, module in modules.items():
                hidden[id(module)] = prefix, {}
                _hide(module, *hidden[id(module)], reads)
            yield
        finally:
            for module in modules.values():
                for name, value in hidden.get(id(module), ("", {}))[1].items():
                    module.__dict__.setdefault(name, value)


def _hide(module: nn.Module, prefix: str, hidden: dict[str, Any], reads: Reads) -> None:
    """Takes a module's attributes out of its sight; what is plain and cannot be hidden counts as read.

    An attribute is in ``hidden`` before it is gone: another thread may ask for it at any time.
    """
    cls = type(module)
    asks = cls.__getattr__ is nn.Module.__getattr__ and cls.__getattribute__ is object.__getattribute__
    for name, value in list(module.__dict__.items()):
        if name in _INTERNAL or isinstance(value, (Tensor, nn.Module)):
            continue
        if asks and not hasattr(cls, name):
            hidden[name] = value
            del module.__dict__[name]
        elif isinstance(value, PLAIN) and not name.startswith("_"):
            reads.note(prefix + name, value, own=True)


def _seen(value: Any, name: str, reads: Reads, listening: Callable[[], bool]) -> Any:
    """What the traced code gets to see of a value that a module holds: a view of an object, else itself."""
    if draws_numbers(value):
        raise TraceError(f"its forward draws random numbers from self.{name}")
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        view = None
    else:
        view = _view(value, name, reads, listening)
    if view is None:
        reads.note(name, value, own=True)
    return value if view is None else view


def _view(value: Any, name: str, reads: Reads, listening: Callable[[], bool]) -> Any:
    """A twin of an object that shares all it holds and notes what is read; ``None`` if it can have none."""
    cls = type(value)
    ordinary = type(cls) is type and isinstance(cls.__init_subclass__, types.BuiltinFunctionType)
    if not ordinary or not hasattr(value, "__dict__") or held_by(value).keys() != value.__dict__.keys():
        return None

    def read(self: Any, attribute: str) -> Any:
        try:
            found = super(view, self).__getattribute__(attribute)  # type: ignore[arg-type]
        except AttributeError:
            if listening():
                reads.note(f"{name}.{attribute}", None, own=True)
            raise
        if not listening() or (attribute[:2] == "__" and attribute != "__dict__"):
            return found
        if attribute == "__dict__":
            reads.note(name, value, own=True)
            return found
        return found if callable(found) else _seen(found, f"{name}.{attribute}", reads, listening)

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
