"""What a trace is: a graph, and for each of its nodes what is known from running it on fake values."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgeon._torch import traced_assert
from surgeon._tracing.children import Below
from surgeon._tracing.key import Key
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import Op
from surgeon._tracing.reads import Reads

_COIN = (
    "its forward tosses a coin of its own: random numbers that it draws decide what runs. Set the rate of "
    "that coin to 0 before surgeon.apply, as its gate is to take over"
)


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one node from running it on fake values.

    Attributes:
        value: Its value; tensors are fake.
        reads: Storages of the tensors among its arguments.
        writes: Those of them that it changed in place.
        ops: The ATen operators it ran.
        active: Whether its value is, or holds, a tensor that depends on a model input.
        shapes: Storages of the tensors among its arguments that it only read the shape, dtype or device of.
    """

    value: Any
    reads: frozenset[int]
    writes: frozenset[int]
    ops: tuple[Op, ...]
    active: bool
    shapes: frozenset[int] = frozenset()

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)


Facts = Mapping[fx.Node, Fact]


@dataclass(frozen=True, slots=True)
class Trace:
    """The graph of one block's forward for one way of calling it.

    Attributes:
        graph: One placeholder per argument (positional first, then keywords, as called), then the body.
        facts: What each node is.
        key: What decides that the forward runs this code; exact if the graph holds for these shapes only.
        reads: The attributes of the block and its children that were read.
        below: How the modules below the block were treated.
    """

    graph: fx.Graph
    facts: dict[fx.Node, Fact]
    key: Key
    reads: Reads
    below: Below = field(default_factory=Below)


def is_size(node: fx.Node, fact: Fact) -> bool:
    """Whether a node only computes sizes, indices or flags: no tensor in its value and nothing written."""
    pure = node.op in ("call_function", "call_method", "get_attr")
    return pure and not tensors(fact.value) and not fact.writes and node.target is not traced_assert


def drop_unused(graph: fx.Graph, facts: dict[fx.Node, Fact]) -> None:
    """Erases what nothing uses; fx's own dead-code elimination is unsound on in-place graphs."""
    for node in reversed(graph.nodes):
        fact = facts.get(node)
        if fact is None or node.users or node.op == "placeholder":
            continue
        if is_size(node, fact) or _is_pure(node, fact):
            graph.erase_node(node)


def _is_pure(node: fx.Node, fact: Fact) -> bool:
    """Whether a node only computes tensors: no write, no draw, no module that may keep a state."""
    if node.target is operator.getitem:  # unpacking takes every item, wanted or not
        return True
    computes = node.op in ("call_function", "call_method") and bool(fact.ops)
    return computes and not fact.writes and not any(op.random for op in fact.ops)


def numbers_asked(facts: Facts, node: fx.Node, ran: Sequence[Op]) -> str:
    """Why a trace ends where code asks for the numbers in a tensor."""
    behind, todo = set[fx.Node](), [node]
    while todo:
        one = todo.pop()
        behind.add(one)
        todo += [n for n in one.all_input_nodes if n not in behind]
    drawn = any(op.random for n in behind if n in facts for op in facts[n].ops)
    if drawn or any(op.random for op in ran):
        return _COIN
    where = f"{node.target}, which it calls," if node.op == "call_module" else "its forward"
    return (
        f"{where} looks at the numbers in a tensor, which only a run tells. If they are drawn (a coin of "
        "its own), set their rate to 0 before surgeon.apply"
    )


def made_here(facts: Facts, node: fx.Node) -> bool:
    """Whether a value is an object that the forward made or got from a child, and no argument."""
    while node.target in (getattr, operator.getitem):
        node = node.all_input_nodes[0]
    given = [fact.value for other, fact in facts.items() if other.op in ("placeholder", "get_attr")]
    return not any(facts[node].value is value for value in given)


def counts_pieces(facts: Facts, node: fx.Node) -> bool:
    """Whether the length of the node's value follows from a size: pieces of a tensor, unless counted."""
    pieces = bool(tensors(facts[node].value)) and node.op in ("call_function", "call_method")
    given = [*node.args[1:2], *node.kwargs.values()]
    counted = node.target in (torch.chunk, "chunk") or any(isinstance(a, (list, tuple)) for a in given)
    return pieces and node.target is not list and not counted
