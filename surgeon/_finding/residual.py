"""Finds the residual adds in the traced graph of one block, and says why every other addition is none.

An addition ``a + b`` of two activations is a residual add when one side carries the block's input forward:

* ``"identity"``: one side, or what it hands on (as a term of a sum, a view, times a scale per channel), is
  an ancestor of the other side, so the other side is a function of it;
* ``"projection"``: both sides part from a common ancestor, one of them through layers without an
  activation (convolution, linear, norm, pooling, resizing) or through a single layer where the other has
  more: that one is the shortcut.

A block may get both from its caller: ``output(branch(x), x)`` or ``block(x, shortcut=project(x))`` performs
the add, and the recording knows how one argument was computed from the other.

Everything is read from the graph and from the ATen operators that each node ran; no module class, model
or library is known by name.
"""

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from surgeon._finding.findings import REASONS
from surgeon._finding.flow import Flow
from surgeon._tracing.example import tensors
from surgeon._tracing.fake import storage
from surgeon._tracing.operators import (
    drops_rows,
    is_coin,
    is_layer,
    is_linear,
    is_masking,
    is_softmax,
    pools,
    projects,
    scales,
    sums,
)
from surgeon._tracing.oplog import Op

_ADDS = {operator.add, operator.iadd}  # surgeon._tracing.canonical leaves no other spelling
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


@dataclass(frozen=True, slots=True)
class Addition:
    """One addition in one block's graph, as far as the graph alone can tell.

    Attributes:
        node: The addition.
        ordinal: Its place among the additions of the block: 0, 1, ...
        code: Why it is no residual add; ``None`` if it is one.
        kind: ``"identity"`` or ``"projection"``, ``""`` if neither could be told, ``"left"`` or ``"right"``
            if the user told that this side is the shortcut.
        shortcut, branch: Its two sides; left and right as written with an empty kind.
        drops: The nodes of stochastic depth already on the branch: calls of parameter-free modules, or
            multiplications, that scale whole rows at random.
        region: The nodes that run for the branch alone; empty if its result is also used elsewhere.
    """

    node: fx.Node
    ordinal: int
    code: str | None
    kind: str
    shortcut: fx.Node
    branch: fx.Node
    drops: tuple[fx.Node, ...] = ()
    region: tuple[fx.Node, ...] = ()
    flops: int = 0


def additions(flow: Flow, *, regions: bool = True) -> list[Addition]:
    """Every addition of an activation and another tensor in the graph, classified; the graph is only read.

    Args:
        flow: The graph.
        regions: Whether to tell which nodes run for each branch alone.
    """
    nodes = [node for node in flow.order if _is_addition(flow, node)]
    found = nest(flow, [_classify(flow, node, i, regions) for i, node in enumerate(nodes)])
    merged = _merged(flow, nodes)
    return [replace(a, code="fusion") if a.code is None and a.node in merged else a for a in found]


def nest(flow: Flow, found: Sequence[Addition]) -> list[Addition]:
    """The same additions, but refused where they lie inside the branch of a residual add among them."""
    inside: set[fx.Node] = set()
    nested: list[Addition] = []
    for addition in reversed(found):
        within = addition.node in inside and addition.code != "bias"
        nested.append(replace(addition, code="nested") if within else addition)
        if nested[-1].code is None:
            inside.update(side(flow, addition.branch, addition.shortcut))
    return nested[::-1]


def told(flow: Flow, addition: Addition, kind: str) -> Addition | str:
    """An addition whose shortcut the user tells, or why it cannot take a gate.

    Args:
        flow: The graph.
        addition: The addition, refused or not.
        kind: The side that is the shortcut, ``"left"`` or ``"right"`` as the sum is written.
    """
    left, right = (operand for operand in addition.node.args if isinstance(operand, fx.Node))
    shortcut, branch = (left, right) if kind == "left" else (right, left)
    if not flow.fact(shortcut).active:
        return f"its {kind} side depends on no input, so it is no shortcut"
    problem = _misshapen(flow, addition.node, shortcut, branch)
    if problem is not None:
        return REASONS[problem]
    return _described(flow, replace(addition, code=None, kind=kind, shortcut=shortcut, branch=branch))


def projected(flow: Flow, addition: Addition) -> Addition | None:
    """An addition whose shortcut its caller projected from the branch's argument; ``None`` if it is none.

    As within a block, a branch that might be such a projection itself is no branch.
    """
    found = replace(addition, code=None, kind="projection")
    linear = all(projects(op) for op in _ops(flow, side(flow, addition.branch, addition.shortcut)))
    return None if linear or _unfit(flow, found) else found


def meant(flow: Flow, addition: Addition | None, kind: str, shortcut: str | None) -> Addition | None:
    """The addition with the sides that a gate of ``kind`` has; ``None`` if it has no such sides.

    ``shortcut`` says which operand was the shortcut before. It counts where only stochastic depth, which a
    trace of the evaluating block does not show, had told the branch.
    """
    if addition is not None and addition.code == "linear" and not addition.kind and shortcut:
        kind = shortcut
    if addition is None or kind not in ("left", "right"):
        return addition if addition is not None and addition.kind else None
    found = told(flow, addition, kind)
    return found if isinstance(found, Addition) else None


def _described(flow: Flow, addition: Addition, regions: bool = True) -> Addition:
    """The same with what belongs to its branch."""
    work = side(flow, addition.branch, addition.shortcut)
    return replace(
        addition,
        drops=tuple(_drops(flow, work)),
        region=flow.region(addition.branch, addition.node) if regions else (),
        flops=sum(flow.fact(n).flops for n in work),
    )


def _merged(flow: Flow, nodes: list[fx.Node]) -> set[fx.Node]:
    """Additions side by side whose sums are concatenated: paths of a cell, not steps of a residual stream."""
    merged: set[fx.Node] = set()
    for cat in (node for node in flow.order if node.target in (torch.cat, torch.concat)):
        parts = {stem for source in cat.all_input_nodes for stem in _stems(flow, source)} & set(nodes)
        for a in parts:
            if any(a is not b and not flow.feeds(a, b) and not flow.feeds(b, a) for b in parts):
                merged.add(a)
    return merged


def writes_to(node: fx.Node) -> fx.Node | None:
    """The operand that an addition writes its result to; ``None`` if it makes a new tensor."""
    left = node.args[0] if node.target is operator.iadd else None
    return left if isinstance(left, fx.Node) else None


def _is_addition(flow: Flow, node: fx.Node) -> bool:
    if node.target not in _ADDS:
        return False
    value = flow.fact(node).value
    operands = [a for a in node.args if isinstance(a, fx.Node) and isinstance(flow.fact(a).value, Tensor)]
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return floating and len(operands) == 2 and any(flow.fact(a).active for a in operands)


def _classify(flow: Flow, node: fx.Node, ordinal: int, regions: bool) -> Addition:
    left, right = (operand for operand in node.args if isinstance(operand, fx.Node))
    kind, shortcut, branch, code = _sides(flow, left, right)
    refusal = code if not kind else _misshapen(flow, node, shortcut, branch)
    if refusal is not None:
        return Addition(node, ordinal, refusal, "", shortcut, branch)
    found = _described(flow, Addition(node, ordinal, code, kind, shortcut, branch), regions)
    # Stochastic depth that is there says that its author took this for a branch.
    return found if code or found.drops else replace(found, code=_unfit(flow, found))


def _misshapen(flow: Flow, node: fx.Node, shortcut: fx.Node, branch: fx.Node) -> str | None:
    shape = flow.fact(node).value.shape
    if not flow.fact(shortcut).value.shape == flow.fact(branch).value.shape == shape:
        return "broadcast"
    return "aliased" if _seen_elsewhere(flow, node) else None


_Sides = tuple[str, fx.Node, fx.Node, str | None]


def _sides(flow: Flow, left: fx.Node, right: fx.Node) -> _Sides:
    """Kind, shortcut, branch and reason code; without a kind the two operands as they are."""
    forward, backward = _carries(flow, left, right), _carries(flow, right, left)
    if forward != backward:
        return ("identity", left, right, None) if forward else ("identity", right, left, None)
    if forward:
        return "", left, right, "fusion"
    if not (flow.fact(left).active and flow.fact(right).active):
        return "", left, right, "bias"
    common = flow.sources(left) & flow.sources(right)
    if not any(flow.fact(n).active and tensors(flow.fact(n).value) for n in common):
        return _handed_in(flow, left, right)
    return _projection(flow, left, right)


def _handed_in(flow: Flow, left: fx.Node, right: fx.Node) -> _Sides:
    """Two arguments meet; one that is added as it is may be a shortcut, which only the caller knows."""
    given = [any(stem.op == "placeholder" for stem in _stems(flow, operand)) for operand in (left, right)]
    if given[0] == given[1]:
        return "", left, right, "no-shortcut"
    return ("identity", *((left, right) if given[0] else (right, left)), "no-shortcut")


def arguments_of(flow: Flow, addition: Addition) -> tuple[set[int], set[int]]:
    """The arguments of the block that a shortcut hands on, and those that a branch is computed from.

    Each tensor among the arguments stands for its place, counted from 0 through positional and keyword ones.
    """
    places, count = dict[fx.Node, range](), 0
    for node in flow.order:
        if node.op == "placeholder":
            end = count + len(tensors(flow.fact(node).value))
            places[node], count = range(count, end), end
    return (
        {place for n in _stems(flow, addition.shortcut) for place in places.get(n, ())},
        {place for n in flow.sources(addition.branch) for place in places.get(n, ())},
    )


def _projection(flow: Flow, left: fx.Node, right: fx.Node) -> _Sides:
    """The side without an activation, or of a single layer, is the shortcut; there must be just one such."""
    if _is_mixture(flow, left, right):
        return "", left, right, "gating"
    sides = [side(flow, left, right), side(flow, right, left)]
    ops = [_ops(flow, work) for work in sides]
    plain = [all(projects(op) for op in mine) for mine in ops]
    if all(plain):  # then only stochastic depth that is there can tell the branch
        plain = [not any(_drops(flow, work)) for work in sides]
        if plain[0] == plain[1]:
            return "", left, right, "linear"
    if not any(plain):
        # A pre-activation projection has its norm and activation before its one layer.
        layers = [sum(is_layer(op) for op in mine) for mine in ops]
        plain = [layers[0] <= 1 < layers[1], layers[1] <= 1 < layers[0]]
    if not any(plain):
        return "", left, right, "fusion"
    return ("projection", left, right, None) if plain[0] else ("projection", right, left, None)


def _carries(flow: Flow, shortcut: fx.Node, branch: fx.Node) -> bool:
    """Whether ``branch`` is computed from ``shortcut`` or from a term that ``shortcut`` carries unchanged.

    A shortcut may itself be a constant (a class token on its first block); a constant term makes none.
    """
    stems = [stem for stem in _stems(flow, shortcut) if stem is shortcut or flow.fact(stem).active]
    return any(flow.feeds(stem, branch) for stem in stems)


def _stems(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """``node`` and the values it hands on: what it is a sum of, a view of its own shape of, a scaling of."""
    found, todo = dict.fromkeys([node]), [node]
    while todo:
        one = todo.pop()
        for source in one.all_input_nodes:
            tensor = isinstance(flow.fact(source).value, Tensor)
            if source not in found and tensor and (one.target in _ADDS or _hands_on(flow, source, one)):
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


def side(flow: Flow, one: fx.Node, other: fx.Node) -> list[fx.Node]:
    """The nodes that ``one`` needs and ``other`` does not, in order."""
    mine = flow.ancestors(one, itself=True) - flow.ancestors(other, itself=True)
    return [n for n in flow.order if n in mine and n.op != "placeholder"]


def _unfit(flow: Flow, addition: Addition) -> str | None:
    """Why a branch beside an identity or projection shortcut is none worth a gate."""
    work = side(flow, addition.branch, addition.shortcut)
    ops = _ops(flow, work)
    weighted = [op for op in ops if op.weighted]
    if addition.kind == "projection":
        if not weighted:
            return "arithmetic"
        if _reads_stream(flow, work, addition.region):
            return "fusion"
    if weighted and all(op.depthwise for op in weighted):
        return "position"
    if all(is_linear(op) for op in ops) and not pools(ops):
        return "linear"
    return "scores" if addition.kind == "projection" and _is_score(flow, addition.node) else None


def _reads_stream(flow: Flow, work: list[fx.Node], region: Collection[fx.Node]) -> bool:
    """Whether a branch only reads, linearly, a stream with sums of its own that goes on elsewhere too.

    So do heads at several depths of a network, whose results are added.
    """
    stream = [node for node in work if node not in region]
    own = any(node.target in _ADDS for node in stream) or any(sums(op) for op in _ops(flow, stream))
    return bool(region) and own and all(projects(op) for op in _ops(flow, region))


def _is_score(flow: Flow, node: fx.Node) -> bool:
    """Whether a softmax alone reads a value, as it is or behind masks, sums and scales."""

    def weighs(reader: fx.Node) -> bool:
        if reader.op == "output":
            return False
        ops = flow.fact(reader).ops
        return any(is_softmax(op) for op in ops) or (
            all(is_masking(op) for op in ops) and _is_score(flow, reader)
        )

    readers = [reader for reader in flow.users(node) if flow.feeds(node, reader)]  # not those of its shape
    return bool(readers) and all(weighs(reader) for reader in readers)


def _seen_elsewhere(flow: Flow, node: fx.Node) -> bool:
    """Whether an in-place addition changes a tensor that a later node reads through an earlier alias."""
    left = writes_to(node)
    if left is None:
        return False
    end, memory = flow.position(node), flow.storages(left)
    aliases = [n for n in flow.order[:end] if n is not left and flow.storages(n) & memory]
    return any(flow.position(user) > end for alias in aliases for user in alias.users)


def _is_mixture(flow: Flow, *sides: fx.Node) -> bool:
    def gated(node: fx.Node) -> bool:
        product = node.target in _PRODUCTS
        return (
            product
            and all(flow.fact(a).active for a in node.all_input_nodes)
            and len(node.all_input_nodes) > 1
        )

    return all(gated(side) for side in sides)


def _drops(flow: Flow, work: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The nodes that multiply whole rows by coins: stochastic depth that is already there."""
    for node in work:
        value = flow.fact(node).value
        if not isinstance(value, Tensor) or not value.ndim or value.numel() <= value.shape[0]:
            continue
        if node.op == "call_module":
            if drops_rows(flow.fact(node).ops, value.shape[0]):
                yield node
        elif node.target in _PRODUCTS and row_mask(flow, node) is not None:
            yield node


def row_mask(flow: Flow, product: fx.Node) -> fx.Node | None:
    """The operand of a multiplication that is a coin per row or batch; ``None`` if there is none."""
    for operand in product.all_input_nodes:
        fact = flow.fact(operand)
        if fact.active or not isinstance(fact.value, Tensor):
            continue
        made_by = [op for n in _makers(flow, operand, product) for op in flow.fact(n).ops]
        if is_coin(made_by) and fact.value.numel() in (1, flow.fact(product).value.shape[0]):
            return operand
    return None


def _makers(flow: Flow, operand: fx.Node, reader: fx.Node) -> set[fx.Node]:
    """The nodes that made what ``reader`` finds in ``operand``, later writes in place included."""
    memory = flow.storages(operand)
    before = flow.order[: flow.position(reader)]
    last = {operand, *(n for n in before if flow.feeds(operand, n) and flow.fact(n).writes & memory)}
    return {maker for n in last for maker in flow.sources(n, itself=True)}


def mask_nodes(flow: Flow, drop: fx.Node) -> set[fx.Node]:
    """A node of `Addition.drops` and the nodes that make its coins."""
    mask = None if drop.op == "call_module" else row_mask(flow, drop)
    return {drop} if mask is None else {drop, *flow.region(mask, drop)}


def _ops(flow: Flow, nodes: Iterable[fx.Node]) -> list[Op]:
    return [op for node in nodes for op in flow.fact(node).ops if op.active]
