"""The fx tracer of one block: its child modules are leaves, its arguments the recorded ones.

Every proxy (`_tracing.proxy`) carries the fake value that its node has on the recorded arguments. `len`,
unpacking, `isinstance` and Python control flow see what they would see in the real run, while sizes, indices
and arithmetic on them stay symbolic in the graph. Where control flow consumes a size, the trace is ``exact``:
it holds for these shapes only, and the splice makes another one when others arrive.

Executing each node on fake values (`_tracing.runner`) also tells what fx alone cannot: which tensors a node
writes to in place (their version counters move), which values share storage, how many FLOPs a node costs,
whether it draws random numbers.
"""

import builtins
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import noop_context_fn

from surgeon._text import first_line
from surgeon._tracing.blame import asks_numbers, is_internal
from surgeon._tracing.canonical import canonical
from surgeon._tracing.children import Below
from surgeon._tracing.facts import Fact, numbers_asked
from surgeon._tracing.given import Given, argument_names
from surgeon._tracing.guards import global_state, line
from surgeon._tracing.leaves import Mode, checkpointed, inside, run
from surgeon._tracing.nests import alike, parts, tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.proxy import ValueProxy, isinstance_, sees
from surgeon._tracing.reads import Reads, noted
from surgeon._tracing.record import Call
from surgeon._tracing.runner import DRAWS, Runner
from surgeon._tracing.state import CONSTANTS, PLAIN, attribute, draws
from surgeon.errors import TraceError


class BlockTracer(fx.Tracer):
    """An fx tracer of one module: children are leaves (but for some), arguments are the recorded ones."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        block: nn.Module,
        log: OpLog,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        replays: Mapping[nn.Module, list[Call]],
        reads: Reads,
        below: Below,
    ) -> None:
        super().__init__()
        self._below, self.reads = below, reads
        self.log, self.args, self.kwargs = log, args, kwargs
        self.runner = Runner(block, log, replays, below)
        self.facts = self.runner.facts
        self.exact = False
        self.ambient = False
        self.given = Given(self.facts)
        self.proxies: dict[fx.Node, ValueProxy] = {}
        self._listening, self._thread = False, threading.get_ident()
        self._around = global_state()
        self.regions: list[tuple[tuple[Mode, ...], tuple[bool, ...]]] = []  # that the forward is in
        self.made: list[nn.Module] = []  # by the forward

    @property
    def here(self) -> bool:
        """Whether this is the thread of the trace; others meet the patches, too."""
        return threading.get_ident() == self._thread

    @property
    def listening(self) -> bool:
        """Whether the traced code itself is running."""
        return self._listening and self.here

    @listening.setter
    def listening(self, on: bool) -> None:
        self._listening = on

    def trace_forward(self, root: nn.Module, forward: Callable[..., Any]) -> fx.Graph:
        """The graph of ``forward(root, ...)``."""
        self.root, self._forward = root, forward
        return super().trace(root)

    def pin(self, proxy: ValueProxy) -> Any:
        """The value of ``proxy`` for use in Python; the trace then holds for this value only."""
        self.exact = True
        self.given.decides(proxy.node)
        return proxy.__dict__["value"]

    def answer(self, proxy: ValueProxy, ask: Callable[[Any], Any]) -> Any:
        """What Python learns of the value of ``proxy`` when it asks for a number, a flag, an item."""
        value = self.pin(proxy)
        with self.deaf():
            try:
                return ask(value)
            except Exception as error:
                if asks_numbers(error):
                    raise TraceError(numbers_asked(self.facts, proxy.node, ())) from error
                raise

    def create_args_for_root(self, _root_fn: Any, _is_module: bool, _concrete_args: Any = None) -> Any:
        names = argument_names(self._forward, self.args, self.kwargs)
        values = [*self.args, *self.kwargs.values()]
        given = [self._placeholder(*one) for one in zip(range(len(names)), names, values, strict=True)]
        split = len(self.args)
        keywords = dict(zip(self.kwargs, given[split:], strict=True))

        def call() -> Any:
            with noted(self.root, self.reads, self):
                drawn = draws()
                self.listening, builtins.isinstance = True, sees
                try:
                    result = self._forward(self.root, *given[:split], **keywords)
                except TraceError:
                    raise
                except Exception as error:
                    if is_internal(error):
                        raise
                    raise TraceError(f"{type(error).__name__}: {first_line(error)}") from error
                finally:
                    self.listening, builtins.isinstance = False, isinstance_
            if draws() != drawn:
                raise TraceError(DRAWS)
            return result

        return call, []

    def _placeholder(self, place: int, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {})
        self.given.argument(node, place)
        active = any(self.log.active(t) for t in tensors(value))
        self.facts[node] = Fact(value, frozenset(), frozenset(), (), active)
        # Optional and flag arguments decide which code runs: the forward must see the value itself.
        return value if isinstance(value, CONSTANTS) else self._wrap(node, value)

    def _wrap(self, node: fx.Node, value: Any) -> "ValueProxy":
        self.proxies[node] = proxy = ValueProxy(node, self, value)
        return proxy

    def proxy_of(self, node: fx.Node) -> "ValueProxy":
        """The proxy that was made for ``node``."""
        return self.proxies[node]

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        if global_state() != self.state:
            raise TraceError(f"part of its forward runs under its own autocast or grad mode{line()}")
        return super().create_node(kind, target, args, kwargs, *rest, **more)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if (made_of := parts(a)) is not None:
            return self._made_anew(a, *made_of)
        known = not isinstance(a, Tensor) or isinstance(a, nn.Parameter) or a in self.tensor_attrs
        if not known and not any(a is b for b in self.root.buffers()):
            raise TraceError("its forward uses a tensor that is no parameter, buffer or attribute")
        try:
            made = super().create_arg(a)
        except NotImplementedError as error:
            raise TraceError(f"its forward hands on a value that a graph cannot hold: {error}") from error
        if isinstance(made, fx.Node) and made not in self.facts:  # no attribute access handed it out
            with self.deaf():
                self._wrap(made, self.runner.run(made))
        return made

    def _made_anew(self, nest: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """The node in which the class of a nest makes another one like it."""
        with suppress(TypeError):  # its class may take something else
            made: ValueProxy = self._emit("call_function", type(nest), args, kwargs)
            if alike(made.__dict__["value"], nest):
                return made.node
        raise TraceError(f"its forward hands on a {type(nest).__name__}, which is not made of what it holds")

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        with self.deaf():
            if kind == "call_function" or (kind == "call_method" and _is_tensor(args[0])):
                same = canonical(lambda f, a: self._emit("call_function", f, a, {}), target, args, kwargs)
                if same is not None:
                    return same
            return self._emit(kind, target, args, kwargs)

    def _emit(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        kind, target = self._in_regions(kind, target, args)
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        try:
            value = self.runner.run(node)
        except Exception:  # the forward may catch it: which way it goes then hangs on these shapes
            self.exact = True
            self.graph.erase_node(node)
            raise
        part = self.given.takes(node)
        # The forward must see None itself, and flags that came in inside a nest of arguments.
        if part and isinstance(value, CONSTANTS):
            return value
        if value is None:
            self.given.decides(node)
            return None
        return self._wrap(node, value)

    def stealthy(self) -> bool:
        """Whether gradients are off that the forward has not turned off itself."""
        with self.deaf():
            return not torch.is_grad_enabled() and (self.state[0] or not self._around[0])

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What the forward has turned on and off around it."""
        return self.regions[-1][0] if self.regions else ()

    @property
    def state(self) -> tuple[bool, ...]:
        """What of that is on there: gradients, autocast."""
        return self.regions[-1][1] if self.regions else self._around

    def _in_regions(self, kind: str, target: Any, args: Any) -> tuple[str, Any]:
        """What is to be called in the grad and autocast regions that the forward is in, if any."""
        picks = target is getattr or (target is operator.getitem and not _is_tensor(args[0]))
        placed = target if picks or kind == "get_attr" else inside(target, self.modes)
        return (kind, target) if placed is target else ("call_function", placed)

    def checkpointed(self, function: Any, args: Any, kwargs: Any, options: Any) -> Any:
        """A checkpointed child of the block, or a method of its or a child's, as a leaf."""
        owner = getattr(function, "__self__", function)
        try:
            path = self.path_of_module(owner) if owner is not self.root else ""
        except NameError:
            path = None
        name = getattr(function, "__name__", "") if owner is not function else ""
        if path is None or (name and getattr(owner, name, None) != function):
            raise TraceError(f"its forward gives torch.utils.checkpoint a function of its own{line()}")
        given = {key: value for key, value in options.items() if isinstance(value, PLAIN)}
        if options.get("context_fn", noop_context_fn) is not noop_context_fn:
            raise TraceError(f"its forward gives torch.utils.checkpoint contexts of its own{line()}")
        held = self._held(".".join(filter(None, (path, name))))
        with self.deaf():
            return self._emit("call_function", checkpointed, (held, given, *args), kwargs)

    def _held(self, path: str) -> ValueProxy:
        """A child, or a method of one, as a value."""
        with self.deaf():
            node = self.create_node("get_attr", path, (), {})
            return self._wrap(node, self.runner.run(node))

    def requires_grad(self, proxy: ValueProxy) -> bool:
        """Whether a tensor that was there before the forward requires a gradient; noted."""
        node = proxy.node
        if node.op == "get_attr":
            with self.deaf():
                asks = bool(attribute(self.root, str(node.target)).requires_grad)
            self.reads.note(f"{node.target}.requires_grad", asks, own=True)
            return asks
        if not self.given.asked(node, "requires_grad"):
            raise TraceError("its forward asks whether a value of its own requires a gradient")
        return bool(proxy.__dict__["value"].requires_grad)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Inside, torch calls and module calls are surgeon's own, not the forward's."""
        listening, self.listening = self.listening, False
        # All of PyTorch's own Python runs in here, and should ask the built-in itself.
        sight, builtins.isinstance = builtins.isinstance, isinstance_
        try:
            yield
        finally:
            self.listening, builtins.isinstance = listening, sight

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.listening:  # a child of a leaf, running on fake values
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:
            if any(m is one for one in self.made) and not any(m.state_dict(keep_vars=True)):
                return forward(*args, **kwargs)
            kept = " and has weights" if any(True for _ in m.parameters()) else ""
            raise TraceError(
                f"its forward calls a {type(m).__name__} that is not its submodule{kept}{line()}"
            ) from None
        if path in self._below.opened:
            return forward(*args, **kwargs)
        if self.modes:
            return self.create_proxy("call_function", run, (self._held(path), *args), kwargs)
        return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self.listening:
            return attr_val
        with self.deaf():
            return super().getattr(attr, attr_val, parameter_proxy_cache)


def _is_tensor(given: Any) -> bool:
    return isinstance(given.__dict__["value"] if type(given) is ValueProxy else given, Tensor)
