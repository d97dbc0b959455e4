"""What a graph cannot hold is noticed while a block is traced, and what the forward asks of torch is noted.

Grad and autocast regions, gradient checkpoints and `torch.autograd.Function` act outside of the calls that fx
sees. Inside `guarded` their entry points answer to the tracer: what runs in a grad region of its own is put
down so (`under`), an autocast region stops the trace; an autograd function becomes a leaf by whatever name it
is applied, and so do a checkpointed child or method and a function that keeps its results
(`functools.lru_cache`); a tensor factory becomes a node whatever its sizes are, a question about the ambient
mode makes the trace hold for that mode only. Modules that the forward makes are noted.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from surgeon._torch import CHECK, CHECKPOINT, UNWRAPPED, checkpoint_call, checkpoint_itself, pytree
from surgeon._tracing.leaves import Mode, applying
from surgeon._tracing.nests import tensors
from surgeon._tracing.outside import cached_functions
from surgeon._tracing.state import PLAIN
from surgeon._tracing.undisturbed import replaced
from surgeon.errors import TraceError


class Listener(Protocol):
    """What the guards need of a tracer."""

    listening: bool
    ambient: bool
    regions: list[tuple[tuple[Mode, ...], tuple[bool, ...]]]
    made: list[nn.Module]

    @property
    def modes(self) -> tuple[Mode, ...]: ...

    @property
    def state(self) -> tuple[bool, ...]: ...

    def stealthy(self) -> bool: ...

    def deaf(self) -> AbstractContextManager[None]: ...

    def checkpointed(self, function: Any, args: Any, kwargs: Any, options: Any) -> Any: ...

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...


_REGIONS = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.amp.autocast_mode.autocast)
_INFERENCE = "part of its forward runs under its own inference mode"
_UNBOUND = ("add", "add_", "sub", "sub_")  # torch.Tensor.add(a, b) takes no proxy
# Their C parsers refuse a proxy as a size before any override of theirs is asked.
_FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"),
    *("randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "finfo", "iinfo"),
)
_QUESTIONS = (
    *("is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"),
    *("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"),
)


@contextmanager
def guarded(tracer: Listener, block: nn.Module) -> Iterator[None]:
    """Inside, the forward of ``block`` cannot slip a region or a function past the tracer.

    Raises:
        TraceError: From within, when the forward opens an autocast region, say, or checkpoints a function
            of its own.
    """
    asks = "its forward asks for the inference mode"  # no trace runs in it
    changes: list[tuple[Any, str, Any]] = [
        *((cls, "__enter__", _entering(tracer, cls.__enter__)) for cls in _REGIONS),
        *((cls, "__exit__", _leaving(tracer, cls.__exit__)) for cls in _REGIONS),
        (torch.inference_mode, "__enter__", _refusing(tracer, torch.inference_mode.__enter__, _INFERENCE)),
        *((torch, name, _noting(tracer, getattr(torch, name))) for name in _QUESTIONS),
        (torch, "is_inference_mode_enabled", _refusing(tracer, torch.is_inference_mode_enabled, asks)),
        *((torch, name, _factory(tracer, getattr(torch, name))) for name in _FACTORIES),
        (*CHECK, _checking(tracer, getattr(*CHECK))),
        (type(torch.autograd.Function), "__getattribute__", _looking_up(tracer)),
        (nn.Module, "__init__", _making(tracer)),
        *((Tensor, name, _unbound(tracer, name)) for name in _UNBOUND),
        (torch.jit.ScriptFunction, "__call__", _scripted(tracer)),
        (*CHECKPOINT, _checkpointing(tracer)),
        *((owner, name, _answering(tracer, getattr(owner, name), tuple)) for owner, name in UNWRAPPED),
    ]
    with replaced(*changes), ExitStack() as stack:
        for function, put in cached_functions(block):
            put(_cached(tracer, function))
            stack.callback(put, function)
        yield


def _answering(tracer: Listener, original: Callable[..., Any], answer: Callable[..., Any]) -> Any:
    """The original; but the traced code itself gets the answer."""

    def guard(*args: Any, **kwargs: Any) -> Any:
        return (answer if tracer.listening else original)(*args, **kwargs)

    return guard


def _refusing(tracer: Listener, original: Callable[..., Any], why: str) -> Any:
    def answer(*_: Any, **__: Any) -> Any:
        raise TraceError(f"{why}{line()}")

    return _answering(tracer, original, answer)


def _checking(tracer: Listener, check: Callable[..., Any]) -> Any:
    def answer(error: type[Exception], condition: Any, message: Any = None) -> None:
        check(error, bool(condition), message)

    return _answering(tracer, check, answer)


def _factory(tracer: Listener, factory: Callable[..., Any]) -> Any:
    def answer(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_function", factory, args, kwargs)

    return _answering(tracer, factory, answer)


def _checkpointing(tracer: Listener) -> Any:
    def answer(*args: Any, **kwargs: Any) -> Any:
        return tracer.checkpointed(*checkpoint_call(args, kwargs))

    return _answering(tracer, checkpoint_itself, answer)


def _scripted(tracer: Listener) -> Any:
    def answer(function: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            return function(*given, **named)

        run.__name__ = run.__qualname__ = function.name
        return tracer.create_proxy("call_function", run, args, kwargs)

    return _answering(tracer, torch.jit.ScriptFunction.__call__, answer)


def _entering(tracer: Listener, enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def guard(region: Any) -> Any:
        if tracer.listening and (device := getattr(region, "device", "cpu")) not in _usable():
            # What is off here may be on where the model trains.
            raise TraceError(f"part of its forward runs under its own autocast for {device}{line()}")
        with tracer.deaf():
            entered = enter(region)
        if tracer.listening:
            with tracer.deaf():
                tracer.regions.append((_inside(tracer.modes, region), global_state()))
        return entered

    return guard


def _usable() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _inside(modes: tuple[Mode, ...], region: Any) -> tuple[Mode, ...]:
    """The modes in a region that was entered just now, from the outside in."""
    if isinstance(region, torch.amp.autocast_mode.autocast):
        device = region.device
        return *modes, (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    return *(mode for mode in modes if not isinstance(mode, bool)), torch.is_grad_enabled()


def global_state() -> tuple[bool, ...]:
    """Whether gradients are on, and autocast."""
    return (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))


def _leaving(tracer: Listener, leave: Callable[..., Any]) -> Callable[..., Any]:
    def guard(region: Any, *error: Any) -> Any:
        if tracer.listening and tracer.regions:
            tracer.regions.pop()
        with tracer.deaf():
            return leave(region, *error)

    return guard


def line() -> str:
    """Where in the user's own code the trace is, `` (model.py:12)``; ``""`` if that cannot be told."""
    frame = sys._getframe()
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    found: Any = frame
    while found is not None and found.f_code.co_filename.startswith(own):
        found = found.f_back
    return f" ({Path(found.f_code.co_filename).name}:{found.f_lineno})" if found is not None else ""


def _noting(tracer: Listener, question: Callable[..., Any]) -> Callable[..., Any]:
    def guard(*args: Any) -> Any:
        tracer.ambient |= tracer.listening
        return question(*[a.__dict__["value"] if isinstance(a, fx.Proxy) else a for a in args])

    return guard


def _looking_up(tracer: Listener) -> Callable[[Any, str], Any]:
    """Makes leaves of autograd functions, whose ``apply`` asks their class for ``forward``.

    ``op = MyFunction.apply`` may be bound to any name anywhere, so that another ``apply`` would not be met.
    """

    def look(cls: Any, name: str) -> Any:
        found = type.__getattribute__(cls, name)
        if name != "forward" or not tracer.listening or not tracer.stealthy():
            return found

        def forward(*args: Any) -> Any:
            given = args[1:] if args and isinstance(args[0], cls._backward_cls) else args
            if not tracer.listening or not any(isinstance(a, fx.Proxy) for a in given):
                return found(*args)
            with tracer.deaf(), torch.set_grad_enabled(tracer.state[0]):
                return tracer.create_proxy("call_function", applying(cls), given, {})

        return forward

    return look


def _making(tracer: Listener) -> Callable[..., None]:
    init = nn.Module.__init__

    def guard(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(module, *args, **kwargs)
        if tracer.listening:
            tracer.made.append(module)

    return guard


def _unbound(tracer: Listener, name: str) -> Any:
    original = getattr(Tensor, name)

    @functools.wraps(original)
    def guard(*args: Any, **kwargs: Any) -> Any:
        if tracer.listening and args and isinstance(args[0], fx.Proxy):
            return tracer.create_proxy("call_method", name, args, kwargs)
        return original(*args, **kwargs)

    guard.is_method = True  # type: ignore[attr-defined]
    return guard


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
