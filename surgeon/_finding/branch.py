"""Whether what stands beside a shortcut is a branch worth a gate, and if not, why not.

A gate leaves its branch out. That is stochastic depth where the branch is a step that a network can do
without for once; it is a mistake where the sum rounds a value, is an activation function, a loss, a score, a
position encoding, the next state of a recurrence or the fusion of two levels of a pyramid.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx

from surgeon._finding.addition import Addition
from surgeon._finding.findings import Code
from surgeon._finding.flow import Flow
from surgeon._finding.paths import ADDS, around, ops_of, side
from surgeon._tracing.canonical import SPELT
from surgeon._tracing.nests import tensors
from surgeon._tracing.operators import (
    enlarges,
    is_layer,
    is_linear,
    is_masking,
    is_noise,
    is_pointwise,
    is_softmax,
    pools,
    projects,
    sums,
)
from surgeon._tracing.oplog import Op

_DETACHES = {"detach", "detach_", torch.detach, torch.detach_}


def unfit(flow: Flow, addition: Addition) -> Code | None:
    """Why a branch beside an identity or projection shortcut is none worth a gate."""
    work = side(flow, addition.branch, addition.shortcut)
    ops = ops_of(flow, work)
    weighted = [op for op in ops if op.weighted]
    if not _learns(flow, addition) or _is_cut(flow, addition.node):
        return "detached"
    if _is_measure(flow, addition.node) or _is_distance(flow, addition.node):
        return "arithmetic"
    if all(is_pointwise(op) for op in ops):
        return "arithmetic"
    if weighted and all(op.depthwise for op in weighted):
        return "position"
    if addition.kind == "projection":
        return _no_partner(flow, addition, work)
    return None if _is_step(flow, addition, ops) else _linear(ops)


def _is_step(flow: Flow, addition: Addition, ops: Sequence[Op]) -> bool:
    """Whether a linear branch beside a raw identity is the layer of a residual layer: an activation follows.

    Several linear paths from one value are one layer in training's dress, and are merged for deployment.
    """
    if addition.shortcut.target in ADDS or not any(map(is_layer, ops)):
        return False
    work = side(flow, addition.branch, addition.shortcut)
    merges = any(node.target in ADDS and _same_source(flow, node) for node in work)
    return not merges and _is_activated(flow, addition.node)


def _same_source(flow: Flow, node: fx.Node) -> bool:
    """Whether both sides of a sum are made of one value that depends on an input."""
    sides = [flow.sources(n, itself=True) for n in node.args if isinstance(n, fx.Node)]
    return len(sides) > 1 and any(flow.fact(n).active for n in set.intersection(*sides))


def _is_activated(flow: Flow, node: fx.Node) -> bool:
    """Whether an activation alone reads a sum, as it is or normalised."""

    def activates(reader: fx.Node) -> bool:
        if reader.op == "output" or reader.target in ADDS:
            return False
        value, ops = flow.fact(reader).value, ops_of(flow, [reader])
        if any(map(is_layer, ops)) or not ops:
            return False
        if not isinstance(value, Tensor) or value.shape != flow.fact(node).value.shape:
            return False  # parts of the sum go different ways
        last = next((op for op in ops if not is_linear(op)), None)
        return _is_activated(flow, reader) if last is None else last.active == 1 and not is_softmax(last)

    readers = [reader for reader in flow.users(node) if flow.feeds(node, reader) or reader.op == "output"]
    return bool(readers) and all(map(activates, readers))


def _linear(ops: Sequence[Op]) -> Code | None:
    return "linear" if all(is_linear(op) for op in ops) and not pools(ops) else None


def _no_partner(flow: Flow, addition: Addition, work: Sequence[fx.Node]) -> Code | None:
    """Why what stands beside a projection is no branch."""
    ops = ops_of(flow, work)
    if not any(op.weighted for op in ops):
        return "arithmetic"
    if _linear(ops):
        return "linear"
    if _is_score(flow, addition.node):
        return "scores"
    return "fusion" if _merges(flow, addition, work) else None


def _is_measure(flow: Flow, node: fx.Node) -> bool:
    """Whether a sum has no features left, as losses have none: a number, or one for each row of an input."""
    value = flow.fact(node).value
    given = [t for n in flow.order if n.op == "placeholder" for t in tensors(flow.fact(n).value)]
    a_row = value.ndim == 1 and any(len(value) == t.shape[0] for t in given if t.ndim)
    return value.ndim == 0 or (a_row and all(t.ndim > 1 for t in given))


def _is_cut(flow: Flow, node: fx.Node) -> bool:
    """Whether every way on from a sum is cut off from gradients, as that of a correction is.

    ``(codes - z).detach()`` is no step, whatever its two sides are made of.
    """
    todo, seen, cut = [node], set[fx.Node](), False
    while todo:
        for reader in flow.users(todo.pop()):
            if reader.op == "output":
                return False
            if _stops(reader):
                cut = True
            elif reader not in seen:
                seen.add(reader)
                todo.append(reader)
    return cut


def _stops(node: fx.Node) -> bool:
    """Whether no gradient passes a node, because the forward says so."""
    return node.target in _DETACHES or getattr(node.target, "mode", True) is False


def _is_distance(flow: Flow, node: fx.Node) -> bool:
    """Whether a difference is only measured: no weights read it, and no features are left."""
    todo, seen, measured = [node] if SPELT in node.meta else [], set[fx.Node](), False
    while todo:
        for reader in flow.users(todo.pop()):
            if reader.op == "output" or any(op.weighted for op in flow.fact(reader).ops):
                return False
            if isinstance(flow.fact(reader).value, Tensor) and _is_measure(flow, reader):
                measured = True
            elif reader not in seen:
                seen.add(reader)
                todo.append(reader)
    return measured


def _learns(flow: Flow, addition: Addition) -> bool:
    """Whether a gradient that comes to the sum goes on into its branch."""
    inside = set(side(flow, addition.branch, addition.shortcut))
    todo, seen = [addition.branch], set[fx.Node]()
    while todo:
        node = todo.pop()
        value = flow.fact(node).value
        if node in seen or _stops(node):
            continue
        seen.add(node)
        if not any(t.is_floating_point() or t.is_complex() for t in tensors(value)):
            continue
        if node not in inside or any(op.weighted for op in flow.fact(node).ops):
            return True
        todo.extend(source for source in node.all_input_nodes if flow.feeds(source, node))
    return False


def _merges(flow: Flow, addition: Addition, work: Sequence[fx.Node]) -> bool:
    """Whether what stands beside a projection is no branch that was computed from the same value.

    It may have fewer layers than the projection; be noise of a spread of its own around a mean; a recurrence,
    whose steps read other parts of the value; or the coarser level of a pyramid, resized.
    """
    one, other = addition.shortcut, addition.branch
    own = side(flow, one, other)
    shallow = sum(map(is_layer, ops_of(flow, work))) < sum(map(is_layer, ops_of(flow, own)))
    noisy = any(is_noise(op) for node in work for op in flow.fact(node).ops)
    resized = [any(_resizes(flow, node, end) for node in nodes) for nodes, end in ((own, one), (work, other))]
    return (
        shallow
        or noisy
        or resized[0] != resized[1]
        or _repeats(flow, own, work)
        or _reads_stream(flow, work, addition.region)
    )


def _resizes(flow: Flow, node: fx.Node, end: fx.Node) -> bool:
    """Whether a node does nothing but make images larger, and ``end`` depends on nothing but by way of it."""
    ops, made = flow.fact(node).ops, tensors(flow.fact(node).value)
    read = [t for source in node.all_input_nodes for t in tensors(flow.fact(source).value)]
    grows = bool(read) and bool(made) and made[0].numel() > max(t.numel() for t in read)
    if not grows or not any(map(enlarges, ops)) or any(map(is_layer, ops)):
        return False
    given = [n for n in flow.sources(end) if n.op == "placeholder" and flow.fact(n).active]
    return not around(flow, given, end, node)


def _repeats(flow: Flow, one: Iterable[fx.Node], other: Iterable[fx.Node]) -> bool:
    """Whether two sides run the same weights, as the steps of a recurrence do."""
    weights = [{weight for node in nodes for weight in _weights(flow, node)} for nodes in (one, other)]
    return bool(weights[0] & weights[1])


def _weights(flow: Flow, node: fx.Node) -> Iterator[str]:
    """The weights that a node itself runs with: a child's, the block's, or what those alone make."""
    if node.op == "call_module":
        if any(op.weighted for op in flow.fact(node).ops):
            yield str(node.target)
        return
    for held in node.all_input_nodes:
        if held.op == "get_attr":
            yield str(held.target)
        elif not flow.fact(held).active and any(op.weighted for op in flow.fact(held).ops):
            yield held.name


def _reads_stream(flow: Flow, work: Sequence[fx.Node], region: Collection[fx.Node]) -> bool:
    """Whether a branch only reads, linearly, a stream with sums of its own that goes on elsewhere too.

    So do heads at several depths of a network, whose results are added.
    """
    stream = [node for node in work if node not in region]
    own = any(node.target in ADDS for node in stream) or any(sums(op) for op in ops_of(flow, stream))
    reading = ops_of(flow, region)  # none where it only picks a value out of a nest: that is no evidence
    return bool(reading) and own and all(projects(op) for op in reading)


def _is_score(flow: Flow, node: fx.Node) -> bool:
    """Whether a softmax alone reads a value, as it is or behind masks, sums and scales."""

    def weighs(reader: fx.Node) -> bool:
        if reader.op == "output":
            return False
        for op in flow.fact(reader).ops:
            if is_softmax(op):
                return True
            if not is_masking(op):  # a module with an attention of its own, say
                return False
        return _is_score(flow, reader)

    readers = [reader for reader in flow.users(node) if flow.feeds(node, reader)]  # not those of its shape
    return bool(readers) and all(weighs(reader) for reader in readers)
