"""Traces one block's own ``forward`` into an fx graph, and refuses what a graph cannot hold."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from surgeon._tracing.below import Below
from surgeon._tracing.example import generators_kept, no_autocast_cache, untouched
from surgeon._tracing.facts import Trace, drop_unused
from surgeon._tracing.guards import guarded
from surgeon._tracing.leftovers import held_elsewhere, kept
from surgeon._tracing.mentions import Place, mentions
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.reads import Reads, attribute
from surgeon._tracing.record import Call
from surgeon._tracing.state import state
from surgeon._tracing.tracer import BlockTracer, Capture
from surgeon.errors import TraceError

_ONE_AT_A_TIME = threading.RLock()  # fx patches `nn.Module` itself, and puts back what it found there


def trace(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log: OpLog,
    replays: Mapping[nn.Module, list[Call]] | None = None,
    below: Below | None = None,
) -> Trace:
    """Traces ``block`` as called with ``args`` and ``kwargs``; the block is left as it was.

    Args:
        block: The module whose own forward is traced, in the mode (training or not) it is in.
        args: Positional arguments; tensors are fake ones of ``log``'s mode.
        kwargs: Keyword arguments, likewise.
        log: The operator log that knows which of them depend on a model input.
        replays: The recorded calls of its children in the same mode, whose results need no second run.
        below: The modules below it that are no plain leaves.

    Raises:
        TraceError: The forward does something that a graph cannot hold, named in the message.
    """
    if "forward" in block.__dict__:
        raise TraceError("its forward was replaced on the instance")
    if isinstance(block, fx.GraphModule):
        raise TraceError(
            "torch.fx wrote its forward, and may write it anew; put the gates on the model it was made from"
        )
    _check_class(type(block))
    before, reads = dict(block.__dict__), Reads()
    with _ONE_AT_A_TIME, untouched(block), generators_kept(), no_autocast_cache():
        below = below or Below()
        tracer = BlockTracer(log, args, kwargs, replays or {}, reads, below)
        named, places, classes = _mentioned(block, below)
        around = _around(block, named, places)
        with guarded(tracer, block), Capture(tracer):
            try:
                graph = tracer.trace(block)
            except TraceError as error:
                raise TraceError(f"{error}{_hooked(block) if error.__cause__ else ''}") from error
        changed = [name for name, value in block.__dict__.items() if before.get(name, block) is not value]
        left, elsewhere = kept(block), held_elsewhere(tracer.proxies)
        moved = [name for name, value in _around(block, named, places).items() if [value] != [around[name]]]
    if changed:
        raise TraceError(f"its forward assigns self.{changed[0]}")
    if left:
        raise TraceError(f"its forward keeps a value in self.{left}")
    if elsewhere:
        raise TraceError(f"its forward keeps a value in a {elsewhere} that is not its own")
    if moved:
        raise TraceError(f"its forward changes {moved[0].partition(' ')[0]}, which is not its own")
    for name in (*named, *(reads.fetched if classes else ())):
        reads.note(name, attribute(block, name), own=True)
    below = Below(below.opened, tracer.stood)
    reads.walked({str(node.target) for node in graph.nodes if node.op == "call_module"})
    drop_unused(graph, tracer.facts)
    given = tracer.given.read
    return Trace(graph, tracer.facts, tracer.exact, tracer.ambient, reads, below, given, places)


def _mentioned(block: nn.Module, below: Below) -> tuple[list[str], tuple[Place, ...], bool]:
    """What the code of a block, and of what is traced through, mentions: attributes, places, classes."""
    named, places, classes = list[str](), list[Place](), False
    for path in ("", *sorted(below.opened)):
        found = mentions(block.get_submodule(path))
        named += [f"{path}.{name}" if path else name for name in found.attributes]
        places += found.places
        classes |= found.classes
    return named, tuple(places), classes


def _around(block: nn.Module, named: list[str], places: tuple[Place, ...]) -> dict[str, Any]:
    """What is in these attributes and places now, by a name for messages."""
    found = {f"{place} ({number})": state(place.value()) for number, place in enumerate(places)}
    return found | {f"self.{name}": state(attribute(block, name)) for name in named}


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
