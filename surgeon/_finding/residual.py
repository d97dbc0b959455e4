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

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from surgeon._finding.addition import Addition
from surgeon._finding.branch import unfit
from surgeon._finding.drops import drops, mixes
from surgeon._finding.findings import REASONS, Code
from surgeon._finding.flow import Flow
from surgeon._finding.joins import joined
from surgeon._finding.paths import (
    ADDS,
    PRODUCTS,
    around,
    carries,
    is_addition,
    layers,
    ops_of,
    side,
    stems,
    writes_to,
)
from surgeon._tracing.canonical import SPELT
from surgeon._tracing.nests import tensors
from surgeon._tracing.operators import is_layer, projects


def additions(flow: Flow, *, regions: bool = True) -> list[Addition]:
    """Every addition of an activation and another tensor in the graph, classified; the graph is only read.

    Args:
        flow: The graph.
        regions: Whether to tell which nodes run for each branch alone.
    """
    nodes = [node for node in flow.order if is_addition(flow, node)]
    # Those written with a plus come first, and are named as if there were no others.
    ordinals = {node: i for i, node in enumerate(sorted(nodes, key=lambda node: SPELT in node.meta))}
    found = [_classify(flow, node, ordinals[node], regions) for node in nodes]
    merged = _merged(flow, nodes)
    found = [replace(a, code="fusion") if a.code is None and a.node in merged else a for a in found]
    return joined(flow, found)


def nest(flow: Flow, found: Sequence[Addition], steps_in: Callable[[fx.Node], int]) -> list[Addition]:
    """The same additions, but of those inside one another only one is left, from the outside in.

    Inside the branch of a residual add all others are refused, as nested where no better reason is known. But
    where two or more of them follow on one another from its shortcut to its end, they are the steps of the
    stream and it is a long skip over them.

    Args:
        flow: The graph.
        found: What `additions` gives.
        steps_in: How many residual adds the call of a module holds.
    """
    inside: set[fx.Node] = set()
    nested: list[Addition] = []
    for place in reversed(range(len(found))):
        addition = found[place]
        if addition.node in inside and addition.code not in ("bias", "detached"):
            addition = replace(addition, code="nested")
        elif addition.kind == "mean":
            pass  # joins and residual adds on its paths are dropped each by itself, too
        elif (
            addition.code is None and not addition.drops and _is_long(flow, addition, found[:place], steps_in)
        ):
            addition = replace(addition, code="long-skip")
        if addition.code is None and addition.kind != "mean" and _lends_position(flow, addition, found):
            addition = replace(addition, code="position")
        if addition.code is None and addition.kind != "mean":
            inside.update(within(flow, addition))
        nested.append(addition)
    return nested[::-1]


def within(flow: Flow, addition: Addition) -> list[fx.Node]:
    """What is computed for a branch alone, and from what its shortcut hands on, in order.

    The encoder that a decoder's branch attends to is needed for it, but no part of it.
    """
    starts = _starts(flow, addition)
    # Where the caller made the one from the other, the graph does not show it.
    return [n for n in alone(flow, addition) if not starts or any(flow.feeds(start, n) for start in starts)]


def alone(flow: Flow, addition: Addition) -> list[fx.Node]:
    """What a branch needs, and neither its shortcut nor any result of the block but through the sum."""
    elsewhere = _needed_without(flow, addition)
    return [n for n in side(flow, addition.branch, addition.shortcut) if n not in elsewhere]


def _needed_without(flow: Flow, addition: Addition) -> set[fx.Node]:
    """What the results of the block are made of but by way of a sum."""
    elsewhere, todo = {flow.order[-1]}, [flow.order[-1]]
    while todo:
        node = todo.pop()
        new = [n for n in flow.read_by(node) if n is not addition.node and n not in elsewhere]
        elsewhere.update(new)
        todo.extend(new)
    return elsewhere


def _lends_position(flow: Flow, addition: Addition, found: Sequence[Addition]) -> bool:
    """Whether a sum is read by another branch alone, while its own "branch" goes on without it.

    Then that is the stream, and what is added to it is a position or a condition.
    """
    if addition.drops or addition.branch not in _needed_without(flow, addition):
        return False
    others = (other for other in found if other.node is not addition.node and other.code is None)
    return any(addition.node in alone(flow, other) for other in others)


def _starts(flow: Flow, addition: Addition) -> list[fx.Node]:
    """The values that both the shortcut and the branch are computed from."""
    shared = [node for node in stems(flow, addition.shortcut) if flow.feeds(node, addition.branch)]
    if shared and addition.kind != "projection":
        return shared
    common = flow.sources(addition.shortcut, itself=True) & flow.sources(addition.branch, itself=True)
    return [node for node in common if flow.fact(node).active]


def _is_long(
    flow: Flow, addition: Addition, before: Sequence[Addition], steps_in: Callable[[fx.Node], int]
) -> bool:
    """Whether a branch runs through two or more residual adds, each going on from the one before."""
    starts = _starts(flow, addition)
    # Also what another reader takes as well, as the next one of stacked hourglasses does.
    work = side(flow, addition.branch, addition.shortcut)
    nodes = [n for n in work if not starts or any(flow.feeds(start, n) for start in starts)]
    return steps_along(flow, starts, addition.branch, nodes, before, steps_in) > 1


def steps_along(
    flow: Flow,
    starts: Sequence[fx.Node],
    end: fx.Node,
    between: Sequence[fx.Node],
    found: Sequence[Addition],
    steps_in: Callable[[fx.Node], int],
) -> int:
    """How many residual adds everything passes on its way from some values to another, one after the other.

    Args:
        flow: The graph.
        starts: The values at which the ways begin.
        end: Where they end.
        between: The nodes on them, in order.
        found: The additions of the graph.
        steps_in: The same number for the module that a node calls.
    """
    residual = {a.node: a for a in found if a.code is None}
    last, steps = None, 0
    for node in between:
        if node.op == "call_module":
            here = steps_in(node)
        else:
            own = residual.get(node)
            here = int(own is not None and (last in (None, own.shortcut) or flow.feeds(last, own.shortcut)))
        if here and not around(flow, starts, end, node):
            last, steps = node, steps + here
    return steps


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
    return described(flow, replace(addition, code=None, kind=kind, shortcut=shortcut, branch=branch))


def projected(flow: Flow, addition: Addition) -> Addition | None:
    """An addition whose shortcut its caller projected from the branch's argument; ``None`` if it is none.

    As within a block, a branch that might be such a projection itself is no branch.
    """
    found = replace(addition, code=None, kind="projection")
    linear = all(projects(op) for op in ops_of(flow, side(flow, addition.branch, addition.shortcut)))
    return None if linear or unfit(flow, found) else found


def meant(flow: Flow, addition: Addition | None, kind: str, shortcut: str | None) -> Addition | None:
    """The addition with the sides that a gate of ``kind`` has; ``None`` if it has no such sides.

    ``shortcut`` says which operand was the shortcut before. It counts where what the trace does not show had
    told the branch: stochastic depth, in a trace of the evaluating block, or the block's caller.
    """
    if addition is not None and addition.code in ("linear", "no-shortcut") and not addition.kind and shortcut:
        kind = shortcut
    if addition is None or kind not in ("left", "right"):
        return addition if addition is not None and addition.kind else None
    found = told(flow, addition, kind)
    return found if isinstance(found, Addition) else None


def described(flow: Flow, addition: Addition, regions: bool = True) -> Addition:
    """The same with what belongs to its branch."""
    work = side(flow, addition.branch, addition.shortcut)
    return replace(
        addition,
        drops=tuple(drops(flow, work)),
        region=flow.region(addition.branch, addition.node) if regions else (),
        flops=sum(flow.fact(n).flops for n in alone(flow, addition)),
    )


def _merged(flow: Flow, nodes: list[fx.Node]) -> set[fx.Node]:
    """Additions side by side whose sums are concatenated: paths of a cell, not steps of a residual stream."""
    merged: set[fx.Node] = set()
    for cat in (node for node in flow.order if node.target in (torch.cat, torch.concat)):
        parts = {stem for source in cat.all_input_nodes for stem in stems(flow, source)} & set(nodes)
        for a in parts:
            if any(a is not b and not flow.feeds(a, b) and not flow.feeds(b, a) for b in parts):
                merged.add(a)
    return merged


def _classify(flow: Flow, node: fx.Node, ordinal: int, regions: bool) -> Addition:
    left, right = (operand for operand in node.args if isinstance(operand, fx.Node))
    if node.target not in ADDS:  # in a region of its own, where no gradient is kept
        return Addition(node, ordinal, "detached", "", left, right)
    kind, shortcut, branch, code = _sides(flow, left, right)
    refusal = code if not kind else _misshapen(flow, node, shortcut, branch)
    if refusal is not None:
        return Addition(node, ordinal, refusal, "", shortcut, branch)
    found = described(flow, Addition(node, ordinal, code, kind, shortcut, branch), regions)
    # Stochastic depth that is there says that its author took this for a branch.
    return found if code or found.drops else replace(found, code=unfit(flow, found))


def _misshapen(flow: Flow, node: fx.Node, shortcut: fx.Node, branch: fx.Node) -> Code | None:
    shape, part = flow.fact(node).value.shape, flow.fact(branch).value.shape
    if flow.fact(shortcut).value.shape != shape or (part != shape and not _spreads(part, shape)):
        return "broadcast"
    return "aliased" if writes_to(node) is branch and _seen_elsewhere(flow, node) else None


def _spreads(part: torch.Size, whole: torch.Size) -> bool:
    """Whether a branch gives each sample something of its own that is the same for all its places."""
    return len(part) == len(whole) > 1 and part[0] == whole[0]


_Sides = tuple[str, fx.Node, fx.Node, Code | None]


def _sides(flow: Flow, left: fx.Node, right: fx.Node) -> _Sides:
    """Kind, shortcut, branch and reason code; without a kind the two operands as they are."""
    forward, backward = carries(flow, left, right), carries(flow, right, left)
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
    given = [any(stem.op == "placeholder" for stem in stems(flow, operand)) for operand in (left, right)]
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
        {place for n in stems(flow, addition.shortcut) for place in places.get(n, ())},
        {place for n in flow.sources(addition.branch) for place in places.get(n, ())},
    )


def _projection(flow: Flow, left: fx.Node, right: fx.Node) -> _Sides:
    """The side without an activation, or of a single layer, is the shortcut; there must be just one such."""
    if _is_mixture(flow, left, right) or _modulates(flow, left, right) or _modulates(flow, right, left):
        return "", left, right, "gating"
    sides = [side(flow, left, right), side(flow, right, left)]
    ops = [ops_of(flow, work) for work in sides]
    plain = [all(projects(op) for op in mine) for mine in ops]
    if all(plain):  # then only stochastic depth that is there can tell the branch
        plain = [not any(drops(flow, work)) for work in sides]
        if plain[0] == plain[1]:
            return "", left, right, "linear"
    if not any(plain):
        # A pre-activation projection has its norm and activation before its one layer.
        most, least = layers(flow, left, right), layers(flow, right, left)
        plain = [most[1] <= 1 < least[0], least[1] <= 1 < most[0]]
    if not any(plain):
        plain = [_shallow_path(flow, left, right), _shallow_path(flow, right, left)]
    if not any(plain):  # what is mixed at random is a branch
        plain = [not mixes(flow, work) for work in sides]
    if plain[0] == plain[1]:
        return "", left, right, "fusion"
    return ("projection", left, right, None) if plain[0] else ("projection", right, left, None)


def _shallow_path(flow: Flow, one: fx.Node, other: fx.Node) -> bool:
    """Whether ``one`` is a projection of two layers with an activation between them, ``other`` a deeper path.

    Both end in a layer: where an activation comes last, two features are merged.
    """
    counts, ends = [], []
    for nodes in (side(flow, one, other), side(flow, other, one)):
        ops = ops_of(flow, nodes)
        counts.append((sum(map(is_layer, ops)), sum(not projects(op) for op in ops)))
        last = next((op for op in reversed(ops) if is_layer(op) or not projects(op)), None)
        ends.append(last is not None and is_layer(last))
    (depth, activations), (deeper, more) = counts
    return all(ends) and depth <= 2 < deeper and activations <= 1 < more


def _modulates(flow: Flow, product: fx.Node, shift: fx.Node) -> bool:
    """Whether ``product + shift`` scales and moves a value by two siblings that are computed without it."""
    if product.target not in PRODUCTS or len(product.all_input_nodes) < 2:
        return False
    own = flow.sources(shift, itself=True)
    apart, along = list[fx.Node](), list[fx.Node]()
    for factor in product.all_input_nodes:
        common = flow.sources(factor, itself=True) & own
        related = any(flow.fact(n).active and tensors(flow.fact(n).value) for n in common)
        (along if related else apart).append(factor)
    if len(along) != 1 or not any(flow.fact(factor).active for factor in apart):
        return False
    return layers(flow, along[0], shift)[1] <= layers(flow, shift, along[0])[1]


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
        product = node.target in PRODUCTS
        return (
            product
            and all(flow.fact(a).active for a in node.all_input_nodes)
            and len(node.all_input_nodes) > 1
        )

    return all(gated(side) for side in sides)
