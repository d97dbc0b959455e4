"""The table of operators and their laws, which are those of `surgeon._folding.algebra`."""

from fractions import Fraction

from surgeon._folding.algebra import (
    Laws,
    Rule,
    adds,
    adds_product,
    affine,
    attends,
    carries,
    clamps,
    compares,
    copies,
    deforms,
    divides,
    fills,
    ignores,
    interpolates,
    joins,
    leaks,
    looks_up,
    makes_free,
    multiplies,
    norm_of,
    normalises,
    normalises_by_buffers,
    nothing,
    pads,
    power_of,
    raises,
    selects,
    variance,
    views,
    weight_norm,
    writes,
)
from surgeon._folding.recorder import WRITTEN, OpCall


def laws(call: OpCall) -> Laws:
    """The laws of one call; an unknown operator lets no scale through."""
    return RULES.get(call.name, nothing)(call)


def _aten(names: str, rule: Rule) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


RULES: dict[str, Rule] = {
    # Same numbers in another form or order, or a homogeneous function of one tensor.
    **_aten(
        "_unsafe_view _reshape_alias permute transpose t expand squeeze unsqueeze slice select split"
        " split_with_sizes unbind diagonal unfold alias detach clone lift lift_fresh lift_fresh_copy"
        " _to_copy repeat repeat_interleave roll flip rot90 pixel_shuffle pixel_unshuffle channel_shuffle"
        " native_channel_shuffle index index_select gather take max_unpool2d max_unpool3d"
        " tril triu im2col col2im view_as_real view_as_complex _conj _conj_physical real imag neg",
        carries,
    ),
    # Changes of form in place: the value stays the same one.
    **_aten("squeeze_ unsqueeze_ t_ transpose_ swapdims_ swapaxes_ detach_", carries),
    # Of the writes in place that functionalisation leaves copies alone have a law: what was there and what is
    # there are of one degree.
    WRITTEN: joins,
    **_aten("copy_", copies),
    **_aten("relu leaky_relu _prelu_kernel abs mean sum nansum cumsum amax amin nanmean std", carries),
    **_aten("max min median sort topk kthvalue", joins),
    **_aten(
        "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d"
        " fractional_max_pool2d fractional_max_pool3d"
        " avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
        " _adaptive_avg_pool2d _adaptive_avg_pool3d reflection_pad1d reflection_pad2d reflection_pad3d"
        " replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d"
        " upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"
        " upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"
        " _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
        " _fft_r2c _fft_c2r _fft_c2c",
        carries,
    ),
    **_aten("view", views),
    **_aten("rrelu rrelu_with_noise rrelu_with_noise_functional", leaks),
    **_aten("linalg_vector_norm norm", norm_of),
    **_aten("constant_pad_nd", pads),
    **_aten("hardtanh", clamps("min_val", "max_val")),
    **_aten("clamp clamp_min clamp_max", clamps("min", "max")),
    **_aten("threshold", clamps("threshold", "value")),
    **_aten("masked_fill index_fill", writes),
    # Sums.
    **_aten("add sub rsub", adds),
    **_aten(
        "slice_scatter select_scatter diagonal_scatter index_put _unsafe_index_put"
        " scatter scatter_add index_add index_copy masked_scatter",
        writes,
    ),
    **_aten("cat stack maximum minimum fmax fmin complex hypot", joins),
    **_aten("where", selects),
    **_aten("lerp", interpolates),
    **_aten("copy", copies),
    **_aten("embedding", looks_up),
    # Products.
    **_aten("mul mm bmm matmul mv dot vdot outer ger kron cross linalg_cross", multiplies),
    **_aten("div divide true_divide", divides),
    **_aten("convolution _convolution", affine("input", "weight", "bias")),
    **_aten("addmm", affine("mat1", "mat2", "self")),
    **_aten("addmv", affine("mat", "vec", "self")),
    **_aten("addr", affine("vec1", "vec2", "self")),
    **_aten("baddbmm addbmm", affine("batch1", "batch2", "self")),
    **_aten("addcmul", adds_product(1)),
    **_aten("addcdiv", adds_product(-1)),
    **_aten("grid_sampler_2d grid_sampler_3d cudnn_grid_sampler", carries),
    "torchvision.deform_conv2d": deforms,
    "torchvision.roi_align": carries,
    "torchvision.ps_roi_align": carries,
    # Powers.
    **_aten("pow", raises),
    **_aten("sqrt", power_of(Fraction(1, 2))),
    **_aten("rsqrt", power_of(Fraction(-1, 2))),
    **_aten("reciprocal", power_of(Fraction(-1))),
    **_aten("square", power_of(Fraction(2))),
    **_aten("var var_mean", variance),
    # Normalisations and attention.
    **_aten(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm"
        " miopen_batch_norm _batch_norm_no_update _batch_norm_with_update native_layer_norm native_group_norm"
        " _fused_rms_norm",
        normalises,
    ),
    "surgeon.batch_norm": normalises_by_buffers,
    **_aten("_weight_norm_interface", weight_norm),
    **_aten(
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu"
        " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
        " _scaled_dot_product_fused_attention_overrideable",
        attends,
    ),
    # Blind to a scale, or without content.
    **_aten("eq ne lt le gt ge", compares),
    **_aten("argmax argmin argsort sign sgn isnan logical_not signbit count_nonzero", ignores),
    **_aten("empty empty_like new_empty empty_strided new_empty_strided empty_permuted", makes_free),
    **_aten("zeros zeros_like new_zeros zero", makes_free),
    **_aten("full full_like new_full scalar_tensor fill", fills),
}
