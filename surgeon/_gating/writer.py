"""Copies a block's trace node by node, with gates in place of some additions, into generated Python."""

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from surgeon._finding.addition import Addition
from surgeon._finding.drops import row_mask
from surgeon._finding.flow import Flow
from surgeon._finding.joins import Join
from surgeon._finding.paths import writes_to
from surgeon._gating.adds import laid_out, memory_order
from surgeon._gating.joins import masked_mean
from surgeon._gating.lifted import Lifted
from surgeon._gating.rowwise import nested
from surgeon._gating.skip import Adding
from surgeon._tracing.facts import is_size
from surgeon._tracing.fake import storage
from surgeon._tracing.nests import tensors

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Gated:
    """What stands in an addition's place.

    Attributes:
        reads: The nodes whose values it takes.
        gates: Its gate, and those of the sums inside its branch, by place.
        emit: ``emit(graph, value of, gate of)`` puts it into a graph.
        order: How the numbers of the sum lie in memory, where those of the shortcut lie otherwise.
    """

    reads: tuple[fx.Node, ...]
    gates: tuple[int, ...]
    emit: Callable[[fx.Graph, Callable[[fx.Node], fx.Node], Callable[[int], fx.Node]], fx.Node]
    order: tuple[int, ...] = ()


class Writer:
    """Copies a traced graph node by node, with some additions replaced."""

    def __init__(self, flow: Flow, rewritten: bool, saved: Collection[int]) -> None:
        self.flow, self.rewritten = flow, rewritten
        arguments = [node for node in flow.order if node.op == "placeholder"]
        self.saved = {node for place, node in enumerate(arguments) if place in saved}
        self.replaced: dict[fx.Node, _Gated] = {}
        self.left_out: set[fx.Node] = set()
        self.passed: dict[fx.Node, fx.Node] = {}

    def add(self, index: int, addition: Addition, form: Callable[..., Tensor]) -> None:
        """Replaces an addition by ``form(gate, shortcut, branch, onto)``."""
        self._take_off_drops(addition)
        sides, onto = (addition.shortcut, addition.branch), _onto(addition)

        def emit(graph: fx.Graph, value: Callable[..., fx.Node], gate: Callable[..., fx.Node]) -> fx.Node:
            return graph.call_function(form, (gate(index), *map(value, sides), onto))

        self.replaced[addition.node] = _Gated(sides, (index,), emit, memory_order(self.flow, addition))

    def value(self, index: int, addition: Addition, form: Callable[..., Tensor]) -> None:
        """Replaces new features by ``form(gate, features)``."""
        self._take_off_drops(addition)
        node, own = addition.node, self.passed.get(addition.node)

        def emit(graph: fx.Graph, value: Callable[..., fx.Node], gate: Callable[..., fx.Node]) -> fx.Node:
            made = graph.node_copy(node, value) if own is None else value(own)
            return graph.call_function(form, (gate(index), made))

        self.replaced[node] = _Gated(tuple(node.all_input_nodes if own is None else (own,)), (index,), emit)

    def join(self, index: int, join: Join) -> None:
        """Replaces the mean of a join by that of the paths which survive."""
        for step in reversed(join.steps):
            if self.flow.users(step) <= self.left_out | {join.node} and step is not join.node:
                self.left_out.add(step)

        def emit(graph: fx.Graph, value: Callable[..., fx.Node], gate: Callable[..., fx.Node]) -> fx.Node:
            return graph.call_function(masked_mean, (gate(index), *map(value, join.paths)))

        self.replaced[join.node] = _Gated(join.paths, (index,), emit)

    def lift(
        self, index: int, addition: Addition, form: Adding, lifted: Lifted, reads: Sequence[fx.Node]
    ) -> None:
        """Moves the branch of an addition into a function that ``form`` calls if the gate is open."""
        self.left_out |= self._inside(addition) - {addition.node}
        how = _onto(addition), fresh(self.flow, addition, rewritten=self.rewritten)

        def emit(graph: fx.Graph, value: Callable[..., fx.Node], gate: Callable[..., fx.Node]) -> fx.Node:
            block = next(iter(graph.nodes))
            head = (gate(index), value(addition.shortcut), *how, block)
            return graph.call_function(
                _bound(form, lifted), (*head, *map(value, reads), *map(gate, lifted.gates))
            )

        order = memory_order(self.flow, addition)
        self.replaced[addition.node] = _Gated(
            (addition.shortcut, *reads), (index, *lifted.gates), emit, order
        )

    def lifted(self, addition: Addition) -> tuple[Lifted, list[fx.Node]]:
        """The branch as a function of its own, and the nodes whose values it reads."""
        self._take_off_drops(addition)
        flow, shortcut = self.flow, addition.shortcut
        run, reads, gates = self._branch(addition)
        count = flow.fact(shortcut).value.shape[:1]
        facts = [flow.fact(node) for node in reads]
        rows = [
            i
            for i, f in enumerate(facts)
            if f.active and isinstance(f.value, Tensor) and f.value.shape[:1] == count
        ]
        uses = [n for n in (*addition.region, *reads) if n.op in ("call_module", "get_attr")]
        feeds = [
            i
            for i, node in enumerate(reads)
            if node is not shortcut
            and node.op != "get_attr"
            and tensors(facts[i].value)
            and (nested(facts[i].value) or not flow.precedes(node, shortcut))
        ]
        owns = [str(n.target) for n in uses if n in addition.region or n.op == "get_attr"]
        saved = [i for i in rows if reads[i] in self.saved]
        owned = tuple(dict.fromkeys(owns))
        return Lifted(run, tuple(rows), owned, tuple(feeds), tuple(saved), gates=gates), reads

    def write(self) -> Run:
        graph = fx.Graph()
        _receiver(graph)
        gates = graph.placeholder("_gates")

        def gate(index: int) -> fx.Node:
            return graph.call_function(operator.getitem, (gates, index))

        env: dict[fx.Node, fx.Node] = {}
        self._copy([node for node in self.flow.order if node not in self.left_out], graph, env, gate)
        return _compiled(graph)

    def _copy(
        self,
        nodes: Sequence[fx.Node],
        graph: fx.Graph,
        env: dict[fx.Node, fx.Node],
        gate: Callable[[int], fx.Node],
    ) -> None:
        """Copies nodes into a graph, additions with a gate as what stands in their place."""
        for node in nodes:
            if node in self.replaced:
                env[node] = self.replaced[node].emit(graph, env.__getitem__, gate)
                if order := self.replaced[node].order:
                    env[node] = graph.call_function(laid_out, (env[node], order))
                if writes_to(node) is not None:  # the name that was added to in place now means the sum
                    env[node.args[0]] = env[node]  # type: ignore[index]
            elif node in self.passed:
                env[node] = env[self.passed[node]]
            elif node.op == "placeholder":
                env[node] = _argument(graph, node)
            else:
                env[node] = graph.node_copy(node, env.__getitem__)

    def _take_off_drops(self, addition: Addition) -> None:
        for drop in addition.drops:
            mask = None if drop.op == "call_module" else row_mask(self.flow, drop)
            values = [
                n
                for n in drop.all_input_nodes
                if n is not mask and isinstance(self.flow.fact(n).value, Tensor)
            ]
            self.passed[drop] = values[0]
            if mask is not None:
                self.left_out |= set(self.flow.region(mask, drop))

    def _branch(self, addition: Addition) -> tuple[Run, list[fx.Node], tuple[int, ...]]:
        """The branch as a function ``(block, *reads, *gates)``, the nodes that it reads, the gates inside."""
        graph, env, reads = fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
        _receiver(graph)
        own = self._inside(addition)
        for node in [n for n in addition.region if n in own]:
            self._gather(node, own, reads)
        for node in reads:
            env[node] = _argument(graph, node)
        todo = sorted(own, key=self.flow.position)
        gated = (self.replaced[node] for node in todo if node in self.replaced)
        inside = tuple(dict.fromkeys(index for one in gated for index in one.gates))
        gates = {index: graph.placeholder(f"_gate_{index}") for index in inside}
        self._copy(todo, graph, env, gates.__getitem__)
        graph.output(env[addition.branch])
        return _compiled(graph), reads, inside

    def _inside(self, addition: Addition) -> set[fx.Node]:
        """The nodes that move. What only picks an item out of a nest made outside costs nothing and stays.

        So the branch is handed the tensors that it reads, each of which has rows or has none. What has moved
        into the branch of a sum inside this one moves along with that sum.
        """
        own: set[fx.Node] = set()
        for node in addition.region:
            stays = node is not addition.branch and _picks(self.flow, node) and node.args[0] not in own
            if not stays and node not in self.left_out:
                own.add(node)
        return own

    def _gather(self, node: fx.Node, own: set[fx.Node], reads: list[fx.Node]) -> None:
        """Sorts what ``node`` uses: sizes are read anew inside the branch, all else is handed in."""
        for source in self._uses(node):
            if source in own or source in reads:
                continue
            if self._reads_anew(source):
                own.add(source)
                self._gather(source, own, reads)
            else:
                reads.append(source)

    def _uses(self, node: fx.Node) -> Sequence[fx.Node]:
        if node in self.replaced:
            return self.replaced[node].reads
        return [self.passed[node]] if node in self.passed else node.all_input_nodes

    def _reads_anew(self, node: fx.Node) -> bool:
        size = node.op != "placeholder" and is_size(node, self.flow.fact(node))
        return size and not _picks(self.flow, node)


def fresh(flow: Flow, addition: Addition, *, rewritten: bool) -> bool:
    """Whether what stands for a sum without its branch must be a copy of the shortcut.

    Something writes in place later on to the result, or to the shortcut it would share.

    Args:
        flow: The block's trace.
        addition: The sum.
        rewritten: Something outside the block writes to its output in place.
    """
    if _onto(addition) == "shortcut":
        return False  # there the result is the shortcut in the original too
    shared = {storage(flow.fact(n).value) for n in (addition.node, addition.shortcut) if n is not None}
    later = flow.order[flow.position(addition.node) + 1 : -1]
    return rewritten or any(shared & flow.fact(node).writes for node in later)


def _picks(flow: Flow, node: fx.Node) -> bool:
    """Whether a node only takes an item out of a nest of tensors, and which one is written in the code."""
    if node.target not in (operator.getitem, getattr) or node.all_input_nodes != [node.args[0]]:
        return False
    return nested(flow.fact(node.all_input_nodes[0]).value) and not flow.fact(node).ops


def _onto(addition: Addition) -> str:
    """The side that an addition writes to in place: ``"shortcut"``, ``"branch"``, or ``""`` for neither."""
    left = writes_to(addition.node)
    if left is None:
        return ""
    return "shortcut" if left is addition.shortcut else "branch"


@functools.cache
def _bound(form: Adding, lifted: Lifted) -> Run:
    """A form of adding with its branch filled in, under a name of its own for generated code."""
    bound: Any = functools.partial(form, lifted)
    bound.__name__, bound.__qualname__, bound.__module__ = form.__name__, form.__name__, __name__
    made: Run = bound
    return made


def _receiver(graph: fx.Graph) -> fx.Node:
    """The block as a value in generated code; fx clears names after their last use, ``self`` must stay."""
    return graph.create_node("placeholder", "self", name="block")


def _argument(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A placeholder for ``node``; its target is private, so that no argument's name can clash."""
    return graph.create_node("placeholder", f"_{node.name}_", name=node.name)


_KNOWN: dict[tuple[Any, ...], Run] = {}


def _compiled(graph: fx.Graph) -> Run:
    """Python source of a graph as a function; equal blocks share one, so that compilers see it once."""
    for node in graph.nodes:
        node.type = None
    code = graph.python_code("self")
    key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
    if key not in _KNOWN:
        graph.lint()
        scope = dict(code.globals)
        exec(compile(code.src, "<surgeon>", "exec"), scope)  # noqa: S102 - what fx wrote, as GraphModule does
        _KNOWN[key] = scope["forward"]
    return _KNOWN[key]
