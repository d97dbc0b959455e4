"""Walks through a traced block: what one value needs and another does not, what a sum hands on unchanged."""

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from surgeon._finding.flow import Flow
from surgeon._tracing.fake import storage
from surgeon._tracing.operators import is_layer, scales
from surgeon._tracing.oplog import Op

ADDS = {operator.add, operator.iadd}  # surgeon._tracing.canonical leaves no other spelling
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


def side(flow: Flow, one: fx.Node, other: fx.Node) -> list[fx.Node]:
    """The nodes whose numbers ``one`` is made of and ``other`` is not, in order.

    What only lends its shape is on no side: ``x[..., : y.shape[-1]]`` is made of ``x`` alone.
    """
    mine = flow.sources(one, itself=True) - flow.sources(other, itself=True)
    return [n for n in flow.order if n in mine and n.op != "placeholder"]


def ops_of(flow: Flow, nodes: Iterable[fx.Node]) -> list[Op]:
    return [op for node in nodes for op in flow.fact(node).ops if op.active]


def is_addition(flow: Flow, node: fx.Node) -> bool:
    if getattr(node.target, "plain", node.target) not in ADDS:
        return False
    value = flow.fact(node).value
    operands = [a for a in node.args if isinstance(a, fx.Node) and isinstance(flow.fact(a).value, Tensor)]
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return floating and len(operands) == 2 and any(flow.fact(a).active for a in operands)


def stems(flow: Flow, node: fx.Node, end: fx.Node | None = None) -> list[fx.Node]:
    """``node`` and the values it hands on: what it is a sum of, a view of its own shape of, a scaling of.

    Nothing is looked for behind ``end``.
    """
    found, todo = dict.fromkeys([node]), [node]
    while todo:
        one = todo.pop()
        for source in one.all_input_nodes if one is not end else ():
            tensor = isinstance(flow.fact(source).value, Tensor)
            if source not in found and tensor and (one.target in ADDS or _hands_on(flow, source, one)):
                found[source] = None
                todo.append(source)
    return list(found)


def _hands_on(flow: Flow, source: fx.Node, node: fx.Node) -> bool:
    before, after = flow.fact(source).value, flow.fact(node).value
    if node.op == "get_attr" or not isinstance(after, Tensor) or before.shape != after.shape:
        return False
    scaled = all(scales(op) for op in flow.fact(node).ops)
    # Without operators the node must return its argument, as nn.Identity does.
    return scaled and (bool(flow.fact(node).ops) or storage(before) == storage(after))


def carries(flow: Flow, shortcut: fx.Node, branch: fx.Node) -> bool:
    """Whether ``branch`` is computed from ``shortcut`` or from a term that ``shortcut`` carries unchanged.

    A shortcut may itself be a constant (a class token on its first block); a constant term makes none. Where
    ``branch`` is a term itself, as in ``x + a * (f(x) - x)``, what it is a sum of is none of ``shortcut``'s.
    """
    carried = [stem for stem in stems(flow, shortcut, branch) if stem is shortcut or flow.fact(stem).active]
    return any(flow.feeds(stem, branch) for stem in carried)


def terms(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """What a chain of additions sums up; a residual add is one term."""
    if not is_addition(flow, node):
        return [node]
    left, right = (operand for operand in node.args if isinstance(operand, fx.Node))
    if carries(flow, left, right) or carries(flow, right, left):
        return [node]
    return [*terms(flow, left), *terms(flow, right)]


def layers(flow: Flow, one: fx.Node, other: fx.Node) -> tuple[int, int]:
    """The fewest and the most layers behind a term of the sum ``one`` that ``other`` does not need."""
    counts = [sum(is_layer(op) for op in ops_of(flow, side(flow, t, other))) for t in terms(flow, one)]
    return min(counts), max(counts)


def writes_to(node: fx.Node) -> fx.Node | None:
    """The operand that an addition writes its result to; ``None`` if it makes a new tensor."""
    left = node.args[0] if node.target is operator.iadd else None
    return left if isinstance(left, fx.Node) else None


def around(flow: Flow, starts: Sequence[fx.Node], end: fx.Node, gap: fx.Node) -> bool:
    """Whether what is computed from ``starts`` reaches ``end`` by a way around one node, too."""
    todo = [node for node in starts if node is not gap]
    seen = {gap, *todo}
    while todo:
        node = todo.pop()
        if node is end:
            return True
        new = {user for user in flow.users(node) if user not in seen and flow.feeds(node, user)}
        seen |= new
        todo.extend(new)
    return False
