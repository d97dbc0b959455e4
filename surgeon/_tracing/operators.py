"""What single ATen operators do: which are linear, which are layers, which toss coins.

`surgeon._tracing.aten` puts operators as they run, after PyTorch has taken its functions and modules apart,
into families, so that a rule that asks for these holds for every way to write the same thing.
"""

from collections.abc import Iterable, Sequence
from enum import Enum

import torch

from surgeon._tracing.aten import Family, answers, families
from surgeon._tracing.oplog import Op


class Shape(Enum):
    """What a function of tensors is, running statistics taken as fixed.

    `LINEAR` or affine in all its tensors together, in each of them alone (`PRODUCT`), neither but a step that
    a projection may hold (`PROJECTS`), or none of that.
    """

    LINEAR = 1
    PRODUCT = 2
    PROJECTS = 3
    OTHER = 4


# The Fourier transform is linear, but is here what mixes the tokens of a branch, as attention is.
SHAPES = answers(
    (
        Shape.LINEAR,
        """EMPTIES ZEROS ONES FILLS ERASES FORMS AXES DIMS PARTS STRIDES COPIES COMPLEX SHIFTS REARRANGED
        TRIANGLES PICKS GATHERS CATS STACKS ASSIGNS SCATTERS PUTS PACKED PADS RESIZES MEAN_POOLS
        ADAPTIVE_POOLS SUMS DIFFERENCES BATCH_NORMS REDUCTIONS RUNNING_SUMS DROPOUTS""",
    ),
    (Shape.PRODUCT, "PRODUCTS QUOTIENTS FUSED LERPS CONVOLUTIONS DEFORMED MATMULS AFFINE CROSS TRILINEAR"),
    (Shape.PROJECTS, "MAX_POOLS EXTREMES LAYER_NORMS GROUP_NORMS"),
    (
        Shape.OTHER,
        """NOISE DRAWS COINS TABLES MASKS CHOICES MERGES SAMPLES REGIONS RELUS LEAKY CLAMPS SQUASHES SMOOTH
        ROUNDINGS COMPARISONS SIGNS POWERS PAIRS ATTENTION RECURRENT WEIGHT_NORMS SOFTMAXES TOTALS INDICES
        DEVIATIONS LENGTHS RUNNING ORDERED FOURIER QUESTIONS""",
    ),
)
_LAYERS = families("CONVOLUTIONS DEFORMED MATMULS AFFINE")
_COINS = families("COINS ROUNDINGS COMPARISONS")
_SHOWS = families("FORMS DIMS COPIES ASSIGNS")
_SCALES = families("FORMS DIMS COPIES PRODUCTS QUOTIENTS")


def is_linear(op: Op) -> bool:
    """Whether the operator is linear or affine in its active tensors, running statistics taken as fixed."""
    shape = SHAPES.get(op.family) if op.family else None
    return op.func.is_view or shape is Shape.LINEAR or (shape is Shape.PRODUCT and op.active == 1)


def projects(op: Op) -> bool:
    """Whether a projection shortcut may hold the operator: linear, a norm, or a pooling by the maximum."""
    return is_linear(op) or (op.family is not None and SHAPES[op.family] is Shape.PROJECTS)


def sums(op: Op) -> bool:
    """Whether the operator adds up two active tensors."""
    return op.family is Family.SUMS and op.active > 1


def is_pointwise(op: Op) -> bool:
    """Whether the operator treats every number by itself, or only shows or copies numbers."""
    return op.func.is_view or op.family in _SHOWS or torch.Tag.pointwise in op.func.tags


def enlarges(op: Op) -> bool:
    """Whether the operator resizes an image or sequence."""
    return op.family is Family.RESIZES


def is_layer(op: Op) -> bool:
    """Whether the operator is a convolution or a matrix product with a Parameter."""
    return op.weighted and op.family in _LAYERS


def scales(op: Op) -> bool:
    """Whether the operator hands its one active tensor on, times a constant at most."""
    return op.active < 2 and op.family in _SCALES


def is_softmax(op: Op) -> bool:
    """Whether the operator makes weights that sum to one of scores."""
    return op.family is Family.SOFTMAXES


def is_masking(op: Op) -> bool:
    """Whether the operator leaves scores what they are: scales, moves, masks them or adds to them."""
    return op.family in {Family.MASKS, Family.CHOICES} or (is_linear(op) and not is_layer(op))


def pools(ops: Sequence[Op]) -> bool:
    """Whether linear operators mix tokens by pooling alone, without a layer that linear paths merge into."""
    return not any(is_layer(op) for op in ops) and any(op.family is Family.MEAN_POOLS for op in ops)


def drops_rows(ops: Sequence[Op], rows: int) -> bool:
    """Whether operators without a weight multiply rows, or all of them, by coins: stochastic depth."""
    alone = not any(op.weighted or op.flops for op in ops)
    return alone and is_coin(ops) and all(op.random in (0, 1, rows) for op in ops)


def is_noise(op: Op) -> bool:
    """Whether the operator draws from a normal distribution."""
    return op.family is Family.NOISE


def is_coin(ops: Iterable[Op]) -> bool:
    """Whether random numbers are drawn once and made zeros and ones of: by a Bernoulli draw, or by rounding.

    A coin beside another draw (ShakeDrop's factors) is a mixture of its own.
    """
    ops = list(ops)
    draws = sum(op.random > 0 for op in ops)
    return draws == 1 and any(op.family in _COINS for op in ops)
