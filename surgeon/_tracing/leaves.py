"""Functions that stand in a graph for what runs in a grad region, a checkpoint or an autograd function."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

Mode = bool | tuple[str, torch.dtype, bool]
"""Whether gradients are on, or the autocast of one type of device: its number type, whether it is on."""


@functools.cache
def under(target: Any, mode: Mode) -> Any:
    """A function, or a tensor's method, that runs with gradients or autocast on or off, whatever is around.

    Its ``plain`` is the function alone; its ``mode`` tells whether gradients are on.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(mode) if isinstance(mode, bool) else torch.autocast(*mode):
            return called(target, args, kwargs)

    name = target if isinstance(target, str) else getattr(target, "__name__", "call")
    how = ("_with_grad" if mode else "_without_grad") if isinstance(mode, bool) else "_cast"
    call.__name__ = call.__qualname__ = f"{name.strip('_')}{how}"
    call.plain = getattr(target, "plain", target)  # type: ignore[attr-defined]
    call.mode = mode if isinstance(mode, bool) else getattr(target, "mode", True)  # type: ignore[attr-defined]
    return call


def inside(target: Any, modes: Sequence[Mode]) -> Any:
    """What is to be called in some modes, from the outside in."""
    if target in _UNCAST and not any(isinstance(mode, bool) for mode in modes):
        return target
    for mode in reversed(modes):
        target = under(target, mode)
    return target


# What autocast leaves alone; other rooms know these by their names.
_UNCAST = {operator.add, operator.iadd, operator.mul, operator.imul, operator.truediv, operator.itruediv}


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a child that a graph holds as a value."""
    return function(*args, **kwargs)


def called(target: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function, or by its name a method of the first argument."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def checkpointed(function: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint(function, *args, **options, **kwargs)``."""
    return torch.utils.checkpoint.checkpoint(function, *args, **options, **kwargs)


@functools.cache
def applying(cls: Any) -> Callable[..., Any]:
    """``cls.apply`` as a function that generated code can name."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = cls.__name__
    return apply
