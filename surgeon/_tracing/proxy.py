"""The proxy that stands for a value while a block is traced, and knows the value.

Python asks it for a length, a truth value, its items or its class, and gets what the recorded value would
answer. Whoever asks for a number *pins* it: the trace then holds for that number only.
"""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from surgeon._tracing.facts import Facts, counts_pieces, made_here
from surgeon._tracing.state import PLAIN
from surgeon.errors import TraceError


class Tracer(Protocol):
    """What proxies need of the tracer that made them."""

    create_proxy: Callable[..., Any]
    given: Any
    facts: Facts

    def pin(self, proxy: "ValueProxy") -> Any:
        """The value of ``proxy``, for which alone the trace holds then."""

    def answer(self, proxy: "ValueProxy", ask: Callable[[Any], Any]) -> Any:
        """What Python learns of that value."""

    def requires_grad(self, proxy: "ValueProxy") -> bool:
        """Whether a tensor requires a gradient."""

    def deaf(self) -> AbstractContextManager[None]:
        """Inside, calls are surgeon's own."""


class ValueProxy(fx.Proxy):
    """An fx proxy that knows its node's value on the recorded arguments."""

    def __init__(self, node: fx.Node, tracer: Any, value: Any) -> None:
        super().__init__(node, tracer)
        self.__dict__["value"] = value

    tracer: Tracer  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        tracer, value = self.tracer, self.__dict__["value"]
        if isinstance(value, Tensor):
            if name == "ndim":
                return value.ndim
            if name == "requires_grad":
                return tracer.requires_grad(self)
            if name in _UNKNOWN:
                raise TraceError(f"its forward asks for the {name} of a tensor")
        with tracer.deaf():
            try:
                is_method = callable(getattr(value, name))
            except AttributeError:
                tracer.given.asked(self.node, name)
                raise
        if not is_method:
            return tracer.create_proxy("call_function", getattr, (self, name), {})

        def method(*args: Any, **kwargs: Any) -> Any:
            if name == "dim" and isinstance(value, Tensor):
                return value.ndim
            return tracer.create_proxy("call_method", name, (self, *args), kwargs)

        return method

    def __bool__(self) -> bool:
        return bool(self.tracer.answer(self, bool))

    def __len__(self) -> int:
        value = self.__dict__["value"]
        return int(self.tracer.pin(self).shape[0]) if isinstance(value, Tensor) else len(value)

    def __index__(self) -> int:
        return int(self.tracer.answer(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.answer(self, int))

    def __float__(self) -> float:
        return float(self.tracer.answer(self, float))

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    def __hash__(self) -> int:
        # A size that is the key of a cache would stay there, with what was traced for it.
        value = self.__dict__["value"]
        if isinstance(value, (torch.dtype, torch.device)):
            return hash(self.tracer.pin(self))
        if isinstance(value, Tensor) or getattr(type(value), "__hash__", None) is object.__hash__:
            return id(self)
        raise TypeError(
            f"its forward looks something up by a value that only a run tells ({self._described()})"
        )

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.answer(self, lambda value: item in value))

    def __iter__(self) -> Iterator[Any]:
        value = self.__dict__["value"]
        if isinstance(value, dict):
            return iter(value)
        if not hasattr(value, "__getitem__"):  # a view of a dict
            return iter(self.tracer.create_proxy("call_function", list, (self,), {}))
        if counts_pieces(self.tracer.facts, self.node):
            self.tracer.pin(self)
        return iter([operator.getitem(self, i) for i in range(len(self))])

    def keys(self) -> Any:
        """The keys of a dict value, so that ``**proxy`` works."""
        return self.__dict__["value"].keys()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("tracer", "node"):  # fx's own
            return super().__setattr__(name, value)
        if isinstance(value, PLAIN) and made_here(self.tracer.facts, self.node):
            # No tensor comes to depend on it, so that the order of the lines is all there is to keep.
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})
            return None
        raise TraceError(f"its forward assigns the attribute {name} of a {self._described()}")

    def __delattr__(self, name: str) -> None:
        raise TraceError(f"its forward deletes the attribute {name} of a {self._described()}")

    def __delitem__(self, key: Any) -> None:
        raise TraceError(f"its forward deletes an entry of a {self._described()}")

    def _described(self) -> str:
        return type(self.__dict__["value"]).__name__

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


# What no fake tensor knows.
_UNKNOWN = ("grad", "grad_fn", "is_leaf", "retains_grad")

isinstance_ = isinstance


def sees(thing: Any, kinds: Any) -> bool:
    """An ``isinstance`` that sees in a proxy what it stands for too, for the traced code alone.

    A ``__class__`` of the proxy's would do that, and crash the process: PyTorch's parsers take such a proxy
    for a tensor in memory wherever they try a number in a tensor's place, as for ``torch.pow(x, 2)``.
    """
    if isinstance_(thing, kinds):
        return True
    if type(thing) is not ValueProxy:
        return False
    value = thing.__dict__["value"]
    return issubclass(Tensor if isinstance_(value, Tensor) else type(value), kinds)


def _in_place(symbol: str) -> Callable[[ValueProxy, Any], Any]:
    """The augmented assignment ``symbol`` (``"iadd"``): in place on tensors, as Python does, else not."""

    def method(self: ValueProxy, other: Any) -> Any:
        name = symbol if isinstance(self.__dict__["value"], Tensor) else symbol[1:]
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _symbol in ("iadd", "isub", "imul", "itruediv"):
    setattr(ValueProxy, f"__{_symbol}__", _in_place(_symbol))
