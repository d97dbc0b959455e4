"""Finds the residual adds in the traced graph of one block, and says why every other addition is none.

An addition ``a + b`` of two activations is a residual add when one side carries the block's input forward:

* ``"identity"``: one side, or what it hands on (as a term of a sum, a view, times a scale per channel), is
  an ancestor of the other side, so the other side is a function of it;
* ``"projection"``: both sides part from a common ancestor, one of them through layers without an
  activation (convolution, linear, norm, pooling, resizing) or through a single layer where the other has
  more: that one is the shortcut.

A block may get both from its caller: ``output(branch(x), x)`` performs the add, and the recording knows that
one argument was computed from the other.

Everything is read from the graph and from the ATen operators that each node ran; no module class, model
or library is known by name.
"""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from surgeon._example import tensors
from surgeon._fake import storage
from surgeon._flow import Flow
from surgeon._oplog import Op

aten = torch.ops.aten

REASONS = {
    "aliased": "writes in place to a tensor that is read again under another name",
    "bias": "adds a weight, mask or table that depends on no input",
    "broadcast": "the two sides differ in shape, so one of them is spread over the other",
    "form": "is made inside one operator or in a form that cannot take a gate",
    "fusion": "merges two branches with activations of their own; neither side is a shortcut",
    "gating": "mixes two activations with weights computed from the input",
    "linear": "sums linear paths (a reparametrisation branch); no activation to skip",
    "nested": "lies inside the branch of another residual add",
    "no-shortcut": "the two sides share no ancestor in the block, so neither is a shortcut",
    "position": "adds a position encoding, one depthwise convolution of the input",
    "stochastic": "has stochastic depth of its own written out, which cannot be taken off whole",
    "untraceable": "the block could not be traced",
}

_ADDS = {operator.add, operator.iadd}  # surgeon._canonical leaves no other spelling


@dataclass(frozen=True, slots=True)
class Residual:
    """One addition ``shortcut + branch(x)`` that may carry a gate.

    Attributes:
        name: Qualified name of the add, the block's name and the add's place in it: ``"layer1.0.add"``,
            ``"blocks.3.add_1"``.
        block: Qualified name of the module whose own ``forward`` performs the add; ``""`` is the model.
        block_type: Class name of that module.
        kind: ``"identity"`` or ``"projection"`` (what the shortcut does to the block's input).
        shortcut: What the shortcut runs: ``"identity"`` or its modules, ``"downsample"``.
        branch: What the branch runs, its modules in order: ``"conv1 bn1 act1 conv2 bn2"``.
        flops: FLOPs of one forward of the branch on the example.
        replaces: Names of the stochastic-depth modules already on this branch; the gate stands in for them.
    """

    name: str
    block: str
    block_type: str
    kind: str
    shortcut: str
    branch: str
    flops: int
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """One addition that is left alone.

    Attributes:
        name, block, block_type: As in `Residual`.
        code: A key of `REASONS`.
        reason: The same as a sentence.
    """

    name: str
    block: str
    block_type: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What `surgeon.find` found; iterating gives the residual adds.

    Attributes:
        residuals: The residual adds, in the order in which they first run.
        refused: Every other addition of two tensors, with its reason; a layer's own bias is not listed.
        flops: FLOPs of one forward of the whole model on the example.
    """

    residuals: tuple[Residual, ...]
    refused: tuple[Refusal, ...]
    flops: int

    def __iter__(self) -> Iterator[Residual]:
        return iter(self.residuals)

    def __len__(self) -> int:
        return len(self.residuals)

    def __str__(self) -> str:
        from surgeon._report import findings_text

        return findings_text(self)


@dataclass(frozen=True, slots=True)
class Addition:
    """One addition in one block's graph, as far as the graph alone can tell.

    Attributes:
        node: The addition.
        ordinal: Its place among the additions of the block: 0, 1, ...
        code: Why it is no residual add; ``None`` if it is one.
        kind: ``"identity"`` or ``"projection"``, ``""`` if neither could be told.
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


def additions(flow: Flow) -> list[Addition]:
    """Every addition of an activation and another tensor in the graph, classified; the graph is only read."""
    nodes = [node for node in flow.order if _is_addition(flow, node)]
    found: list[Addition] = []
    inside: set[fx.Node] = set()
    for ordinal, node in reversed(list(enumerate(nodes))):
        addition = _classify(flow, node, ordinal)
        if node in inside and addition.code != "bias":
            addition = replace(addition, code="nested")
        elif addition.code is None:
            inside.update(side(flow, addition.branch, addition.shortcut))
        found.append(addition)
    merged = _merged(flow, nodes)
    return [replace(a, code="fusion") if a.code is None and a.node in merged else a for a in reversed(found)]


def _merged(flow: Flow, nodes: list[fx.Node]) -> set[fx.Node]:
    """Additions side by side whose sums are concatenated: paths of a cell, not steps of a residual stream."""
    merged: set[fx.Node] = set()
    for cat in (node for node in flow.order if node.target in (torch.cat, torch.concat)):
        parts = {stem for source in cat.all_input_nodes for stem in _stems(flow, source)} & set(nodes)
        for a in parts:
            if any(a is not b and not flow.precedes(a, b) and not flow.precedes(b, a) for b in parts):
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


def _classify(flow: Flow, node: fx.Node, ordinal: int) -> Addition:
    left, right = (operand for operand in node.args if isinstance(operand, fx.Node))
    kind, shortcut, branch, code = _sides(flow, left, right)
    refusal = code if not kind else _misshapen(flow, node, shortcut, branch)
    if refusal is not None:
        return Addition(node, ordinal, refusal, "", shortcut, branch)
    work = side(flow, branch, shortcut)
    return Addition(
        node,
        ordinal,
        code or _unfit(flow, work),
        kind,
        shortcut,
        branch,
        drops=tuple(_drops(flow, work)),
        region=flow.region(branch, node),
        flops=sum(flow.fact(n).flops for n in work),
    )


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
    common = flow.ancestors(left) & flow.ancestors(right)
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
        {place for n in flow.ancestors(addition.branch) for place in places.get(n, ())},
    )


def _projection(flow: Flow, left: fx.Node, right: fx.Node) -> _Sides:
    """The side without an activation, or of a single layer, is the shortcut; there must be just one such."""
    if _is_mixture(flow, left, right):
        return "", left, right, "gating"
    ops = [_ops(flow, side(flow, left, right)), _ops(flow, side(flow, right, left))]
    plain = [all(_linear(op) or op.func.overloadpacket in _PROJECTS for op in mine) for mine in ops]
    if all(plain):
        return "", left, right, "linear"
    if not any(plain):
        # A pre-activation projection has its norm and activation before its one layer.
        layers = [sum(op.weighted and op.func.overloadpacket in _LAYERS for op in mine) for mine in ops]
        plain = [layers[0] <= 1 < layers[1], layers[1] <= 1 < layers[0]]
    if not any(plain):
        return "", left, right, "fusion"
    return ("projection", left, right, None) if plain[0] else ("projection", right, left, None)


def _carries(flow: Flow, shortcut: fx.Node, branch: fx.Node) -> bool:
    """Whether ``branch`` is computed from ``shortcut`` or from a term that ``shortcut`` carries unchanged."""
    return any(flow.precedes(stem, branch) for stem in _stems(flow, shortcut))


def _stems(flow: Flow, node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and the values it hands on: what it is a sum of, a view of its own shape of, a scaling of."""
    yield node
    for source in node.all_input_nodes:
        if isinstance(flow.fact(source).value, Tensor) and (
            node.target in _ADDS or _hands_on(flow, source, node)
        ):
            yield from _stems(flow, source)


def _hands_on(flow: Flow, source: fx.Node, node: fx.Node) -> bool:
    before, after = flow.fact(source).value, flow.fact(node).value
    if node.op == "get_attr" or not isinstance(after, Tensor) or before.shape != after.shape:
        return False
    scales = all(op.func.overloadpacket in _SCALES and op.active < 2 for op in flow.fact(node).ops)
    # Without operators the node must return its argument, as nn.Identity does.
    return scales and (bool(flow.fact(node).ops) or storage(before) == storage(after))


def side(flow: Flow, one: fx.Node, other: fx.Node) -> list[fx.Node]:
    """The nodes that ``one`` needs and ``other`` does not, in order."""
    mine = flow.ancestors(one, itself=True) - flow.ancestors(other, itself=True)
    return [n for n in flow.order if n in mine and n.op != "placeholder"]


def _unfit(flow: Flow, work: list[fx.Node]) -> str | None:
    """Why a branch beside an identity or projection shortcut is none worth a gate."""
    ops = _ops(flow, work)
    weighted = [op for op in ops if op.weighted]
    if weighted and all(op.depthwise for op in weighted):
        return "position"
    return "linear" if all(_linear(op) for op in ops) and not _pools(ops) else None


def _pools(ops: list[Op]) -> bool:
    """Whether a linear branch mixes tokens by pooling alone, without a layer that linear paths merge into."""
    packets = [op.func.overloadpacket for op in ops]
    merges = any(op.weighted and op.func.overloadpacket in _LAYERS for op in ops)
    return not merges and any(packet in _POOLS for packet in packets)


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
        product = node.target in (operator.mul, operator.imul, torch.mul, "mul", "mul_")
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
            ops = flow.fact(node).ops
            alone = not any(op.weighted or op.flops for op in ops)
            if alone and _is_coin(ops) and all(op.random in (0, 1, value.shape[0]) for op in ops):
                yield node
        elif node.target in _PRODUCTS and row_mask(flow, node) is not None:
            yield node


def row_mask(flow: Flow, product: fx.Node) -> fx.Node | None:
    """The operand of a multiplication that is a coin per row or batch; ``None`` if there is none."""
    for operand in product.all_input_nodes:
        fact = flow.fact(operand)
        if fact.active or not isinstance(fact.value, Tensor):
            continue
        made_by = [op for n in flow.ancestors(operand, itself=True) for op in flow.fact(n).ops]
        if _is_coin(made_by) and fact.value.numel() in (1, flow.fact(product).value.shape[0]):
            return operand
    return None


def mask_nodes(flow: Flow, drop: fx.Node) -> set[fx.Node]:
    """A node of `Addition.drops` and the nodes that make its coins."""
    mask = None if drop.op == "call_module" else row_mask(flow, drop)
    return {drop} if mask is None else {drop, *flow.region(mask, drop)}


def _is_coin(ops: Iterable[Op]) -> bool:
    """Whether random numbers are drawn and made zeros and ones of: by a Bernoulli draw, or by rounding."""
    ops = list(ops)
    drawn = any(op.random for op in ops)
    return drawn and any(op.func.overloadpacket in _COINS for op in ops)


def _ops(flow: Flow, nodes: Iterable[fx.Node]) -> list[Op]:
    return [op for node in nodes for op in flow.fact(node).ops if op.active]


def _linear(op: Op) -> bool:
    """Whether the operator is linear or affine in its active tensors, running statistics taken as fixed."""
    packet = op.func.overloadpacket
    if op.func.is_view or packet in _ADDITIVE:
        return True
    return packet in _LINEAR and op.active == 1


_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_COINS = {
    *(
        aten.bernoulli,
        aten.bernoulli_,
        aten.floor,
        aten.floor_,
        aten.round,
        aten.round_,
        aten.ceil,
        aten.ceil_,
    ),
    *(aten.lt, aten.lt_, aten.le, aten.le_, aten.gt, aten.gt_, aten.ge, aten.ge_),
}
_LAYERS = {aten.convolution, aten.addmm, aten.mm, aten.bmm, aten.baddbmm}
_POOLS = {aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d}
_SCALES = {aten.mul, aten.div, aten.alias, aten.detach, aten.clone, aten.view, aten.unsqueeze, aten._to_copy}
_ADDITIVE = {
    *(aten.add, aten.add_, aten.sub, aten.sub_, aten.cat, aten.stack, aten.clone, aten.copy_, aten.neg),
    *(
        aten._to_copy,
        aten.constant_pad_nd,
        aten.roll,
        aten.flip,
        aten.index_select,
        aten.index,
        aten.empty_like,
    ),
    *(
        aten._unsafe_view,
        aten.zeros_like,
        aten.new_zeros,
        aten.new_empty,
        aten.new_empty_strided,
        aten.contiguous,
    ),
    *(aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training),
    *(aten._native_batch_norm_legit_functional, aten.cudnn_batch_norm, aten.miopen_batch_norm),
}
_LINEAR = {
    *(
        aten.convolution,
        aten.addmm,
        aten.mm,
        aten.bmm,
        aten.baddbmm,
        aten.mul,
        aten.mul_,
        aten.div,
        aten.div_,
    ),
    *(aten.mean, aten.sum, aten.avg_pool1d),
    *(aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten.addcmul),
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten.upsample_bilinear2d),
    *(
        aten.upsample_bicubic2d,
        aten._upsample_bilinear2d_aa,
        aten._upsample_bicubic2d_aa,
        aten.reflection_pad2d,
    ),
    *(aten.native_dropout, aten.replication_pad2d),
}
_PROJECTS = {
    *(aten.max_pool1d, aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.native_layer_norm),
    *(aten.native_group_norm, aten._fused_rms_norm, aten.adaptive_max_pool2d, aten.max, aten.amax),
}
