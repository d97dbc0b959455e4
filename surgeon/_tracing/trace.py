"""Traces one block's own ``forward`` into an fx graph, and refuses what a graph cannot hold."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from surgeon._tracing.capture import Capture
from surgeon._tracing.children import Below
from surgeon._tracing.facts import Trace, drop_unused
from surgeon._tracing.guards import guarded
from surgeon._tracing.key import Key
from surgeon._tracing.mentions import Mentions, mentions
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.reads import Reads
from surgeon._tracing.record import Call
from surgeon._tracing.state import attribute, state
from surgeon._tracing.tracer import BlockTracer
from surgeon._tracing.undisturbed import undisturbed
from surgeon.errors import TraceError

ONE_AT_A_TIME = threading.RLock()  # fx patches `nn.Module` itself, and puts back what it found there


def trace(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log: OpLog,
    replays: Mapping[nn.Module, list[Call]] | None = None,
    below: Below | None = None,
    forward: Any = None,
) -> Trace:
    """Traces ``block`` as called with ``args`` and ``kwargs``; the block is left as it was.

    Args:
        block: The module whose own forward is traced, in the mode (training or not) it is in.
        args: Positional arguments; tensors are fake ones of ``log``'s mode.
        kwargs: Keyword arguments, likewise.
        log: The operator log that knows which of them depend on a model input.
        replays: The recorded calls of its children in the same mode, whose results need no second run.
        below: The modules below it that are no plain leaves.
        forward: The function that it runs, to be called with the block; ``None`` for that of its class.

    Raises:
        TraceError: The forward does something that a graph cannot hold, named in the message.
    """
    if forward is None and "forward" in block.__dict__:
        raise TraceError("its forward was replaced on the instance")
    if isinstance(block, fx.GraphModule):
        raise TraceError(
            "torch.fx wrote its forward, and may write it anew; put the gates on the model it was made from"
        )
    _check_class(type(block))
    forward, below = forward or plain_forward(block), below or Below()
    with ONE_AT_A_TIME:
        found = _mentioned(block, forward, below)

        def run(*, again: bool = False) -> _Ran:
            def tracer() -> BlockTracer:
                return BlockTracer(block, log, args, kwargs, replays or {}, Reads(), below)

            return _run(block, forward, found, [tracer() for _ in range(1 + again)])

        ran = run()
        if ran.fills(found) and ran.alike(settled := run(again=True)) and not settled.changes:
            ran.changed.clear()
            ran.moved.clear()
    tracer, graph, reads = ran.tracer, ran.graph, ran.tracer.reads
    _check_steady(found, tracer, ran.changed, ran.left, ran.moved)
    parents = [f"{name}._modules" for name, module in reads.fetched.items() if module._modules]
    for name in (*found.attributes, *((*reads.fetched, *parents) if found.classes else ())):
        reads.note(name, attribute(block, name), own=True)
    for path in below.opened:
        reads.note(f"{path}.@forward", plain_forward(block.get_submodule(path)), own=True)
    reads.walked({str(node.target) for node in graph.nodes if node.op == "call_module"})
    drop_unused(graph, tracer.facts)
    # The block's own mode is part of every key.
    attributes = tuple(sorted(reads.own - {"training"}))
    key = Key(tracer.exact, tracer.ambient, attributes, tracer.given.read, found.variables)
    return Trace(graph, tracer.facts, key, reads, Below(below.opened, tracer.runner.stood))


@dataclass(slots=True)
class _Ran:
    """A forward that was traced, with the names of what it changed, kept and moved on."""

    tracer: BlockTracer
    graph: fx.Graph
    changed: list[str]
    left: list[str]
    moved: list[str]

    @property
    def changes(self) -> bool:
        return bool(self.changed or self.left or self.moved)

    def fills(self, found: Mentions) -> bool:
        """Whether all that it changed is another package's, which may note there what it has found out."""
        names = {*self.changed, *(name.partition(" ")[0] for name in self.moved)}
        return bool(names) and not self.left and names <= found.foreign

    def alike(self, other: "_Ran") -> bool:
        """Whether both run the same code."""
        codes = [ran.graph.python_code("self") for ran in (self, other)]
        return codes[0].src == codes[1].src and codes[0].globals == codes[1].globals


def _run(block: nn.Module, forward: Any, found: Mentions, tracers: Sequence[BlockTracer]) -> _Ran:
    """Traces a forward by each tracer in turn; what the last one finds."""
    left = list[str]()
    with ExitStack() as stack:
        for tracer in tracers:
            changed = stack.enter_context(undisturbed(block, beside=found.beside, left=left))
            around = _around(block, found)
            with guarded(tracer, block), Capture(tracer):
                try:
                    graph = tracer.trace_forward(block, forward)
                except TraceError as error:
                    raise TraceError(f"{error}{_hooked(block) if error.__cause__ else ''}") from error
            tracer.made.clear()
            now = _around(block, found)
        moved = [name for name, value in now.items() if [value] != [around[name]]]
    return _Ran(tracer, graph, changed, left, moved)


def plain_forward(block: nn.Module) -> Any:
    """The forward of a block's class, without gates."""
    return getattr(type(block), "_ungated", type(block)).forward


def _check_steady(
    found: Mentions, tracer: BlockTracer, changed: list[str], left: list[str], moved: list[str]
) -> None:
    """Refuses a forward that changes what it can reach, or reads what its children change meanwhile.

    Raises:
        TraceError: It does; the message names what.
    """
    for name in changed:
        said = f"{name}, which is not its own" if name in found.beside else f"self.{name}"
        raise TraceError(f"its forward changes {said}: a gated one would do so once and never again")
    if moved:
        raise TraceError(f"its forward changes {moved[0].partition(' ')[0]}, which is not its own")
    if left:
        raise TraceError(f"its forward keeps a value in {left[0]}")
    for name in sorted(tracer.reads.own):
        if any(
            name == one or name.startswith((f"{one}.", f"{one}[")) or one.startswith(f"{name}.")
            for one in tracer.runner.unsteady
        ):
            raise TraceError(f"its forward reads self.{name}, which a layer changes while it runs")


def _mentioned(block: nn.Module, forward: Any, below: Below) -> Mentions:
    """What the code of a block, and of what is traced through, mentions."""
    found = mentions(block, forward)
    for path in sorted(below.opened):
        child = block.get_submodule(path)
        inner = mentions(child, plain_forward(child))
        found.attributes += tuple(f"{path}.{name}" for name in inner.attributes)
        found.variables += inner.variables
        found.beside |= inner.beside
        found.classes |= inner.classes
    return found


def _around(block: nn.Module, found: Mentions) -> dict[str, Any]:
    """What is in the attributes and variables that are mentioned now, by a name for messages."""
    variables = {
        f"{variable} ({number})": state(variable.value()) for number, variable in enumerate(found.variables)
    }
    return variables | {f"self.{name}": state(attribute(block, name)) for name in found.attributes}


def _hooked(block: nn.Module) -> str:
    """A remark on forward hooks, which run on fake tensors too; ``""`` if there are none."""
    named = ((name, m) for name, m in block.named_modules() if m._forward_hooks or m._forward_pre_hooks)
    name, module = next(named, ("", None))
    where = f"{name}, a {type(module).__name__}," if name else "it"
    return "" if module is None else f" ({where} has a forward hook, which cannot look at numbers meanwhile)"


def _check_class(cls: type[nn.Module]) -> None:
    """A gate needs a subclass of the block's class; few classes refuse to have one."""
    try:
        bases = (cls,) if issubclass(cls, Unannounced) else (Unannounced, cls)
        type(cls.__name__, bases, {"__module__": cls.__module__})
    except Exception as error:
        raise TraceError(f"its class {cls.__name__} cannot be subclassed: {error}") from error


class Unannounced:
    """Mixed in in front: no register of subclasses that a user's class keeps hears of surgeon's own."""

    def __init_subclass__(cls, **kwargs: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Made:
    """A class that surgeon made, in a form that pickles: the class it was made of, and by what."""

    make: Callable[[Any], type[nn.Module]]
    of: "type[nn.Module] | Made"


def portable(cls: type[nn.Module]) -> type[nn.Module] | Made:
    """``cls`` in a form that pickles; a class that surgeon made has a ``_made`` that says how."""
    made: Made | None = vars(cls).get("_made")
    return cls if made is None else Made(made.make, portable(made.of))  # type: ignore[arg-type]


def revived(cls: type[nn.Module] | Made) -> type[nn.Module]:
    """The class again."""
    return cls.make(revived(cls.of)) if isinstance(cls, Made) else cls
