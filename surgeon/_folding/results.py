"""Every tensor in what a model returns."""

import collections
import enum
import functools
import numbers
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from surgeon._torch import pytree
from surgeon.errors import FoldError

_ATOMS = (
    *(type(None), type(...), type(NotImplemented), str, bytes, bytearray, numbers.Number, enum.Enum, type),
    *(range, slice, types.ModuleType, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.Generator),
)
"""What holds no tensor."""
_CONTAINERS = (list, tuple, set, frozenset, collections.deque)
_CLOSED = (types.FunctionType, types.MethodType, types.GeneratorType, functools.partial, Iterator)
"""What may hold tensors where nobody can see them."""


def tensors_in(result: Any, seen: dict[int, Any] | None = None) -> Iterator[Tensor]:
    """Every tensor of a model's result, through containers, dataclasses, attributes and slots.

    Raises:
        FoldError: The result holds an object that cannot be looked into.
    """
    seen = {} if seen is None else seen
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif not isinstance(leaf, _ATOMS) and id(leaf) not in seen:
            seen[id(leaf)] = leaf
            for part in _parts(leaf):
                yield from tensors_in(part, seen)


def _parts(held: Any) -> list[Any]:
    """What an object holds."""
    found: list[Any] = []
    if isinstance(held, Mapping):
        found += [*held.keys(), *held.values()]
    elif isinstance(held, _CONTAINERS):
        found += held
    names = [name for cls in type(held).__mro__ for name in _slots(cls)]
    open_ = bool(names) or hasattr(held, "__dict__") or isinstance(held, (*_CONTAINERS, Mapping))
    if not open_ or isinstance(held, _CLOSED):
        raise FoldError(
            f"the model returns a {type(held).__name__}, in which there may be tensors that cannot be seen; "
            "return tensors in containers, dataclasses or plain objects"
        )
    found += [getattr(held, name) for name in dict.fromkeys(names) if hasattr(held, name)]
    return [*found, *getattr(held, "__dict__", {}).values()]


def _slots(cls: type) -> list[str]:
    slots = cls.__dict__.get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [
        f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    ]
