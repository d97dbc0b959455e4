"""What single ATen operators do: which are linear, which are layers, which toss coins.

The tables name operators as they run, after PyTorch has taken its functions and modules apart, so that a rule
that asks them holds for every way to write the same thing.
"""

from collections.abc import Iterable, Sequence

import torch

from surgeon._torch import operators
from surgeon._tracing.oplog import Op

aten = torch.ops.aten


def is_linear(op: Op) -> bool:
    """Whether the operator is linear or affine in its active tensors, running statistics taken as fixed."""
    packet = op.func.overloadpacket
    if op.func.is_view or packet in _ADDITIVE:
        return True
    return packet in _LINEAR and op.active == 1


def projects(op: Op) -> bool:
    """Whether a projection shortcut may hold the operator: linear, a norm, or a pooling by the maximum."""
    return is_linear(op) or op.func.overloadpacket in _PROJECTS


def sums(op: Op) -> bool:
    """Whether the operator adds up two active tensors."""
    return op.func.overloadpacket in (aten.add, aten.add_) and op.active > 1


def is_pointwise(op: Op) -> bool:
    """Whether the operator treats every number by itself, or only shows or copies numbers."""
    return op.func.is_view or torch.Tag.pointwise in op.func.tags or op.func.overloadpacket in _COPIES


def enlarges(op: Op) -> bool:
    """Whether the operator resizes an image or sequence."""
    return op.func.overloadpacket in _UPSAMPLES


def is_layer(op: Op) -> bool:
    """Whether the operator is a convolution or a matrix product with a Parameter."""
    return op.weighted and op.func.overloadpacket in _LAYERS


def scales(op: Op) -> bool:
    """Whether the operator hands its one active tensor on, times a constant at most."""
    return op.func.overloadpacket in _SCALES and op.active < 2


def is_softmax(op: Op) -> bool:
    """Whether the operator makes weights that sum to one of scores."""
    return op.func.overloadpacket in (aten._softmax, aten._safe_softmax, aten._log_softmax)


def is_masking(op: Op) -> bool:
    """Whether the operator leaves scores what they are: scales, moves, masks them or adds to them."""
    return op.func.overloadpacket in _MASKS or (is_linear(op) and not is_layer(op))


def pools(ops: Sequence[Op]) -> bool:
    """Whether linear operators mix tokens by pooling alone, without a layer that linear paths merge into."""
    return not any(is_layer(op) for op in ops) and any(op.func.overloadpacket in _POOLS for op in ops)


def drops_rows(ops: Sequence[Op], rows: int) -> bool:
    """Whether operators without a weight multiply rows, or all of them, by coins: stochastic depth."""
    alone = not any(op.weighted or op.flops for op in ops)
    return alone and is_coin(ops) and all(op.random in (0, 1, rows) for op in ops)


def is_noise(op: Op) -> bool:
    """Whether the operator draws from a normal distribution."""
    return op.func.overloadpacket in _NORMAL


def is_coin(ops: Iterable[Op]) -> bool:
    """Whether random numbers are drawn once and made zeros and ones of: by a Bernoulli draw, or by rounding.

    A coin beside another draw (ShakeDrop's factors) is a mixture of its own.
    """
    ops = list(ops)
    draws = sum(op.random > 0 for op in ops)
    return draws == 1 and any(op.func.overloadpacket in _COINS for op in ops)


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
_NORMAL = {aten.randn, aten.randn_like, aten.normal, aten.normal_, aten.normal_functional}
_LAYERS = {aten.convolution, aten.addmm, aten.mm, aten.bmm, aten.baddbmm}
_MASKS = {aten.masked_fill, aten.masked_fill_, aten.where}
_COPIES = {aten.clone, aten._to_copy, aten.contiguous, aten.copy_}
_UPSAMPLES = {
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten.upsample_linear1d),
    *(aten.upsample_bilinear2d, aten.upsample_trilinear3d, aten.upsample_bicubic2d),
    *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
}
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
    *(aten.gather, aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_, aten.zeros),
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
    *operators("_fused_rms_norm"),  # since 2.8
    *(aten.native_group_norm, aten.adaptive_max_pool2d, aten.max, aten.amax),
}
