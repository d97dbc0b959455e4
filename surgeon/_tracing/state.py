"""What decides which code runs, in a form that can be compared: the plain parts of values, random numbers."""

import functools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Hashable, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import TraceError

CONSTANTS = (type(None), bool, str, Enum, torch.dtype, torch.device, torch.memory_format, torch.layout)
PLAIN = (*CONSTANTS, int, float)
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "sympy", "surgeon"}
ATOMS = frozenset({type(None), bool, str, int, float, torch.dtype, torch.device, torch.Size})


def is_library(module: str | None) -> bool:
    """Whether a module of that name is Python's, PyTorch's or surgeon's own: its state is its own affair."""
    return (module or "torch").split(".")[0] in _LIBRARIES


def kind(value: Any, exact: bool) -> Any:  # noqa: PLR0911 - one for each make of value
    """What of an argument decides which code runs, objects aside.

    Args:
        value: The argument.
        exact: Numbers count too, and of tensors the whole shape instead of the rank.
    """
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device.type) if exact else value.ndim
    if isinstance(value, CONSTANTS):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple([kind(getattr(value, f.name), exact) for f in fields(value)])
    if isinstance(value, (list, tuple)):
        return type(value), tuple([kind(item, exact) for item in value])
    if isinstance(value, dict):
        return dict, tuple([(name, kind(item, exact)) for name, item in value.items()])
    if isinstance(value, (set, frozenset, range)):
        return state(value)
    return value if exact and isinstance(value, (int, float)) else type(value)


def state(value: Any) -> Any:
    """The plain parts of anything, those of nests and objects included, numbers as well.

    A tensor counts by its rank, a module by its class, a function as itself.
    """
    made = type(value)
    if made in ATOMS or made is types.FunctionType or (made is tuple and ATOMS.issuperset(map(type, value))):
        return value  # as most are: at once
    return _state(value, ())


def _state(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return Tensor, value.ndim
    if isinstance(value, nn.Module):
        return _module(value, above)
    if isinstance(value, types.MethodType):  # before its identity, which is another at each access
        return value.__func__, _own_class(value.__self__)
    if id(value) in above:
        return "again", above.index(id(value))
    return _parts(value, (*above, id(value)))


def _module(value: nn.Module, above: tuple[int, ...]) -> Any:
    """A child's attributes are looked at by name; of a module in a nest all that are its own count."""
    if not above or id(value) in above:
        return _own_class(value)
    own = {n: v for n, v in vars(value).items() if n[0] != "_" and not isinstance(v, (Tensor, nn.Module))}
    inside = (*above, id(value))
    return _own_class(value), tuple([(name, _state(item, inside)) for name, item in own.items()])


def _own_class(value: Any) -> type:
    """The class of an object, gated or not."""
    return getattr(type(value), "_ungated", type(value))


def _parts(value: Any, above: tuple[int, ...]) -> Any:  # noqa: C901, PLR0911 - one for each make of value
    def each(items: Any) -> tuple[Any, ...]:
        found = tuple(items)
        # At once where there is nothing to take apart, as in a table of a thousand names.
        plain = ATOMS.issuperset(map(type, found))
        return found if plain else tuple([_state(item, above) for item in found])

    if isinstance(value, (list, tuple, deque)):
        return type(value), each(value)
    if isinstance(value, Mapping):
        return type(value), each(value), each(value.values())
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(each(value))
    if isinstance(value, functools.partial):
        return functools.partial, each((value.func, value.args, value.keywords))
    if isinstance(value, slice):
        return slice, each((value.start, value.stop, value.step))
    if isinstance(value, weakref.ref):
        return weakref.ref, each((value(),))
    if isinstance(value, ContextVar):
        return value, each((value.get(None),))
    if is_iterator(value):
        raise TraceError(f"a {type(value).__name__} decides what runs, which each call moves on")
    code = isinstance(value, (type, types.ModuleType)) or (
        callable(value) and is_library(type(value).__module__)
    )
    held = {} if code else held_by(value)
    if held:
        return type(value), each(held), each(held.values())
    return _opaque(value)


def _opaque(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return type(value), _numbers(value)
    return value  # a function, a class, an object that holds nothing: the very same one, or an equal one


def _numbers(value: Any) -> bytes:
    """What an array holds; nothing of what is none."""
    try:
        return bytes(memoryview(value))
    except TypeError:
        return b""


def is_iterator(value: Any) -> bool:
    """Whether values are taken from it, which then are gone."""
    return (
        type(value) not in ATOMS
        and hasattr(type(value), "__next__")
        and not isinstance(value, (nn.Module, Tensor))
    )


def draws_numbers(value: Any) -> bool:
    """Whether a value is a random number generator: what it draws, no state foretells."""
    known = isinstance(value, (random.Random, torch.Generator))
    return known or type(value).__module__.startswith("numpy.random")


def draws() -> tuple[Hashable, ...]:
    """Where Python's and NumPy's global random number generators are; they move when numbers are drawn."""
    numpy = sys.modules.get("numpy")
    state: tuple[Any, ...] = numpy.random.get_state(legacy=True) if numpy else ()
    return random.getstate(), *(part.tobytes() if hasattr(part, "tobytes") else part for part in state)


def attribute(block: nn.Module, name: str) -> Any:
    """The attribute of a dotted name (``"drop_path.drop_prob"``, of a class ``"@method"``); else ``None``."""
    found: Any = block
    for part in name.split("."):
        found = getattr(type(found), part[1:], None) if part[0] == "@" else getattr(found, part, None)
    return found


def held_by(value: Any) -> dict[str, Any]:
    """The attributes that an object itself holds, in slots too; empty if it cannot be looked into."""
    slots = [s for cls in type(value).__mro__ for s in _listed(cls.__dict__.get("__slots__", ()))]
    held = {name: getattr(value, name) for name in slots if name[:2] != "__" and hasattr(value, name)}
    return {**held, **getattr(value, "__dict__", {})}


def _listed(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def ambient() -> tuple[Any, ...]:
    """The modes that a forward may ask PyTorch for: gradients, and autocast by type of device."""
    casts = [(torch.is_autocast_enabled(one), torch.get_autocast_dtype(one)) for one in _DEVICES]
    return torch.is_grad_enabled(), *casts
