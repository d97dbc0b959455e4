"""Functions that stand in a graph for what runs in a grad region, a checkpoint or an autograd function."""

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def under(target: Any, mode: bool) -> Any:
    """A function, or a tensor's method, that runs with gradients on or off whatever is on around it.

    Its ``plain`` is ``target``, its ``mode`` is ``mode``.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(mode):
            return called(target, args, kwargs)

    name = target if isinstance(target, str) else getattr(target, "__name__", "call")
    call.__name__ = call.__qualname__ = f"{name.strip('_')}_{'with' if mode else 'without'}_grad"
    call.plain, call.mode = target, mode  # type: ignore[attr-defined]
    return call


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
