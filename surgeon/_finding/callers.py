"""What the caller of a block knows of the values that the block adds up: whether one was made of the other.

A block may get its shortcut as an argument, or both sides of a sum, or take both from what a child gave. How
the one was computed from the other, the recording tells:

* the shortcut is what the branch was computed from, or was projected from the branch's argument;
* the branch is what the block before gave beside the stream, and this block adds it (``add, norm, mixer``);
* two streams take turns: each is added what is computed from the other (reversible networks).
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from surgeon._finding.addition import Addition
from surgeon._finding.branch import unfit
from surgeon._finding.flow import Flow
from surgeon._finding.paths import ops_of, side, stems
from surgeon._finding.residual import arguments_of, described, projected
from surgeon._tracing.nests import tensors
from surgeon._tracing.operators import is_layer, is_linear, projects
from surgeon._tracing.oplog import Layout, Step, layout
from surgeon._tracing.record import Call, Recording

Value = tuple[int, Layout]  # the step that made it, and which part of that


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out of an addition.

    Attributes:
        addition: The addition.
        inside: The modules whose own sums lie inside its branch.
        order: The last call that was entered before the sum was made, -1 if that is its block's.
    """

    addition: Addition
    inside: AbstractSet[nn.Module] = frozenset()
    order: int = -1


class Callers:
    """Tells additions by the recording.

    Args:
        recording: The recording.
        adders: The place of each call whose sums are its caller's, with that of the caller.
    """

    def __init__(self, recording: Recording, adders: Mapping[int, int]) -> None:
        self.recording, self.log, self.adders = recording, recording.log, adders
        self._reached: dict[Value, frozenset[int]] = {}

    def told(
        self, call: Call, flow: Flow, addition: Addition, gated: AbstractSet[nn.Module]
    ) -> Answer | None:
        """What is known of an addition besides; ``None`` if nothing is.

        Args:
            call: The call of its block.
            flow: The trace of that.
            addition: The addition.
            gated: The modules that have residual adds, as far as is known.
        """
        if addition.code == "no-shortcut" and addition.kind:
            return Answer(self._handed_in(call, flow, addition, gated))
        if addition.code in ("no-shortcut", "linear") and not addition.kind:
            return self._made_before(call, flow, addition, gated)
        return None

    def _handed_in(
        self, call: Call, flow: Flow, addition: Addition, gated: AbstractSet[nn.Module]
    ) -> Addition:
        """An addition of a block's argument to what the block computes from other arguments.

        That argument is the other one, or the other was computed from it: ``"identity"``. It was computed
        from the other by what a projection may hold: ``"projection"``. No residual add may lie between the
        two: a long skip over some, as decoders of segmentation have it, is no step of a stream.
        """
        given = tensors((call.args, call.kwargs))
        values = [(made, layout(t)) for made, t in zip(call.made_at, given, strict=True)]
        shortcuts, sources = (
            {values[place] for place in places if values[place][0] >= 0}  # constants have no maker to compare
            for places in arguments_of(flow, addition)
        )
        pairs = [(a, b) for a in shortcuts for b in sources]
        over = [step for a, b in pairs for step in self.log.between(a[0], b[0])]
        if over or shortcuts & sources:
            passed = {m for a, b in pairs for m in self._passed(a, b)}
            return replace(addition, code=None if gated.isdisjoint(passed) else "long-skip")
        if any(self._take_turns(call, a, b) for a, b in pairs):
            return replace(addition, code=unfit(flow, replace(addition, code=None)))
        before = [step for a, b in pairs for step in self.log.between(b[0], a[0])]
        plain = all(projects(self.log.ops[step.op]) and not step.adds for step in before)
        told = projected(flow, addition) if before and plain else None
        return told or addition

    def _passed(self, start: Value, end: Value) -> AbstractSet[nn.Module]:
        """The modules that make sums through which a stream goes on its way from one value to another.

        A sum that one value enters by its branch alone is a step of another stream.
        """
        reached = self._from(start)
        steps = [step for step in self.log.between(start[0], end[0]) if step.adds and step.owner >= 0]
        return {self._adding(step) for step in steps if self._goes_on(start, reached, step)}

    def _goes_on(self, start: Value, reached: AbstractSet[int], step: Step) -> bool:
        entered = [
            source
            for source, view in zip(step.sources, step.read, strict=True)
            if source in reached or _shows(start, (source, view))
        ]
        if len(entered) > 1:
            return True
        return any(source == start[0] or self.log.steps[source].adds for source in entered)

    def _adding(self, step: Step) -> nn.Module:
        return self.recording.calls[self.adders.get(step.owner, step.owner)].module

    def _from(self, start: Value) -> frozenset[int]:
        """The steps whose result is computed from a value."""
        if start not in self._reached:
            found: set[int] = set()
            for number in range(start[0] + 1, len(self.log.steps)):
                step = self.log.steps[number]
                reads = zip(step.sources, step.read, strict=True)
                if any(source in found or self._part_of(start, (source, view)) for source, view in reads):
                    found.add(number)
            self._reached[start] = frozenset(found)
        return self._reached[start]

    def _part_of(self, value: Value, read: Value) -> bool:
        whole = value[0] == read[0] and self.log.steps[value[0]].made == value[1]
        return whole or _shows(value, read)

    def _take_turns(self, call: Call, one: Value, other: Value) -> bool:
        """Whether ``one + F(other)`` of a block is followed by ``other + G(that sum)``, here or elsewhere."""
        ours, theirs = self._from(one), self._from(other)
        for number in sorted(ours & theirs):
            step = self.log.steps[number]
            if step.adds and self.adders.get(step.owner, step.owner) == call.place:
                after = self._from((number, step.made))
                return any(self._answers(later, other, after) for later in sorted(after))
        return False

    def _answers(self, number: int, other: Value, after: AbstractSet[int]) -> bool:
        step = self.log.steps[number]
        reads = list(zip(step.sources, step.read, strict=True))
        return step.adds and any(_shows(other, read) for read in reads) and any(s in after for s, _ in reads)

    def _made_before(
        self, call: Call, flow: Flow, addition: Addition, gated: AbstractSet[nn.Module]
    ) -> Answer | None:
        """A sum of two values that its block only gets: the stream, and what the block before made of it."""
        sides = addition.shortcut, addition.branch
        if ops_of(flow, side(flow, *sides)) or ops_of(flow, side(flow, *sides[::-1])):
            return None
        values = [self._value(call, flow, node) for node in sides]
        if any(value is None or value[0] < 0 for value in values):
            return None
        for place, (stream, made) in enumerate((values, values[::-1])):
            over = self.log.between(stream[0], made[0])  # type: ignore[index]
            if over:
                found = replace(addition, kind="identity", shortcut=sides[place], branch=sides[1 - place])
                return self._mixed(call, flow, found, over, (stream, made), gated)  # type: ignore[arg-type]
        return None

    def _mixed(
        self,
        call: Call,
        flow: Flow,
        found: Addition,
        over: list[Step],
        ends: tuple[Value, Value],
        gated: AbstractSet[nn.Module],
    ) -> Answer | None:
        ops = [self.log.ops[step.op] for step in over]
        alone = all(self._adding(self.log.steps[n]) is call.module for n in self._readers(ends[1]))
        if not any(map(is_layer, ops)) or all(map(is_linear, ops)) or not alone:
            return None
        inside = {self._adding(step) for step in over if step.adds and step.owner >= 0} & gated
        if inside & self._necks(over, ends):
            return Answer(replace(found, code="long-skip"))
        told = described(flow, replace(found, code=None, was=found.code))
        at = min(self.log.steps[n].op for n in self._readers(ends[1]))
        order = sum(one.first_op <= at for one in self.recording.calls) - 1
        return Answer(replace(told, flops=sum(op.flops for op in ops)), inside, order)

    def _readers(self, value: Value) -> list[int]:
        """The steps of the recording that read a value; those of traces since then have no owner."""
        return [
            number
            for number, step in enumerate(self.log.steps)
            if step.owner >= 0
            and any(_shows(value, read) for read in zip(step.sources, step.read, strict=True))
        ]

    def _necks(self, over: list[Step], ends: tuple[Value, Value]) -> AbstractSet[nn.Module]:
        """The modules that make a sum which every way from the one end to the other passes."""
        necks = set()
        numbers = {id(step): number for number, step in enumerate(self.log.steps)}
        for gap in (step for step in over if step.adds and step.owner >= 0):
            reached = {ends[0][0]}
            for step in sorted(over, key=lambda step: numbers[id(step)]):
                if step is not gap and not reached.isdisjoint(step.sources):
                    reached.add(numbers[id(step)])
            if ends[1][0] not in reached:
                necks.add(self._adding(gap))
        return necks

    def _value(self, call: Call, flow: Flow, node: fx.Node) -> Value | None:
        """Where the recording made the value of a node that nothing computes in its block."""
        value = flow.fact(node).value
        if not isinstance(value, Tensor):
            return None
        given = [stem for stem in stems(flow, node) if stem.op == "placeholder"]
        if given:
            places = [n for n in flow.order if n.op == "placeholder"]
            before = sum(len(tensors(flow.fact(n).value)) for n in places[: places.index(given[0])])
            if isinstance(flow.fact(given[0]).value, Tensor):
                return call.made_at[before], layout(value)
        return self.log.made_at(value), layout(value)


def _shows(value: Value, read: Value) -> bool:
    """Whether what is read shows a value: the same part of what the same step made, or more of it."""
    (made, (shape, _, offset)), (source, (other, _, start)) = value, read
    return made == source and (start == offset or other.numel() > shape.numel())
