"""The law of each family of operators, of those in `surgeon._folding.algebra`."""

from surgeon._folding import algebra
from surgeon._folding.algebra import Laws, Rule, carries, joins, multiplies, nothing
from surgeon._folding.recorder import WRITTEN, OpCall
from surgeon._tracing.aten import Family, answers, family_of

LAWS: dict[Family, Rule] = answers(
    # Same numbers in another form or order, or a homogeneous function of one tensor.
    (
        carries,
        """AXES DIMS PARTS COPIES COMPLEX SHIFTS REARRANGED TRIANGLES PICKS GATHERS RESIZES MEAN_POOLS
        ADAPTIVE_POOLS MAX_POOLS SAMPLES REGIONS REDUCTIONS RUNNING_SUMS FOURIER""",
    ),
    (algebra.views, "FORMS"),
    (algebra.pads, "PADS"),
    (algebra.leaks, "RELUS LEAKY"),
    (algebra.clamps, "CLAMPS"),
    (algebra.norm_of, "LENGTHS"),
    (algebra.deviates, "DEVIATIONS"),
    (algebra.raises, "POWERS"),
    # Homogeneous in several tensors together.
    (joins, "CATS STACKS PAIRS EXTREMES ORDERED STRIDES"),
    (algebra.adds, "SUMS DIFFERENCES"),
    (algebra.selects, "CHOICES"),
    (algebra.writes, "MASKS SCATTERS PUTS PACKED MERGES"),
    (algebra.copies, "ASSIGNS"),
    (algebra.interpolates, "LERPS"),
    (algebra.looks_up, "TABLES"),
    # Products.
    (multiplies, "PRODUCTS MATMULS CROSS TRILINEAR"),
    (algebra.divides, "QUOTIENTS"),
    (algebra.affine, "CONVOLUTIONS AFFINE"),
    (algebra.adds_product, "FUSED"),
    (algebra.deforms, "DEFORMED"),
    # Normalisations and attention.
    (algebra.normalises, "BATCH_NORMS LAYER_NORMS GROUP_NORMS"),
    (algebra.weight_norm, "WEIGHT_NORMS"),
    (algebra.attends, "ATTENTION"),
    # Blind to a scale, or without content.
    (algebra.compares, "COMPARISONS"),
    (algebra.ignores, "INDICES SIGNS QUESTIONS"),
    (algebra.fills, "EMPTIES ZEROS FILLS ERASES"),
    # These let no scale through.
    (
        nothing,
        "ONES NOISE DRAWS COINS DROPOUTS SQUASHES SMOOTH ROUNDINGS SOFTMAXES RUNNING TOTALS RECURRENT",
    ),
)
_OWN: dict[str, Rule] = {
    # Writes in place that functionalisation leaves: what was there and what is there have one exponent.
    WRITTEN: joins,
    "surgeon.batch_norm": algebra.normalises_by_buffers,
}


def laws(call: OpCall) -> Laws:
    """The laws of one call; an unknown operator lets no scale through."""
    kind = family_of(call.name)
    return (LAWS[kind] if kind else _OWN.get(call.name, nothing))(call)
