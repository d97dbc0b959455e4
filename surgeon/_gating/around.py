"""Forwards that were put on a gated block: methods of it, or what stands around its own forward."""

import functools
import threading
import types
from typing import Any

import torch
from torch import nn

from surgeon.errors import UnseenCallError


class _Running(threading.local):
    """The blocks that run a forward put on them, on this thread, and whether that has come to the gates."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []


_running = _Running()


def method_behind(block: nn.Module, forward: Any) -> Any:
    """The function behind a forward put on a block, to be called with it; None if it is no method of it."""
    if isinstance(forward, types.MethodType) and forward.__self__ is block:
        return forward.__func__
    if not isinstance(forward, functools.partial) or forward.keywords or forward.args != (block,):
        return None
    function = forward.func
    return function if getattr(type(block), getattr(function, "__name__", ""), None) is function else None


def inside(block: nn.Module) -> bool:
    """Whether the forward that was put on ``block`` has called the gated one."""
    if torch.compiler.is_compiling():
        return True
    calls = [call for call in _running.calls if call[0] is block]
    for call in calls:
        call[1] = True
    return bool(calls)


def run_around(
    block: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gated: str
) -> Any:
    """Runs a forward that is no method of the block: it has to call the gated one, as accelerate's hooks do.

    Args:
        block: The block.
        forward: What was put on it.
        args: Positional arguments.
        kwargs: Keyword arguments.
        gated: The block's name for the message; ``""`` where its gates have nothing to do.

    Raises:
        UnseenCallError: It did not, where the gates have something to do.
    """
    call = [block, False]
    _running.calls.append(call)
    try:
        result = forward(*args, **kwargs)
    finally:
        _running.calls.pop()
    if gated and not call[1]:
        raise UnseenCallError(
            f"{gated}: its forward was replaced on the instance after surgeon.apply, and what stands there "
            "does not come to its gates. Take them out before (surgeon.fold, surgeon.remove), or put a "
            "method of the block there"
        )
    return result
