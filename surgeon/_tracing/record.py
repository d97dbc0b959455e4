"""Runs a model once on fake tensors and notes what runs, in which order, on which arguments.

No arithmetic is done and no weight is touched: `FakeTensorMode` computes shapes only. Two observers look
on. `OpLog`, a dispatch mode, sees every ATen operator, also those inside leaf modules and functions, and
carries for each storage the set of model inputs and weights it depends on; so it knows every addition of
two tensors that share ancestry and tells it from shape arithmetic. Hooks on every module note the calls.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch import FAKE_LOG, FakeTensorMode, pytree, under_vmap
from surgeon._tracing.blame import failure, is_internal
from surgeon._tracing.fake import NESTED, storage, to_fake, twin
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.state import draws
from surgeon._tracing.undisturbed import undisturbed
from surgeon.errors import RecordError

_INTERNAL = frozenset(nn.Module().__dict__)  # what PyTorch itself keeps on a module, buffers for one


@dataclass(slots=True)
class Call:
    """One call of a module.

    Attributes:
        module: The module.
        place: Its place in the order of entry.
        parent: Place of the call it was made from, -1 for the model itself.
        args, kwargs: What its forward got; tensors are fake.
        output: What it gave.
        wrote: Whether it changed one of its arguments in place.
        first_op, last_op: The range of operators that ran in it and below it.
        additions: Additions of two activations, or of two tensors with a common ancestor, that its own
            forward made.
        biases: Other additions of an activation and a tensor (weight, mask, table).
        rewritten: After it returned, something wrote in place to what it took or gave, or may do so since
            that leaves the model.
        reread: After it returned, something else reads what it took: a skip, or who called the model.
        changed: Names of what it changed of itself, or below it, that is no tensor.
        made_at: For each tensor it got, in order, the step of the log that made what is in it.
    """

    module: nn.Module
    place: int
    parent: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first_op: int
    last_op: int = -1
    output: Any = None
    wrote: bool = False
    additions: int = 0
    biases: int = 0
    rewritten: bool = False
    reread: bool = False
    changed: tuple[str, ...] = ()
    made_at: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Recording:
    """What one forward of a model did.

    Attributes:
        calls: Every module call in the order of entry; the model itself is the first.
        flops: FLOPs of the whole forward.
        training: Whether it ran as in training.
        log: The log of every operator.
        keeping: For modules that kept a tensor of this forward in an attribute, its name; buffers aside.
    """

    calls: tuple[Call, ...]
    flops: int
    training: bool
    log: "OpLog" = field(repr=False)
    keeping: Mapping[nn.Module, str] = field(default_factory=dict, repr=False)

    def children(self, call: Call) -> list[Call]:
        """The calls made directly by ``call``, in order."""
        return [child for child in self.below(call) if child.parent == call.place]

    def below(self, call: Call) -> Iterator[Call]:
        """The calls made by ``call``, directly or through others, in order."""
        return itertools.takewhile(lambda c: c.parent >= call.place, self.calls[call.place + 1 :])

    def replays(self, call: Call) -> dict[nn.Module, list[Call]]:
        """The calls made directly by ``call`` whose result a trace may take from here, by module, in order.

        Those that hand on or write to their arguments are run anew: the trace's arguments are other tensors.
        """
        found: dict[nn.Module, list[Call]] = {}
        if not self.log.real:
            for child in self.children(call):
                found.setdefault(child.module, []).append(child)
        return found

    def arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any], "OpLog"]:
        """A call's arguments as fake tensors, and the log that knows which of them are active.

        Objects among them (a cache, say) are copies, so that a trace can write to them.
        """
        if not self.log.real:
            return *twin((call.args, call.kwargs)), self.log
        log = OpLog(FakeTensorMode(allow_non_fake_inputs=True))
        args, kwargs = to_fake(log.fake, (call.args, call.kwargs))
        for ran, stands_for in zip(tensors((call.args, call.kwargs)), tensors((args, kwargs)), strict=True):
            if self.log.active(ran):
                log.root(stands_for)
        return args, kwargs, log


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = True
) -> Recording:
    """Runs ``model(*args, **kwargs)`` on fake tensors and returns what happened; the model is left as it was.

    First as in training. A model that cannot run so (a batch of one under BatchNorm, a detector without its
    targets) is run with each batch of one doubled, then as in evaluation, and where values decide shapes
    (non-maximum suppression) in evaluation on real tensors. One that draws from Python's or NumPy's generator
    in training may have passed over blocks (LayerDrop), so it is run as in evaluation, too.

    Args:
        model: Any module, on any device.
        args: Positional arguments; tensors are replaced by fake ones.
        kwargs: Keyword arguments, likewise.
        training: Whether to try as in training at all.

    Raises:
        RecordError: The model's own forward failed on these arguments in every way.
    """
    attempts = [(True, False, False), (True, True, False), (False, False, False), (False, False, True)]
    first: Exception | None = None
    if any(t.is_nested for t in tensors((args, kwargs))):
        raise RecordError(f"{type(model).__name__} is given {NESTED}")
    for in_training, doubled, real in attempts if training else attempts[2:]:
        given = pytree.tree_map_only(Tensor, _doubled, (args, kwargs)) if doubled else (args, kwargs)
        if real and any(t.is_meta for t in (*model.parameters(), *tensors((args, kwargs)))):
            continue
        try:
            return _record(model, *given, training=in_training, real=real)
        except Exception as error:
            if is_internal(error):
                raise
            first = first or error
    raise RecordError(failure(model, args, kwargs, first)) from first


def _doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.ndim > 1 and tensor.shape[0] == 1 else tensor


def _apart(tree: Any) -> Any:
    """The arguments with a copy for each tensor that another argument is, too.

    An example may use one tensor twice; what is computed from one argument is not computed from the other.
    """
    seen = set[int]()

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) in seen:
            with torch.no_grad():
                return tensor.clone()
        seen.add(id(tensor))
        return tensor

    return pytree.tree_map_only(Tensor, own, tree)


def _record(model: nn.Module, args: Any, kwargs: Any, *, training: bool, real: bool) -> Recording:
    log, calls = OpLog(FakeTensorMode(allow_non_fake_inputs=True)), list[Call]()
    log.real = real
    with ExitStack() as stack:
        before = draws()
        changed = stack.enter_context(undisturbed(model, training=training))
        stack.enter_context(quiet())
        # As in training, where a forward may ask whether its input requires a gradient.
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(_watch(model, log, calls))
        apart = _apart((args, kwargs))
        given = twin(apart) if real else to_fake(log.fake, apart)
        twin(given, log.root)
        if not real:
            stack.enter_context(log.fake)
        stack.enter_context(log)
        held = {module: dict(_tensors_of(module)) for module in model.modules()}
        model(*given[0], **given[1])
        keeping = {module: name for module in held if (name := _kept(module, held[module], log))}
        if training and draws() != before:
            raise RecordError(
                "its forward draws random numbers from Python's or NumPy's generator in training"
            )
    last = {source: step.op for step in log.steps for source in step.sources}
    for call in calls:
        taken = [made for made in call.made_at if made >= 0]
        call.reread = any(last.get(m, -1) >= call.last_op or log.steps[m].op < 0 for m in taken)
    names = {module: f"{name}." if name else "" for name, module in model.named_modules()} if changed else {}
    for index, call in enumerate(calls):
        call.additions, call.biases = log.additions[index], log.biases[index]
        if names:
            prefix = names[call.module]
            call.changed = tuple(one.removeprefix(prefix) for one in changed if one.startswith(prefix))
    return Recording(tuple(calls), sum(op.flops for op in log.ops), training, log, keeping)


def _kept(module: nn.Module, before: Mapping[str, list[Tensor]], log: "OpLog") -> str:
    """The first attribute of a module that holds other tensors made of the model's inputs; ``""`` if none."""
    for name, found in _tensors_of(module):
        known = {id(tensor) for tensor in before.get(name, ())}
        if any(id(tensor) not in known and log.active(tensor) for tensor in found):
            return name
    return ""


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """The tensors in a module's plain attributes, and in nests there."""
    for name, value in module.__dict__.items():
        if name not in _INTERNAL and isinstance(value, (Tensor, list, tuple, dict)):
            yield name, tensors(value)


@contextmanager
def quiet() -> Iterator[None]:
    """A forward that fails on fake tensors is an answer here, not worth PyTorch's own error log."""
    logger = logging.getLogger(FAKE_LOG)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@contextmanager
def _watch(model: nn.Module, log: OpLog, calls: list[Call]) -> Iterator[None]:
    """Hooks on every module that keep the stack of running calls."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if under_vmap():
            return  # on one row, of a tensor that cannot be told apart; its operators count for the caller
        given = tensors((args, kwargs))
        kept_args, kept_kwargs = twin((args, kwargs))
        calls.append(Call(module, len(calls), log.stack[-1], kept_args, kept_kwargs, len(log.ops)))
        calls[-1].made_at = [log.made_at(t) for t in given]
        entered.append([(t, t._version) for t in given])
        log.stack.append(len(calls) - 1)

    def leave(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if log.stack[-1] < 0 or calls[log.stack[-1]].module is not module:
            return  # it was never entered: a hook of the user's stopped it
        call = calls[log.stack.pop()]
        call.last_op, call.output = len(log.ops), output
        call.wrote = any(t._version != version for t, version in entered.pop())
        seen.extend((call, t, t._version) for t in tensors((output, call.args, call.kwargs)))
        if call.parent == -1:
            final.update(storage(t) for t in tensors(output))

    entered: list[list[tuple[Tensor, int]]] = []
    seen: list[tuple[Call, Tensor, int]] = []
    final: set[int] = set()
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
        for call, tensor, version in seen:
            call.rewritten |= tensor._version != version or storage(tensor) in final
    finally:
        for handle in handles:
            handle.remove()
