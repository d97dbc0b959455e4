"""Which operators keep the rows of a batch apart, where the shapes of their results do not tell.

The rows are a prime number, so a dimension holds them if that number divides its size. Reductions, products
and slices betray mixing by their shapes, and operators per element mix nothing. The rest is listed here with
the dimensions they work along. An operator that is not listed is taken to mix: its branch is masked.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PRIME = 10007  # no network has a width or a resolution that it divides
UNKNOWN = "uses an operator that is not known to keep rows apart"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names without leading and trailing underscores. What these do to rows shows in the shapes:
_SHOWN = _words("""
    alias clone contiguous copy detach diagonal expand lift_fresh permute real imag conj neg_view repeat
    select slice split split_with_sizes unsafe_split squeeze stack t to_copy transpose unbind unfold unsqueeze
    view_as_complex view_as_real new_empty new_full new_ones new_zeros new_empty_strided empty_like full_like
    ones_like zeros_like rand_like randn_like randint_like fill zero
    addbmm addmm addmv addr all amax amin aminmax any argmax argmin baddbmm bmm dot linear linalg_vector_norm
    logsumexp max mean min mm mv nansum norm prod std std_mean sum trilinear var var_mean
    hardswish log_sigmoid_forward prelu_kernel rsub complex polar masked_fill
    bernoulli exponential fused_dropout native_dropout normal uniform prelu rrelu_with_noise
""")
_VIEWS = _words("view unsafe_view reshape reshape_alias")
# These work along the dimension that an argument names,
_ALONG = _words("""
    softmax safe_softmax log_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort topk kthvalue
    median mode flip roll cat glu gather index_select index_add index_copy index_fill scatter scatter_add
    scatter_reduce select_scatter slice_scatter renorm fft_r2c fft_c2c fft_c2r
""")
# and these along everything behind the channels, which are the second dimension.
_SPATIAL = _words("""
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
    avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices im2col col2im
    constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle
    pixel_unshuffle channel_shuffle grid_sampler_2d grid_sampler_3d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d
    upsample_trilinear3d upsample_bilinear2d_aa upsample_bicubic2d_aa
""")


@dataclass(frozen=True, slots=True)
class _Call:
    """An operator's call: its arguments by name, and the first of them that depends on the rows."""

    given: dict[str, Any]
    first: Tensor
    active: Callable[[Tensor], bool]

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name)


def hazard(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], active: Callable[[Tensor], bool]) -> str:
    """What an operator does to rows that its results' shapes do not show; ``""`` if nothing.

    Args:
        func: The operator, an overload.
        args: What it was called with,
        kwargs: by place and by name.
        active: Whether a tensor depends on the rows.
    """
    name = func._schema.name.rpartition("::")[2].strip("_")
    if torch.Tag.pointwise in func.tags or name in _SHOWN:
        return ""
    given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    first = next((t for t in _tensors(args) if active(t)), None)
    if first is None:
        return ""
    rule = _RULES.get(name)
    if rule is None:
        return UNKNOWN
    return "works along the dimension of the rows" if rule(_Call(given, first, active)) else ""


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _rows(size: int) -> bool:
    return size % PRIME == 0


def _along(call: _Call) -> bool:
    named = call["dims"] if call["dim"] is None else call["dim"]
    if named is None or named == []:
        return True
    named = [named] if isinstance(named, int) else list(named)
    return call.first.ndim > 0 and any(_rows(call.first.shape[d]) for d in named)


def _spatial(call: _Call) -> bool:
    return any(_rows(size) for size in call.first.shape[2:])


def _convolution(call: _Call) -> bool:
    channels = call["input"].shape[1]
    return any(_rows(s) for s in call["input"].shape[2:]) or (_rows(channels) and not _rows(call["groups"]))


def _layer_norm(call: _Call) -> bool:
    return any(_rows(size) for size in call["normalized_shape"])


def _group_norm(call: _Call) -> bool:
    return not _rows(call["N"]) and not _rows(call["group"])


def _attention(call: _Call) -> bool:
    return any(_rows(s) for name in ("query", "key", "value") for s in call[name].shape[-2:])


def _index(call: _Call) -> bool:
    """Picks entries of a tensor by number: of rows, perhaps in another order."""
    picked = call["self"]
    named = [d for d, index in enumerate(call["indices"]) if index is not None]
    return call.active(picked) and any(_rows(picked.shape[d]) for d in named)


def _table(call: _Call) -> bool:
    return call.active(call["weight"])


def _matrix(call: _Call) -> bool:
    return any(_rows(size) for size in call.first.shape[-2:])


def _view(call: _Call) -> bool:
    """A reshaping that moves the rows to another place, as ``(rows, 4)`` to ``(4, rows)``, scrambles them."""
    size = [s if s != -1 else _missing(call.first, call["size"]) for s in call["size"]]
    before, after = _place(call.first.shape), _place(size)
    return None not in (before, after) and before != after


def _missing(first: Tensor, size: Iterable[int]) -> int:
    rest = 1
    for s in size:
        rest *= s if s != -1 else 1
    return first.numel() // max(rest, 1)


def _place(shape: Iterable[int]) -> int | None:
    """How many entries lie between one row and the next, if a dimension is that of the rows alone."""
    sizes, between = list(shape), 1
    for size in reversed(sizes):
        if size == PRIME:
            return between
        between *= size
    return None


_RULES: dict[str, Callable[[_Call], bool]] = {
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_SPATIAL, _spatial),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(("convolution", "mkldnn_convolution", "cudnn_convolution"), _convolution),
    **dict.fromkeys(("native_layer_norm", "fused_rms_norm"), _layer_norm),
    **dict.fromkeys(("index", "index_put", "unsafe_index"), _index),
    **dict.fromkeys(("tril", "triu"), _matrix),
    "embedding": _table,
    "mkldnn_rnn_layer": lambda call: _rows(call["input"].shape[0]),  # whatever ``batch_first`` says
    "cudnn_rnn": lambda call: _rows(call["input"].shape[1 if call["batch_first"] else 0]),
    **dict.fromkeys(
        (
            *("scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_flash_attention"),
            *("scaled_dot_product_efficient_attention", "scaled_dot_product_cudnn_attention"),
            "scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    "native_group_norm": _group_norm,
}
