"""Notes which plain attributes (numbers, flags, strings) of a block and its children a trace has read.

What the traced code read, its graph holds as a constant: a gated forward must be made anew when it changes,
and two blocks share a trace only where they agree on it. While a trace runs, the plain attributes of the
modules lie out of their sight, so that Python asks `nn.Module.__getattr__` for them, where it is noticed. No
class changes, so that a forward may ask for the type of a child.
"""

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import _symbolic_trace

CONSTANTS = (type(None), bool, str, enum.Enum, torch.dtype, torch.device, torch.memory_format, torch.layout)
PLAIN = (*CONSTANTS, int, float)


class Reads:
    """The plain attributes that were read, by dotted name, with their values before the trace.

    Attributes:
        all: Those that any code read, that of children included which ran as a whole.
        own: Those among them that the traced code itself read.
    """

    def __init__(self) -> None:
        self.all: dict[str, Any] = {}
        self.own: set[str] = set()

    def note(self, name: str, value: Any, own: bool) -> None:
        self.all.setdefault(name, value)
        if own:
            self.own.add(name)

    def agree(self, block: nn.Module, beside: tuple[str, ...] = ()) -> bool:
        """Whether ``block`` has the same values under the same names.

        ``training`` flags are not compared, nor what begins with a name in ``beside``.
        """
        compared = (name for name in self.all if not name.endswith("training"))
        read = ((name, self.all[name]) for name in compared if not name.startswith(beside))
        return all(_same(attribute(block, name), value) for name, value in read)


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
    original = _symbolic_trace._orig_module_getattr

    def look_up(module: nn.Module, name: str) -> Any:
        prefix, held = hidden.get(id(module), ("", {}))
        if name not in held:
            return original(module, name)
        reads.note(prefix + name, held[name], listening())
        return held[name]

    modules = {f"{path}." if path else "": module for path, module in block.named_modules()}
    try:
        for prefix, module in modules.items():
            hidden[id(module)] = prefix, _hide(module, prefix, reads)
        with mock.patch.object(_symbolic_trace, "_orig_module_getattr", look_up):
            yield
    finally:
        for module in modules.values():
            for name, value in hidden.get(id(module), ("", {}))[1].items():
                module.__dict__.setdefault(name, value)


def _hide(module: nn.Module, prefix: str, reads: Reads) -> dict[str, Any]:
    """Takes a module's plain attributes out of its sight; what cannot be hidden counts as read."""
    cls = type(module)
    plain = {name: value for name, value in module.__dict__.items() if isinstance(value, PLAIN)}
    asks = cls.__getattr__ is nn.Module.__getattr__ and cls.__getattribute__ is object.__getattribute__
    hidden = {}
    for name, value in plain.items():
        if asks and not hasattr(cls, name):
            hidden[name] = module.__dict__.pop(name)
        elif not name.startswith("_"):
            reads.note(prefix + name, value, own=True)
    return hidden
