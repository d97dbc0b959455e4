"""From a model to its residual adds: record once, trace the blocks that add, classify, choose.

Nothing here changes the model; `surgeon._surgery` acts on what comes out.
"""

import operator
from collections import Counter
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from surgeon._finding.adders import adders
from surgeon._finding.addition import Addition
from surgeon._finding.callers import Callers
from surgeon._finding.children import below, hand_out_both
from surgeon._finding.choice import Choice
from surgeon._finding.concats import concatenating, concats
from surgeon._finding.drops import mask_nodes
from surgeon._finding.findings import REASONS, Code, Findings, Refusal, Residual, gate_name
from surgeon._finding.flow import Flow
from surgeon._finding.joins import joins, own_parts
from surgeon._finding.opgraph import adds_constant, count_sums, operators
from surgeon._finding.paths import side
from surgeon._finding.residual import additions, nest, steps_along, within
from surgeon._tracing.facts import is_size
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.reads import Reads
from surgeon._tracing.record import Call, Recording, record
from surgeon._tracing.sharing import likeness
from surgeon._tracing.state import kind
from surgeon._tracing.trace import trace
from surgeon._tracing.undisturbed import collected_later, mode, undisturbed
from surgeon.errors import TraceError

_Arguments = tuple[tuple[Any, ...], dict[str, Any], OpLog]


@dataclass(slots=True)
class Block:
    """One block with residual adds: the module, how it was called, its traced forward.

    Attributes:
        name: Qualified name.
        module: The block.
        call: The call in the recording with the most additions, the first of these.
        flow: Its traced forward.
        order: Its place among the blocks: the call by which it runs.
        others: Its calls in other ways, such as with another flag, and their traces.
        found: The additions to gate, in order.
        residuals: The same as `Residual`.
    """

    name: str
    module: nn.Module
    call: Call
    flow: Flow
    found: list[Addition] = field(default_factory=list)
    residuals: list[Residual] = field(default_factory=list)
    others: list[tuple[Call, Flow]] = field(default_factory=list)
    order: int = 0


@dataclass(frozen=True, slots=True)
class Analysis:
    """The residual adds of a model, block by block, and the additions left alone."""

    recording: Recording
    blocks: tuple[Block, ...]
    refused: tuple[Refusal, ...]

    @property
    def findings(self) -> Findings:
        residuals = tuple(r for block in self.blocks for r in block.residuals)
        return Findings(residuals, self.refused, self.recording.flops)


@collected_later()
def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Analysis:
    """Finds the residual adds of ``model``; the model is left as it was.

    Args:
        model: Any module.
        args: Positional arguments of the example.
        kwargs: Keyword arguments of the example.
        include: Glob patterns on names of residual adds, blocks or block classes; if given, only these. The
            full name of a refused addition, or a reason code, brings that in; ``:left`` or ``:right`` behind
            a pattern tells which side of the sum is the shortcut.
        exclude: Patterns of what to leave out, likewise.

    Raises:
        RecordError: The model does not run on the example.
        UsageError: A pattern matches nothing.
    """
    recording = record(model, args, kwargs)
    names = {module: name for name, module in model.named_modules()}
    scan = _Scan(recording, names, Choice(include, exclude))
    # Always in training mode, where stochastic depth that is already there is live.
    with undisturbed(model, training=True):
        for call in recording.calls:
            scan.visit(call)
    scan.choice.check()
    blocks = sorted(scan.blocks, key=lambda block: block.order)
    return Analysis(recording, tuple(blocks), tuple(scan.refused))


@dataclass(slots=True)
class _Traced:
    """One block's graph and the additions in it, which blocks alike may share."""

    flow: Flow
    additions: list[Addition]
    evaluating: Reads | None = None

    def fits(self, block: nn.Module) -> bool:
        """Whether ``block``, if alike, agrees on every number and flag that was read."""
        return self.flow.trace.reads.agree(block) and (not self.evaluating or self.evaluating.agree(block))


class _Scan:
    """Visits the calls of a recording from the outside in and collects blocks and refusals."""

    def __init__(self, recording: Recording, names: dict[nn.Module, str], choice: Choice) -> None:
        self.recording, self.names, self.choice = recording, names, choice
        self.blocks: list[Block] = []
        self.refused: list[Refusal] = []
        self.seen: set[nn.Module] = set()
        self.nested: set[nn.Module] = set()
        self.adders = adders(recording)
        self.callers = Callers(recording, self.adders)
        self.sums = [call.additions for call in recording.calls]
        for place, caller in self.adders.items():
            self.sums[caller] += self.sums[place]
            self.sums[place] = 0
        adding = {call.module for call in recording.calls if self.sums[call.place]}
        self.kinds = Counter(type(module) for module in adding)
        self.calls = {call.module: call for call in self._by_sums()}
        self.cats = concatenating(recording) if choice.asks_for("concat") else set[int]()
        self.first_run = {call.module: call.place for call in reversed(recording.calls)}
        self.steps: dict[nn.Module, int] = {}
        self.traced: dict[Hashable, list[_Traced]] = {}

    def _by_sums(self) -> list[Call]:
        """The calls, of each module the first with the most additions last."""
        return sorted(self.recording.calls, key=lambda call: (self.sums[call.place], -call.place))

    def visit(self, call: Call) -> None:
        module = call.module
        if module in self.seen or not (self.sums[call.place] or call.biases or call.place in self.cats):
            return
        self.seen.add(module)
        call = self.calls[module]
        sums = self.sums[call.place]
        if not sums:
            if self.choice.asks_for("bias") or (call.place in self.cats and module not in self.nested):
                self._trace(call)
            elif any(module.children()):  # the bias of a single layer is no matter for a report
                self._refuse_all(module, call.biases, "bias")
        elif module in self.nested and not self.choice.asks_for("nested"):
            self._refuse_all(module, sums, "nested")
        else:
            self._trace(call)

    def _trace(self, call: Call) -> None:
        module, name = call.module, self.names[call.module]
        arguments = self.recording.arguments(call)
        try:
            traced = self._traced(call, arguments)
            others = self._traced_otherwise(call, traced)
        except TraceError as error:
            self._untraced(call, error)
            return
        block = Block(name, module, call, traced.flow, others=others, order=self.first_run[module])
        found = self._told_by_caller(block, traced.additions)
        for addition in nest(block.flow, found, lambda node: self._steps_in(module, node)):
            self._sort(block, addition)
        if call.place in self.cats:
            self._sort_concats(block)
        unseen = self.sums[call.place] - sum(addition.code != "bias" for addition in traced.additions)
        self._refuse_all(module, unseen, "form", first=len(traced.additions))
        if block.found:
            _number(block)
            self.blocks.append(block)

    def _traced_otherwise(self, call: Call, traced: _Traced) -> list[tuple[Call, Flow]]:
        """The calls of a block that may take a gate in every other way, and their traces.

        Raises:
            TraceError: One of them cannot be traced.
        """
        if all(addition.code == "bias" for addition in traced.additions):
            return []
        exact, found = traced.flow.trace.key.exact, list[tuple[Call, Flow]]()
        known = {_way(call, exact)}
        for one in self.recording.calls:
            if one.module is call.module and _way(one, exact) not in known:
                known.add(_way(one, exact))
                found.append((one, self._traced(one, self.recording.arguments(one)).flow))
        return found

    def _steps_in(self, block: nn.Module, node: fx.Node) -> int:
        """How many residual adds follow on one another through the module that a node calls."""
        module = block.get_submodule(str(node.target))
        if module not in self.steps:
            self.steps[module] = 0
            call = self.calls.get(module)
            if call is not None and any(self.sums[one.place] for one in (call, *self.recording.below(call))):
                with suppress(TraceError):
                    self.steps[module] = self._steps_through(call)
        return self.steps[module]

    def _steps_through(self, call: Call) -> int:
        traced = self._traced(call, self.recording.arguments(call))
        flow, module = traced.flow, call.module
        given = [n for n in flow.order if n.op == "placeholder" and flow.fact(n).active]
        inside, end = flow.order[:-1], flow.order[-1]
        return steps_along(
            flow, given, end, inside, traced.additions, lambda node: self._steps_in(module, node)
        )

    def _traced(self, call: Call, arguments: _Arguments) -> _Traced:
        """A block's graph and its additions; equal blocks share them."""
        if self.kinds[type(call.module)] == 1:
            return self._traced_anew(call, arguments)
        children = self.recording.children(call)
        alike = self.traced.setdefault(likeness(call.module, *arguments, children), [])
        shared = next((one for one in alike if one.fits(call.module)), None)
        if shared is None:
            shared = self._traced_anew(call, arguments)
            alike.append(shared)
        return shared

    def _traced_anew(self, call: Call, arguments: _Arguments) -> _Traced:
        # A child that changes what is not its own has to be seen doing so.
        replays = self.recording.replays(call) if self.recording.training and not call.changed else {}
        leaves = below(self.recording, call, self.adders)
        try:
            flow = Flow(trace(call.module, *arguments, replays, leaves))
        except TraceError:
            if not leaves.opened:
                raise
            flow = Flow(trace(call.module, *arguments, replays, replace(leaves, opened=frozenset())))
        traced = _Traced(flow, additions(flow))
        while more := hand_out_both(self.recording, call, flow, traced.additions):
            leaves = replace(leaves, opened=leaves.opened | more)
            with suppress(TraceError):
                flow = Flow(trace(call.module, *arguments, replays, leaves))
            if flow is traced.flow:
                break
            traced = _Traced(flow, additions(flow))
        if any(drop.op != "call_module" for addition in traced.additions for drop in addition.drops):
            self._check_drops(call, arguments, traced)
        return traced

    def _check_drops(self, call: Call, arguments: _Arguments, traced: _Traced) -> None:
        """Refuses branches with stochastic depth written out whose correction would stay when the mask goes.

        With the mask taken off, such a branch must do in training what it does in evaluation.
        """
        plain: dict[int, Addition] = {}
        with suppress(TraceError), mode(call.module, False):
            evaluating = Flow(trace(call.module, *arguments, below=traced.flow.trace.below))
            traced.evaluating = evaluating.trace.reads
            plain = {a.ordinal: a for a in additions(evaluating)}
        for place, addition in enumerate(traced.additions):
            if addition.code is None and addition.drops:
                other = plain.get(addition.ordinal)
                if other is None or not _agree(traced.flow, addition, evaluating, other):
                    traced.additions[place] = replace(addition, code="stochastic")

    def _untraced(self, call: Call, error: TraceError) -> None:
        """Refuses the additions of a block without a trace, each for what the operators that ran say."""
        flow = operators(self.recording.log, call)
        found, sums = additions(flow, regions=False), count_sums(flow)
        name, kind = self.names[call.module], type(call.module).__name__
        why = f"{REASONS['untraceable']}: {error}"
        for addition in found:
            code: Code = addition.code or ("bias" if adds_constant(flow, addition) else "untraceable")
            if code == "no-shortcut" and addition.kind:  # only a trace would tell what the caller hands in
                code = "untraceable"
            reason = why if code == "untraceable" else REASONS[code]
            self._refuse(gate_name(name, addition.ordinal), name, kind, code, reason)
        # Two constants, chosen by an activation: anchors by their scores.
        self._refuse_all(call.module, sums - len(found), "bias", first=len(found))
        unseen = self.sums[call.place] + call.biases - sums
        self._refuse_all(call.module, unseen, "untraceable", why, first=sums)

    def _sort(self, block: Block, addition: Addition) -> None:
        name, kind = gate_name(block.name, addition.ordinal), type(block.module).__name__
        code: Code | None = "nested" if block.module in self.nested else addition.code
        chosen = self.choice.takes(block.flow, addition, code, name, block.name, kind)
        if chosen is not None:
            block.found.append(chosen)
            block.residuals.append(_describe(block, chosen, name))
            self._mark_nested(block, chosen)
        else:
            code = code or "excluded"
            self.refused.append(Refusal(name, block.name, kind, code, REASONS[code]))

    def _sort_concats(self, block: Block) -> None:
        """Like `_sort`, of new features; a block in which sums carry gates has none on them."""
        summing = bool(block.found)
        for addition in concats(block.flow):
            name, kind = gate_name(block.name, addition.ordinal), type(block.module).__name__
            if summing:
                self._refuse(name, block.name, kind, "concat", "its block has gates on sums; exclude those")
            elif chosen := self.choice.takes(block.flow, addition, addition.code, name, block.name, kind):
                block.found.append(chosen)
                block.residuals.append(_describe(block, chosen, name))
            else:
                code: Code = addition.code or "excluded"
                if code not in (
                    "concat",
                    "excluded",
                ):  # so that include=["concat"] tells, where it comes to nothing
                    self.choice.refuses(name, "concat", REASONS[code], block.name, kind)
                elif self.choice.asks_for("concat"):
                    code = "excluded"
                self.refused.append(Refusal(name, block.name, kind, code, REASONS[code]))

    def _told_by_caller(self, block: Block, found: list[Addition]) -> list[Addition]:
        """The same additions; of two values from elsewhere the recording knows how one was made."""
        told = []
        for addition in found:
            answer = self.callers.told(block.call, block.flow, addition, {one.module for one in self.blocks})
            if answer is not None and answer.inside:
                self._ungate(answer.inside)
            if answer is not None and answer.order >= 0:
                block.order = answer.order
            told.append(addition if answer is None else answer.addition)
        return told

    def _ungate(self, modules: AbstractSet[nn.Module]) -> None:
        """Takes back the residual adds of some blocks, which lie inside the branch of another one."""
        for block in [block for block in self.blocks if block.module in modules]:
            self.blocks.remove(block)
            for one in block.residuals:
                self.refused.append(
                    Refusal(one.name, block.name, one.block_type, "nested", REASONS["nested"])
                )

    def _mark_nested(self, block: Block, addition: Addition) -> None:
        """Everything that runs inside this branch is no residual add of its own; paths of joins hold such."""
        if addition.kind == "mean":
            return
        for node in within(block.flow, addition):
            if node.op == "call_module":
                self.nested.update(block.module.get_submodule(str(node.target)).modules())

    def _refuse_all(
        self, module: nn.Module, count: int, code: Code, reason: str = "", first: int = 0
    ) -> None:
        name, kind = self.names[module], type(module).__name__
        for ordinal in range(first, first + count):
            self._refuse(gate_name(name, ordinal), name, kind, code, reason or REASONS[code])

    def _refuse(self, name: str, block: str, kind: str, code: Code, reason: str) -> None:
        """Lists an addition that is in no graph."""
        self.choice.refuses(name, code, reason, block, kind)
        self.refused.append(Refusal(name, block, kind, code, reason))


def _way(call: Call, exact: bool) -> Hashable:
    """What of a call's arguments may decide which code runs."""
    given = {str(place): value for place, value in enumerate(call.args)} | call.kwargs
    return tuple((name, kind(value, exact)) for name, value in given.items())


def most_paths(analysis: Analysis) -> int:
    """How many paths the widest join of a model has: its columns; 0 without one."""
    return max((r.paths for block in analysis.blocks for r in block.residuals), default=0)


def _number(block: Block) -> None:
    """Notes for each residual add of a block how many follow on one another up to it."""
    depths: dict[fx.Node, int] = {}
    for place, addition in enumerate(block.found):
        if addition.kind == "mean":  # the joins of a block share a drop rate
            continue
        carried = block.flow.sources(addition.shortcut, itself=True)
        depth = depths[addition.node] = 1 + max((d for n, d in depths.items() if n in carried), default=0)
        block.residuals[place] = replace(block.residuals[place], depth=depth)


def _agree(flow: Flow, training: Addition, evaluating: Flow, plain: Addition) -> bool:
    """Whether a branch without its stochastic depth runs the same calls as in evaluation."""
    if plain.code is not None:
        return False
    masks = {n for drop in training.drops for n in mask_nodes(flow, drop)}
    left = [n for n in side(flow, training.branch, training.shortcut) if n not in masks]
    right = side(evaluating, plain.branch, plain.shortcut)
    calls = [
        [(n.op, n.target, _constants(n)) for n in nodes if not is_size(n, f.fact(n))]
        for f, nodes in ((flow, left), (evaluating, right))
    ]
    return calls[0] == calls[1]


def _constants(node: fx.Node) -> tuple[Any, ...]:
    return tuple(a for a in node.args if isinstance(a, (int, float)))


def _describe(block: Block, addition: Addition, name: str) -> Residual:
    flow = block.flow
    work = [n for n in side(flow, addition.branch, addition.shortcut) if n not in addition.drops]
    paths = joins(flow)[addition.node].paths if addition.kind == "mean" else ()
    if paths:
        work = [n for part in own_parts(flow, paths) for n in part]
    drops = [node for node in addition.drops if node.op == "call_module"]
    prefix = f"{block.name}." if block.name else ""
    return Residual(
        name=name,
        block=block.name,
        block_type=type(block.module).__name__,
        kind=addition.kind,
        shortcut="identity"
        if addition.kind == "identity"
        else ""
        if addition.kind == "mean"
        else _modules(side(flow, addition.shortcut, addition.branch)) or addition.shortcut.name,
        branch=_modules(work) or addition.branch.name,
        flops=addition.flops,
        replaces=tuple(prefix + str(node.target) for node in drops),
        paths=len(paths),
        shape=tuple(flow.fact(addition.node).value.shape),
        parameters=_parameters(block.module, work),
        activations=sum(op.made for node in work for op in flow.fact(node).ops),
    )


def _parameters(block: nn.Module, nodes: list[fx.Node]) -> int:
    """How many numbers the weights hold that some nodes use, each weight once."""
    used: dict[int, nn.Parameter] = {}
    for node in nodes:
        if node.op == "call_module":
            used |= {id(p): p for p in block.get_submodule(str(node.target)).parameters()}
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(block)
            used |= {id(value): value} if isinstance(value, nn.Parameter) else {}
    return sum(p.numel() for p in used.values())


def _modules(nodes: list[fx.Node]) -> str:
    """The modules that run among ``nodes``, in order; functions only if there is no module."""
    modules = [str(node.target) for node in nodes if node.op == "call_module"]
    return " ".join(modules) or " ".join(node.name for node in nodes)
