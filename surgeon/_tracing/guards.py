"""What a graph cannot hold is noticed while a block is traced, and what the forward asks of torch is noted.

Grad and autocast regions, gradient checkpoints and `torch.autograd.Function` act outside of the calls that fx
sees. Inside `guarded` their entry points answer to the tracer: a region of its own stops the trace, an
autograd function becomes a leaf, and so does a function that keeps its results (`functools.lru_cache`); a
tensor factory becomes a node whatever its sizes are, a question about the ambient mode makes the trace hold
for that mode only.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, fx, nn

from surgeon._torch import CHECKPOINTS, pytree
from surgeon._tracing.nests import tensors
from surgeon._tracing.outside import cached_functions
from surgeon._tracing.state import PLAIN
from surgeon.errors import TraceError


class Listener(Protocol):
    """What the guards need of a tracer."""

    listening: bool
    ambient: bool

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...


_REGIONS = (
    (torch.amp.autocast_mode.autocast, "autocast"),
    (torch.no_grad, "grad mode"),
    (torch.enable_grad, "grad mode"),
    (torch.set_grad_enabled, "grad mode"),
    (torch.inference_mode, "grad mode"),
)
# Their C parsers refuse a proxy as a size before any override of theirs is asked.
_FACTORIES = (
    *(
        "arange",
        "empty",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
    ),
    *("scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
    *("finfo", "iinfo"),
)
_QUESTIONS = (
    *("is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"),
    *("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"),
)


@contextmanager
def guarded(tracer: Listener, block: nn.Module) -> Iterator[None]:
    """Inside, the forward of ``block`` cannot slip a region or a function past the tracer.

    Raises:
        TraceError: From within, when the forward opens a grad or autocast region or a checkpoint.
    """
    with ExitStack() as stack:
        for cls, what in _REGIONS:
            stack.enter_context(mock.patch.object(cls, "__enter__", _refusing(tracer, cls.__enter__, what)))
        for name in _QUESTIONS:
            stack.enter_context(mock.patch.object(torch, name, _noting(tracer, getattr(torch, name))))
        asks = _stopping(tracer, torch.is_inference_mode_enabled, "its forward asks for the inference mode")
        stack.enter_context(
            mock.patch.object(torch, "is_inference_mode_enabled", asks)
        )  # no trace runs in it
        for name in _FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, _factory(tracer, getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", _leaf(tracer)))
        for owner, name in CHECKPOINTS:
            stopped = _stopping(tracer, getattr(owner, name), "its forward calls torch.utils.checkpoint")
            stack.enter_context(mock.patch.object(owner, name, stopped))
        stack.enter_context(mock.patch.object(torch.jit.ScriptFunction, "__call__", _scripted(tracer)))
        for function, put in cached_functions(block):
            put(_cached(tracer, function))
            stack.callback(put, function)
        yield


def _refusing(tracer: Listener, enter: Callable[[Any], Any], what: str) -> Callable[[Any], Any]:
    def guard(region: Any) -> Any:
        if tracer.listening:
            raise TraceError(f"part of its forward runs under its own {what}")
        return enter(region)

    return guard


def _noting(tracer: Listener, question: Callable[..., Any]) -> Callable[..., Any]:
    def guard(*args: Any) -> Any:
        tracer.ambient |= tracer.listening
        return question(*[a.__dict__["value"] if isinstance(a, fx.Proxy) else a for a in args])

    return guard


def _factory(tracer: Listener, factory: Callable[..., Any]) -> Callable[..., Any]:
    def guard(*args: Any, **kwargs: Any) -> Any:
        if tracer.listening:
            return tracer.create_proxy("call_function", factory, args, kwargs)
        return factory(*args, **kwargs)

    return guard


def _stopping(tracer: Listener, function: Callable[..., Any], why: str) -> Callable[..., Any]:
    def guard(*args: Any, **kwargs: Any) -> Any:
        if tracer.listening:
            raise TraceError(why)
        return function(*args, **kwargs)

    return guard


def _leaf(tracer: Listener) -> Any:
    original = torch.autograd.Function.__dict__["apply"]

    def guard(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracer.listening or not any(isinstance(a, fx.Proxy) for a in args):
            return original.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", _caller(cls), args, kwargs)

    return classmethod(guard)


def _cached(tracer: Listener, function: Any) -> Any:
    """A leaf where a graph can hold its arguments, as it must keep what runs give it, not what traces do."""

    @functools.wraps(function)
    def guard(*args: Any, **kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        if not tracer.listening or not all(isinstance(a, (fx.Proxy, Tensor, *PLAIN)) for a in given):
            return function(*args, **kwargs)
        made = tracer.create_proxy("call_function", function, args, kwargs)
        value = made.__dict__["value"] if isinstance(made, fx.Proxy) else made
        # Numbers that follow from constants alone may decide which way the forward goes.
        return made if tensors(value) or any(isinstance(a, fx.Proxy) for a in given) else value

    return guard


def _scripted(tracer: Listener) -> Any:
    original = torch.jit.ScriptFunction.__call__

    def guard(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracer.listening:
            return original(function, *args, **kwargs)

        def run(*given: Any, **named: Any) -> Any:
            return function(*given, **named)

        run.__name__ = run.__qualname__ = function.name
        return tracer.create_proxy("call_function", run, args, kwargs)

    return guard


@functools.cache
def _caller(cls: Any) -> Callable[..., Any]:
    """``cls.apply`` as a function that generated code can name."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = cls.__name__
    return apply
