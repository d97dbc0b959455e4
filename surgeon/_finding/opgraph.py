"""A block that cannot be traced, as a graph of the operators that ran in it.

Nothing can be spliced into such a graph, as it says what ran and not which code ran it. But it has the same
shape as a trace, so that the same rules tell what each of the block's additions is: coordinates decoded from
anchors, a mask, a merge; or a residual add that was missed. Views are seen through to what they show.
"""

import operator
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._tracing.aten import Family
from surgeon._tracing.facts import Fact, Trace
from surgeon._tracing.key import Key
from surgeon._tracing.oplog import Layout, Op, OpLog
from surgeon._tracing.reads import Reads
from surgeon._tracing.record import Call

_SPELT = {Family.SUMS: operator.add, Family.PRODUCTS: operator.mul}
# What these give is made of their first tensor; the indices only choose. Anchors chosen by their scores are
# constants still, unlike the rows of a learnt table.
_CHOOSES = {Family.PICKS, Family.GATHERS}


def operators(log: OpLog, call: Call) -> Flow:
    """What ran in ``call`` and below it; arguments and constants are placeholders.

    Only the additions and products of its own forward are spelt as such.
    """
    return Flow(_Builder(log, call).build())


def count_sums(flow: Flow) -> int:
    """How many additions of two tensors of floating-point numbers the block's own forward made."""
    sums = (node for node in flow.order if node.target is operator.add and len(node.args) == 2)
    return sum(flow.fact(node).value.is_floating_point() for node in sums)


def adds_constant(flow: Flow, addition: Addition) -> bool:
    """Whether the side that would be the shortcut is made of constants alone, none of them learnt."""
    before = flow.ancestors(addition.shortcut, itself=True)  # the active ones only choose
    made_by = {addition.node, *(node for node in before if not flow.fact(node).active)}
    learnt = any(op.weighted for node in made_by for op in flow.fact(node).ops)
    return not learnt and not flow.fact(addition.shortcut).active


class _Builder:
    def __init__(self, log: OpLog, call: Call) -> None:
        self.log, self.call = log, call
        self.graph = fx.Graph()
        self.facts: dict[fx.Node, Fact] = {}
        self.values: dict[tuple[int, Layout], fx.Node] = {}

    def build(self) -> Trace:
        first = bisect_left(self.log.steps, self.call.first_op, key=lambda step: step.op)
        last = bisect_left(self.log.steps, self.call.last_op, key=lambda step: step.op)
        for number in range(first, last):
            self._add(number)
        self.graph.output(None)
        return Trace(self.graph, self.facts, Key(exact=True), Reads())

    def _add(self, number: int) -> None:
        step = self.log.steps[number]
        op = self.log.ops[step.op]
        read = [self._value(source, view) for source, view in zip(step.sources, step.read, strict=True)]
        target: Any = op.func
        if step.owner == self.call.place:
            target = _SPELT.get(op.family, op.func) if op.family else op.func
            if op.family is Family.DIFFERENCES and op.active > 1:
                target = operator.add  # its sign is no matter here
            if op.family is Family.FUSED and len(read) == 3:
                on = any(self.facts[n].active for n in read[1:])
                fused = operator.mul if "addcmul" in op.func._schema.name else operator.truediv
                target, read = operator.add, [read[0], self._node(fused, read[1:], step.read[1][0], (), on)]
        chosen = op.family in _CHOOSES and not op.weighted and not self.facts[read[0]].active
        active = not chosen and any(self.facts[node].active for node in read)
        node = self._node(target, read, step.made[0], (op,), active, step.floating)
        self.values[number, step.made] = node

    def _value(self, source: int, view: Layout) -> fx.Node:
        """The node of what a step made, or of a view of it; a new one for a constant."""
        if source < 0:
            return self._given(view[0], active=False)
        made = self.log.steps[source].made
        if (source, made) not in self.values:
            self.values[source, made] = self._given(made[0], active=True)
        if (source, view) not in self.values:
            whole = self.values[source, made]
            active = self.facts[whole].active
            self.values[source, view] = self._node(torch.Tensor.view, [whole], view[0], (), active)
        return self.values[source, view]

    def _given(self, shape: torch.Size, *, active: bool) -> fx.Node:
        node = self.graph.placeholder("given")
        self.facts[node] = self._fact(shape, (), active)
        return node

    def _node(
        self,
        target: Any,
        read: Sequence[fx.Node],
        shape: torch.Size,
        ops: tuple[Op, ...],
        active: bool,
        floating: bool = True,
    ) -> fx.Node:
        node = self.graph.call_function(target, tuple(read))
        self.facts[node] = self._fact(shape, ops, active, floating)
        return node

    def _fact(self, shape: torch.Size, ops: tuple[Op, ...], active: bool, floating: bool = True) -> Fact:
        value = torch.empty(shape, device="meta", dtype=torch.float32 if floating else torch.int64)
        return Fact(value, frozenset(), frozenset(), ops, active)
