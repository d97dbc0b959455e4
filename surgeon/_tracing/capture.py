"""Torch calls without a proxy among their arguments, which fx does not see."""

import operator
from typing import Any, Protocol

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Listener(Protocol):
    """What is needed of a tracer."""

    @property
    def listening(self) -> bool: ...

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...


class Capture(TorchFunctionMode):
    """Puts torch calls without a proxy among their arguments (factories, ops on weights) into the graph."""

    def __init__(self, tracer: Listener) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.tracer.listening or name in _SETS:
            return func(*args, **kwargs)
        if (isinstance(func, _METHODS) or hasattr(func, "is_method")) and not name.startswith("__"):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", _operator(func, name), args, kwargs)


_SETS = ("__get__", "__set__", "_set_grad_enabled")  # no call that a graph could repeat in its place
_METHODS = (type(Tensor.add), type(Tensor.__add__))


def _operator(func: Any, name: str) -> Any:
    """Tensor dunders as the ``operator`` functions that generated code can name."""
    plain = name.strip("_")
    if name.startswith("__") and isinstance(func, (*_METHODS, type(Tensor.__radd__))):
        if plain.startswith("r") and hasattr(operator, plain[1:]):
            return lambda a, b: getattr(operator, plain[1:])(b, a)
        if hasattr(operator, plain):
            return getattr(operator, plain)
    return func
