"""Joins: sums that take the mean of k paths (Larsson et al. 2017, section 3).

While a block is traced every mean is spelt as additions and products with numbers, so a join is a value that
is linear in k others with the weight ``1 / k`` each: ``(a + b + c) / 3``, ``0.5 * a + 0.5 * b``, the mean of
a stack. They are paths of a join if they part from one value and each runs layers and an activation of its
own; linear paths are a reparametrisation, and where one carries another on, the sum is a residual add.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from surgeon._finding.addition import Addition
from surgeon._finding.findings import Code
from surgeon._finding.flow import Flow
from surgeon._finding.paths import ADDS, PRODUCTS, carries, is_addition, ops_of
from surgeon._tracing.operators import is_layer, projects

_QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, "div", "div_", torch.true_divide}
_SAME = 1e-6


@dataclass(frozen=True, slots=True)
class Join:
    """A mean of k paths in one block's graph.

    Attributes:
        node: The mean.
        paths: What it is the mean of, from the shortest path to the longest.
        steps: The additions and products that make it up, itself included.
        code: Why it can take no gate; ``None`` if it can.
    """

    node: fx.Node
    paths: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]
    code: Code | None


def joins(flow: Flow) -> dict[fx.Node, Join]:
    """The joins of a block, each by its last addition."""
    if "joins" not in flow.shared:
        flow.shared["joins"] = _Search(flow).found
    found: dict[fx.Node, Join] = flow.shared["joins"]
    return found


def joined(flow: Flow, found: Sequence[Addition]) -> list[Addition]:
    """The same additions; those that make up a join are one, of the kind ``"mean"``, at the last of them."""
    result = list(found)
    places = {addition.node: place for place, addition in enumerate(found)}
    for last, join in joins(flow).items():
        for step in join.steps:
            if step in places:
                result[places[step]] = replace(found[places[step]], code="join", kind="", drops=(), region=())
        flops = sum(flow.fact(n).flops for part in own_parts(flow, join.paths) for n in part)
        result[places[last]] = replace(result[places[last]], code=join.code, kind="mean", flops=flops)
    return result


def own_parts(flow: Flow, paths: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """For each path the nodes that it alone needs, in order."""
    needs = [flow.ancestors(path, itself=True) for path in paths]
    parts = []
    for i, mine in enumerate(needs):
        others = set[fx.Node]().union(*(theirs for j, theirs in enumerate(needs) if j != i))
        parts.append([n for n in flow.order if n in mine and n not in others and n.op != "placeholder"])
    return parts


class _Search:
    """Follows what each value is linear in, from the first node to the last."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.found: dict[fx.Node, Join] = {}
        self.linear: dict[fx.Node, dict[fx.Node, float]] = {}
        self.steps: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in flow.order[:-1]:
            weights = self._expand(node)
            if weights and self._is_mean(node, weights):
                join = self._join(node, list(weights))
                self.found[next(n for n in reversed(join.steps) if is_addition(flow, n))] = join
            elif weights:
                self.linear[node] = weights

    def _weights(self, node: fx.Node) -> dict[fx.Node, float]:
        return self.linear.get(node, {node: 1.0})

    def _expand(self, node: fx.Node) -> dict[fx.Node, float]:
        """What a node is linear in, with the weights; empty if it is no sum and no multiple."""
        operands = node.args[:2] if not node.kwargs else ()
        if len(operands) != 2 or not isinstance(self.flow.fact(node).value, Tensor):
            return {}
        terms = [one for one in operands if isinstance(one, fx.Node)]
        numbers = [one for one in operands if isinstance(one, int | float)]
        if node.target in ADDS and len(terms) == 2:
            if not is_addition(self.flow, node) or self._residual(*terms):
                return {}
            weights = dict(self._weights(terms[0]))
            for leaf, weight in self._weights(terms[1]).items():
                weights[leaf] = weights.get(leaf, 0.0) + weight
        elif len(terms) != 1 or len(numbers) != 1 or not isinstance(self.flow.fact(terms[0]).value, Tensor):
            return {}
        elif node.target in ADDS and numbers == [0]:  # Python's own sum starts from there
            weights = self._weights(terms[0])
        elif node.target in PRODUCTS or (
            node.target in _QUOTIENTS and numbers[0] and terms[0] is operands[0]
        ):
            factor = numbers[0] if node.target in PRODUCTS else 1 / numbers[0]
            weights = {leaf: weight * factor for leaf, weight in self._weights(terms[0]).items()}
        else:
            return {}
        self.steps[node] = (*(n for term in terms for n in self.steps.get(term, ())), node)
        return weights

    def _residual(self, left: fx.Node, right: fx.Node) -> bool:
        return carries(self.flow, left, right) or carries(self.flow, right, left)

    def _is_mean(self, node: fx.Node, weights: dict[fx.Node, float]) -> bool:
        share = 1 / len(weights)
        if len(weights) < 2 or not all(math.isclose(w, share, rel_tol=_SAME) for w in weights.values()):
            return False
        return self.flow.fact(node).active and self._are_paths(list(weights))

    def _are_paths(self, leaves: Sequence[fx.Node]) -> bool:
        flow = self.flow
        shared = set.intersection(*(flow.sources(leaf, itself=True) for leaf in leaves))
        if not any(flow.fact(n).active for n in shared):
            return False
        parts = own_parts(flow, leaves)
        taken = {n for part in parts for n in _taken(flow, part)}
        if taken and not any(all(n is one or flow.feeds(one, n) for n in taken) for one in taken):
            return False  # streams of their own, which mix on the way
        weights = [_weights(flow, part) for part in parts]
        if len(set().union(*weights)) < sum(map(len, weights)):  # one network on several views of its input
            return False
        return all(
            any(map(is_layer, ops)) and not all(map(projects, ops))
            for ops in (ops_of(flow, part) for part in parts)
        )

    def _join(self, node: fx.Node, leaves: Sequence[fx.Node]) -> Join:
        flow = self.flow
        shape, steps = flow.fact(node).value.shape, tuple(dict.fromkeys(self.steps[node]))
        code: Code | None = (
            None if all(flow.fact(leaf).value.shape == shape for leaf in leaves) else "broadcast"
        )
        if _seen_elsewhere(flow, node, steps):
            code = "aliased"
        return Join(node, tuple(sorted(leaves, key=self._depth)), steps, code)

    def _depth(self, node: fx.Node) -> int:
        """How many layers the longest way to a value runs."""
        depths: dict[fx.Node, int] = self.flow.shared.setdefault("depths", {})
        if not depths:
            for one in self.flow.order[:-1]:
                own = sum(map(is_layer, self.flow.fact(one).ops))
                depths[one] = own + max((depths[n] for n in self.flow.read_by(one)), default=0)
        return depths[node]


def _taken(flow: Flow, part: Sequence[fx.Node]) -> set[fx.Node]:
    """What a path takes from the rest of the graph and depends on an input: where it parts from others."""
    inside = set(part)
    read = {source for n in part for source in flow.read_by(n)}
    return {n for n in read - inside if flow.fact(n).active}


def _weights(flow: Flow, nodes: Sequence[fx.Node]) -> set[str]:
    """The children with layers, and the weights, that run among some nodes."""
    layered = {n for n in nodes if n.op == "call_module" and any(map(is_layer, flow.fact(n).ops))}
    held = {source for n in nodes for source in n.all_input_nodes if source.op == "get_attr"}
    return {str(n.target) for n in layered | held}


def _seen_elsewhere(flow: Flow, node: fx.Node, steps: Iterable[fx.Node]) -> bool:
    """Whether steps of a join write in place to what is read later on under an older name."""
    written = {s for step in steps for s in flow.fact(step).writes}
    end = flow.position(node)
    older = (
        source
        for reader in flow.order[end + 1 :]
        for source in reader.all_input_nodes
        if flow.position(source) < end
    )
    return bool(written) and any(flow.storages(source) & written for source in older)
