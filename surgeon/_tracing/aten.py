"""The one book of operators: every ATen operator that surgeon knows something of, in families.

The members of a family do the same thing, so they get the same answers: whether find may take them for
linear (`surgeon._tracing.operators`), whether they keep the rows of a batch apart
(`surgeon._gating.rowrules`), which scales pass them in the fold (`surgeon._folding.operators`). Each step
keeps its answers in its own room, one for every family; an operator of no family is unknown to all of them.

An operator stands under its name without underscores at either end, which is that of all its overloads and
of its in-place form; ``#d`` is ``1d``, ``2d`` and ``3d``. Operators of other libraries have the library in
front. A name means nothing until such an operator runs, so one that an older PyTorch lacks does no harm.
"""

import functools
from collections.abc import Iterator
from enum import Enum
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Family(Enum):
    """Operators that do the same thing; the value lists their names."""

    # New tensors, which take at most size and type from another one.
    EMPTIES = "empty empty_like new_empty empty_strided new_empty_strided empty_permuted"
    ZEROS = "zeros zeros_like new_zeros"
    ONES = "ones ones_like new_ones"
    FILLS = "full full_like new_full scalar_tensor"
    NOISE = "randn randn_like normal normal_functional"
    DRAWS = "rand rand_like randint randint_like uniform exponential"
    COINS = "bernoulli"
    # The same numbers, all or some of them, in another form or order.
    FORMS = "view unsafe_view reshape reshape_alias"
    AXES = "permute transpose t swapdims swapaxes"
    DIMS = "squeeze unsqueeze expand repeat"
    PARTS = "slice select split split_with_sizes unsafe_split unsafe_split_with_sizes unbind diagonal unfold"
    STRIDES = "as_strided"
    COPIES = "clone alias detach lift lift_fresh lift_fresh_copy to_copy contiguous"
    COMPLEX = "view_as_real view_as_complex conj conj_physical real imag neg_view"
    SHIFTS = "roll flip rot90"
    REARRANGED = """pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im
        max_unpool2d max_unpool3d"""
    TRIANGLES = "tril triu"
    PICKS = "index unsafe_index"
    GATHERS = "index_select gather take"
    TABLES = "embedding"
    CATS = "cat"
    STACKS = "stack"
    # Numbers written over others, in place or in a copy.
    ERASES = "zero fill"
    ASSIGNS = "copy"
    MASKS = "masked_fill"
    CHOICES = "where"
    SCATTERS = "scatter scatter_add index_add index_copy index_fill slice_scatter select_scatter"
    MERGES = "scatter_reduce index_reduce"
    PUTS = "index_put unsafe_index_put"
    PACKED = "diagonal_scatter masked_scatter"
    # Windows over what lies behind the channels.
    PADS = "constant_pad_nd reflection_pad#d replication_pad#d"
    RESIZES = """upsample_nearest#d upsample_nearest_exact#d upsample_linear1d upsample_bilinear2d
        upsample_trilinear3d upsample_bicubic2d upsample_bilinear2d_aa upsample_bicubic2d_aa"""
    MEAN_POOLS = "avg_pool#d"
    ADAPTIVE_POOLS = "adaptive_avg_pool#d"
    MAX_POOLS = """max_pool#d max_pool#d_with_indices adaptive_max_pool#d fractional_max_pool2d
        fractional_max_pool3d"""
    SAMPLES = "grid_sampler_2d grid_sampler_3d cudnn_grid_sampler"
    REGIONS = "torchvision.roi_align torchvision.ps_roi_align"
    # Entry by entry.
    RELUS = "relu"
    LEAKY = "leaky_relu prelu prelu_kernel abs rrelu rrelu_with_noise rrelu_with_noise_functional"
    CLAMPS = "hardtanh clamp clamp_min clamp_max threshold"
    SQUASHES = "sigmoid tanh exp"
    SMOOTH = "silu gelu elu mish softplus hardswish hardsigmoid log_sigmoid_forward polar"
    ROUNDINGS = "floor round ceil trunc"
    COMPARISONS = "eq ne lt le gt ge"
    SIGNS = "sign sgn signbit isnan logical_not"
    POWERS = "pow sqrt rsqrt reciprocal square"
    PAIRS = "maximum minimum fmax fmin hypot complex"
    SUMS = "add"
    DIFFERENCES = "sub rsub neg"
    PRODUCTS = "mul"
    QUOTIENTS = "div"
    FUSED = "addcmul addcdiv"
    LERPS = "lerp"
    DROPOUTS = "native_dropout fused_dropout"
    # Layers.
    CONVOLUTIONS = "convolution"
    DEFORMED = "torchvision.deform_conv2d"
    MATMULS = "mm bmm mv dot vdot matmul"
    AFFINE = "addmm addmv addr addbmm baddbmm linear"
    CROSS = "linalg_cross"
    TRILINEAR = "trilinear"
    ATTENTION = """scaled_dot_product_flash_attention scaled_dot_product_flash_attention_for_cpu
        scaled_dot_product_efficient_attention scaled_dot_product_cudnn_attention
        scaled_dot_product_fused_attention_overrideable"""
    RECURRENT = "mkldnn_rnn_layer cudnn_rnn miopen_rnn"
    # Norms.
    BATCH_NORMS = """native_batch_norm native_batch_norm_legit native_batch_norm_legit_functional
        native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm batch_norm_no_update
        batch_norm_with_update batch_norm_with_update_functional"""
    LAYER_NORMS = "native_layer_norm fused_rms_norm"
    GROUP_NORMS = "native_group_norm"
    WEIGHT_NORMS = "weight_norm_interface"
    SOFTMAXES = "softmax safe_softmax log_softmax"
    # Along dimensions, or over them.
    REDUCTIONS = "mean sum nansum"
    TOTALS = "prod logsumexp any all"
    EXTREMES = "max min amax amin aminmax"
    INDICES = "argmax argmin count_nonzero"
    DEVIATIONS = "std std_mean var var_mean"
    LENGTHS = "linalg_vector_norm norm"
    RUNNING_SUMS = "cumsum"
    RUNNING = "cumprod logcumsumexp glu renorm"
    ORDERED = "sort argsort topk kthvalue median mode cummax cummin"
    FOURIER = "fft_r2c fft_c2c fft_c2r"
    # What Python asks of a tensor's form.
    QUESTIONS = """is_same_size has_same_storage_numel has_compatible_shallow_copy_type is_pinned
        assert_tensor_metadata sym_size sym_stride sym_numel sym_storage_offset"""

    @property
    def names(self) -> Iterator[str]:
        """The names of its operators."""
        for name in self.value.split():
            yield from (name.replace("#", d) for d in "123") if "#" in name else (name,)


def families(names: str) -> frozenset[Family]:
    """The families of these names."""
    return frozenset(Family[name] for name in names.split())


_MAKERS = families("EMPTIES ZEROS ONES FILLS NOISE DRAWS ERASES ASSIGNS")
_FAMILIES = {name: family for family in Family for name in family.names}


def named(schema: str) -> str:
    """The name in the book of an operator by its schema's: ``aten::_softmax`` is ``softmax``."""
    library, _, name = schema.replace("::", ".").partition(".")
    return name.strip("_") if library == "aten" else f"{library}.{name}"


@functools.cache
def family_of(schema: str) -> Family | None:
    """The family of an operator by its schema's name; ``None`` if it is in no family."""
    return _FAMILIES.get(named(schema))


@functools.cache
def family(func: Any) -> Family | None:
    """The family of an operator's overload; ``None`` if it is in no family."""
    return family_of(func._schema.name)


@functools.cache
def form_only(func: Any) -> bool:
    """Whether an operator makes a tensor of the size and type of its ``self``, not reading its numbers."""
    given = func._schema.arguments
    return family(func) in _MAKERS and not func._schema.is_mutable and bool(given) and given[0].name == "self"


_ADDERS = {
    *("sub", "rsub", "lerp", "addmm", "addmv", "addbmm", "baddbmm"),
    *("index_add", "scatter_add", "foreach_add", "index_put"),
}


@functools.cache
def may_add(func: Any) -> bool:
    """Whether an operator that is no addition by name adds one thing to its first tensor all the same."""
    return named(func._schema.name) in _ADDERS


def spatial(schema: str) -> int:
    """Over how many dimensions an operator's windows go by its name; 0 if it has none."""
    return next((int(d) for d in "123" if f"{d}d" in schema), 0)


def answers(*rows: tuple[Answer, str]) -> dict[Family, Answer]:
    """One answer for each family, from rows of an answer and the names of the families it is for."""
    return {Family[name]: answer for answer, names in rows for name in names.split()}
