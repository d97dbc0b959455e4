"""What a traced forward leaves behind that no graph holds: values kept elsewhere."""

import gc
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn

from surgeon._tracing.proxy import ValueProxy
from surgeon._tracing.state import PLAIN, held_by


def kept(block: nn.Module) -> str:
    """Where the traced code left a value of its own on the block or a child; ``""`` if nowhere."""
    for path, module in block.named_modules():
        for name, value in module.__dict__.items():
            nest = isinstance(value, (list, dict, set))
            if any(type(item) is ValueProxy for item in (_shallow(value) if nest else [value])):
                inner = name in ("_buffers", "_parameters")
                names = [key for key, item in value.items() if type(item) is ValueProxy] if inner else [name]
                return ".".join(part for part in (path, *names[:1]) if part)
    return ""


def _shallow(nest: Any) -> list[Any]:
    return [part for item in nest.items() for part in item] if isinstance(nest, dict) else list(nest)


def held_elsewhere(proxies: Mapping[fx.Node, ValueProxy]) -> str:
    """The type of what holds one of ``proxies``, that dict aside; ``""`` if nothing does.

    A forward that appends to a list of its file, say, would have done so in the trace alone.
    """
    if not _held(proxies):
        return ""
    gc.collect()  # what refers to itself may linger
    suspects = _held(proxies)
    holders = gc.get_referrers(*suspects) if suspects else []
    others = [h for h in holders if h is not suspects and h is not proxies and not isinstance(h, FrameType)]
    return type(others[0]).__name__ if others else ""


def _held(proxies: Mapping[fx.Node, ValueProxy]) -> list[ValueProxy]:
    (usual,) = [sys.getrefcount(one) for one in {None: object()}.values()]
    # Those of weights are also in a table of fx's own, which lingers.
    return [one for one in proxies.values() if sys.getrefcount(one) > usual and one.node.op != "get_attr"]


def contents(value: Any, *, deep: bool) -> list[Any]:
    """What a nest holds, names and values; if ``deep``, with what they hold, and what an object holds too."""
    if not deep:
        return _shallow(value)
    found: list[Any] = []
    _collect(value, found, set())
    return found


def _collect(value: Any, found: list[Any], seen: set[int]) -> None:
    if isinstance(value, (Tensor, nn.Module, *PLAIN)) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    held = value if isinstance(value, Mapping) else held_by(value)
    items = list(value) if isinstance(value, (list, tuple, set)) else [*held, *held.values()]
    found += items
    for item in items:
        _collect(item, found, seen)


def same_items(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
