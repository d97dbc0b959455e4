"""Every operator that has a law, each on its own: the rest of the table that `test_algebra` begins."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_algebra import LOOSE, SCALE, TIGHT, Applied, Function, System, _error, assignments, rand
from torch import Tensor

from surgeon._folding.algebra import nothing
from surgeon._folding.flat import Flat, flatten
from surgeon._folding.operators import LAWS
from surgeon._tracing.aten import Family, named

aten = torch.ops.aten
NEAR = torch.tensor([[1.1, 1 / 1.1, 1.2, 1 / 1.2]] * 3, dtype=torch.float64)
INDEX = torch.tensor([2, 0, 1])
ROWS = torch.tensor([[0, 2, 1, 0], [1, 1, 0, 2], [2, 0, 2, 1]])
MASK = torch.tensor([[True, False, True, True]] * 3)
GRID3 = torch.rand(1, 2, 2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
SAMPLES = torch.tensor([[[0.3, 0.4], [0.6, 0.2]]], dtype=torch.float64)
SAMPLES3 = torch.tensor([[[0.3, 0.4, 0.5], [0.6, 0.2, 0.1]]], dtype=torch.float64)
BOXES = torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]], dtype=torch.float64)


def on(*shape: int) -> tuple[Tensor, ...]:
    return (rand(*shape),)


def complex_of(x: Tensor) -> Tensor:
    return torch.view_as_complex(x)


HOMOGENEOUS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    # Other forms of the same numbers.
    "_conj": (lambda x: torch.view_as_real(aten._conj(complex_of(x)).resolve_conj()), on(3, 2)),
    "conj_physical": (lambda x: torch.view_as_real(aten.conj_physical(complex_of(x))), on(3, 2)),
    "real": (lambda x: aten.real(complex_of(x)), on(3, 2)),
    "_reshape_alias": (lambda x: aten._reshape_alias(x, [4, 3], [3, 1]), on(3, 4)),
    "alias": (aten.alias, on(3, 4)),
    "diagonal": (aten.diagonal, on(3, 4)),
    "index_select": (lambda x: aten.index_select(x, 0, INDEX), on(3, 4)),
    "lift": (aten.lift, on(3, 4)),
    "lift_fresh_copy": (aten.lift_fresh_copy, on(3, 4)),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), on(1, 4, 2, 2)),
    "native_channel_shuffle": (lambda x: aten.native_channel_shuffle(x, 2), on(1, 4, 2, 2)),
    "neg": (aten.neg, on(3, 4)),
    "pixel_unshuffle": (lambda x: aten.pixel_unshuffle(x, 2), on(1, 1, 4, 4)),
    "repeat_interleave": (lambda x: x.repeat_interleave(torch.tensor([2, 1, 3]), 0, output_size=6), on(3, 4)),
    "rot90": (lambda x: aten.rot90(x, 1, [0, 1]), on(3, 4)),
    "select": (lambda x: aten.select(x, 0, 1), on(3, 4)),
    "split": (lambda x: aten.split(x, 2)[1], on(3, 4)),
    "squeeze": (aten.squeeze, on(3, 1)),
    "take": (lambda x: aten.take(x, INDEX), on(3, 4)),
    "tril": (aten.tril, on(3, 4)),
    "triu": (aten.triu, on(3, 4)),
    "unfold": (lambda x: aten.unfold(x, 0, 2, 1), on(3, 4)),
    "t_": (lambda x: x.clone().t_(), on(3, 4)),
    "transpose_": (lambda x: x.clone().transpose_(0, 1), on(3, 4)),
    "unsqueeze_": (lambda x: x.clone().unsqueeze_(0), on(3, 4)),
    "swapdims_": (lambda x: x.clone().swapdims_(0, 1), on(3, 4)),
    "swapaxes_": (lambda x: x.clone().swapaxes_(0, 1), on(3, 4)),
    "detach_": (lambda x: x.clone().detach_(), on(3, 4)),
    # Functions of one tensor.
    "amin": (lambda x: aten.amin(x, [1]), on(3, 4)),
    "cumsum": (lambda x: aten.cumsum(x, 1), on(3, 4)),
    "kthvalue": (lambda x: aten.kthvalue(x, 2)[0], on(3, 4)),
    "median": (lambda x: aten.median(x, 1)[0], on(3, 4)),
    "min": (aten.min, on(3, 4)),
    "nansum": (lambda x: aten.nansum(x, [1]), on(3, 4)),
    "norm": (lambda x: aten.norm(x, 2), on(3, 4)),
    "rrelu": (lambda x: aten.rrelu(x, 0.1, 0.3, False), on(3, 4)),
    "sort": (lambda x: aten.sort(x)[0], on(3, 4)),
    "clamp_max": (lambda x: aten.clamp_max(x, 0), on(3, 4)),
    "threshold": (lambda x: aten.threshold(x, 0, 0), on(3, 4)),
    "_fft_c2c": (lambda x: torch.view_as_real(aten._fft_c2c(complex_of(x), [0], 0, True)), on(4, 2)),
    "as_strided": (lambda x: aten.as_strided(x[1:], [2, 2], [1, 4], 1), on(3, 4)),
    "_unsafe_index": (lambda x: aten._unsafe_index(x, [INDEX]), on(3, 4)),
    "aminmax": (lambda x: aten.aminmax(x)[1], on(3, 4)),
    "cummax": (lambda x: aten.cummax(x, 1)[0], on(3, 4)),
    "cummin": (lambda x: aten.cummin(x, 1)[0], on(3, 4)),
    "mode": (lambda x: aten.mode(x, 1)[0], on(3, 4)),
    # Pooling, padding, resizing.
    "adaptive_avg_pool3d": (lambda x: aten._adaptive_avg_pool3d(x, [2, 2, 2]), on(1, 1, 4, 4, 4)),
    "adaptive_max_pool3d": (lambda x: aten.adaptive_max_pool3d(x, [2, 2, 2])[0], on(1, 1, 4, 4, 4)),
    "avg_pool1d": (lambda x: aten.avg_pool1d(x, [2]), on(1, 2, 4)),
    "avg_pool3d": (lambda x: aten.avg_pool3d(x, [2, 2, 2]), on(1, 1, 4, 4, 4)),
    "fractional_max_pool2d": (
        lambda x: aten.fractional_max_pool2d(x, [2, 2], [2, 2], SAMPLES)[0],
        on(1, 2, 5, 5),
    ),
    "fractional_max_pool3d": (
        lambda x: aten.fractional_max_pool3d(x, [2, 2, 2], [2, 2, 2], SAMPLES3)[0],
        on(1, 2, 5, 5, 5),
    ),
    "max_pool3d": (lambda x: aten.max_pool3d_with_indices(x, [2, 2, 2])[0], on(1, 1, 4, 4, 4)),
    "max_unpool3d": (
        lambda x: aten.max_unpool3d(x, torch.tensor([[[[[3]]]]]), [2, 2, 2], [2, 2, 2], [0, 0, 0]),
        on(1, 1, 1, 1, 1),
    ),
    "grid_sampler_3d": (lambda x: F.grid_sample(x, GRID3, align_corners=False), on(1, 2, 3, 3, 3)),
    "roi_align": (lambda x: torchvision.ops.roi_align(x, BOXES, 2), on(1, 2, 6, 6)),
    "ps_roi_align": (lambda x: torchvision.ops.ps_roi_align(x, BOXES, 2), on(1, 4, 6, 6)),
    **{
        f"{kind}_pad{dims}d": (
            lambda x, kind=kind, dims=dims: getattr(aten, f"{kind}_pad{dims}d")(x, [1] * 2 * dims),
            on(1, 2, *[3] * dims),
        )
        for kind in ("reflection", "replication")
        for dims in (1, 2, 3)
    },
    **{
        f"{name}{dims}d": (
            lambda x, name=name, dims=dims: getattr(aten, f"{name}{dims}d")(x, [4] * dims),
            on(1, 2, *[3] * dims),
        )
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for dims in (1, 2, 3)
    },
    "upsample_linear1d": (lambda x: aten.upsample_linear1d(x, [4], False), on(1, 2, 3)),
    "upsample_trilinear3d": (lambda x: aten.upsample_trilinear3d(x, [4] * 3, False), on(1, 1, 3, 3, 3)),
    "upsample_bicubic2d": (lambda x: aten.upsample_bicubic2d(x, [4] * 2, False), on(1, 1, 3, 3)),
    "_upsample_bilinear2d_aa": (lambda x: aten._upsample_bilinear2d_aa(x, [2] * 2, False), on(1, 1, 4, 4)),
    "_upsample_bicubic2d_aa": (lambda x: aten._upsample_bicubic2d_aa(x, [2] * 2, False), on(1, 1, 4, 4)),
}

OF_SEVERAL: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    # Sums, choices and writes.
    "minimum": (aten.minimum, (rand(3, 4), rand(3, 4))),
    "fmax": (aten.fmax, (rand(3, 4), rand(3, 4))),
    "fmin": (aten.fmin, (rand(3, 4), rand(3, 4))),
    "hypot": (aten.hypot, (rand(3, 4), rand(3, 4))),
    "complex": (lambda a, b: torch.view_as_real(aten.complex(a, b)), (rand(3, 4), rand(3, 4))),
    "diagonal_scatter": (aten.diagonal_scatter, (rand(3, 3), rand(3))),
    "select_scatter": (lambda a, b: aten.select_scatter(a, b, 0, 1), (rand(3, 4), rand(4))),
    "index_add": (lambda a, b: aten.index_add(a, 0, INDEX, b), (rand(3, 4), rand(3, 4))),
    "index_copy": (lambda a, b: aten.index_copy(a, 0, INDEX[:2], b), (rand(3, 4), rand(2, 4))),
    "scatter_add": (lambda a, b: aten.scatter_add(a, 0, ROWS, b), (rand(3, 4), rand(3, 4))),
    "masked_scatter": (lambda a, b: aten.masked_scatter(a, MASK, b), (rand(3, 4), rand(12))),
    "_unsafe_index_put": (lambda a, b: aten._unsafe_index_put(a, [INDEX[:2]], b), (rand(3, 4), rand(2, 4))),
    **{
        f"{name} by {reduce}": (
            lambda a, b, name=name, index=index, reduce=reduce: getattr(aten, name)(a, 0, index, b, reduce),
            (rand(3, 4), rand(3, 4)),
        )
        for name, index, reduces in (
            ("scatter_reduce", ROWS, ("sum", "mean", "amax", "amin")),
            ("index_reduce", INDEX, ("mean", "amax", "amin")),
        )
        for reduce in reduces
    },
    # Products.
    "_trilinear": (
        lambda a, b, c: aten._trilinear(a, b, c, [1, 3], [0], [1, 2], [2, 3]),
        (rand(3, 2), rand(5, 2, 4), rand(3, 4)),
    ),
    "kron": (aten.kron, (rand(2, 2), rand(2, 2))),
    "linalg_cross": (aten.linalg_cross, (rand(2, 3), rand(2, 3))),
    "mv": (aten.mv, (rand(3, 4), rand(4))),
    "vdot": (aten.vdot, (rand(4), rand(4))),
    "addmv": (aten.addmv, (rand(3), rand(3, 4), rand(4))),
    "addr": (aten.addr, (rand(3, 4), rand(3), rand(4))),
    "addbmm": (aten.addbmm, (rand(3, 4), rand(2, 3, 2), rand(2, 2, 4))),
    # Powers.
    "square": (aten.square, on(3, 4)),
    "var": (lambda x: aten.var(x, [1]), on(3, 4)),
    # Truth values, which weigh what a scale leaves alone.
    **{
        name: (
            lambda x, y, name=name: getattr(aten, name)(x, y).double() * 1.0,
            (NEAR, torch.ones_like(NEAR)),
        )
        for name in ("lt", "le", "ge")
    },
}

BLIND: dict[str, Function] = {
    name: lambda x, name=name: getattr(aten, name)(x).double() + 1  # type: ignore[misc]
    for name in ("argmin", "argsort", "count_nonzero", "isnan", "logical_not", "sgn")
} | {
    "signbit": lambda x: aten.signbit(x).double() + 1,
    "eq": lambda x: aten.eq(x, 0).double() + 1,
    "ne": lambda x: aten.ne(x, 0).double() + 1,
}

MADE: dict[str, Function] = {
    "zeros_like": lambda x: x + aten.zeros_like(x),
    "zero": lambda x: x + x.new_empty(4).zero_(),
    "new_empty": lambda x: x + aten.fill(aten.new_empty(x, [4]), 0.0),
    "new_empty_strided": lambda x: x + aten.fill(aten.new_empty_strided(x, [4], [1]), 0),
    "empty_like": lambda x: x + aten.fill(aten.empty_like(x), 0),
    "empty_strided": lambda x: x + aten.fill(aten.empty_strided([4], [1], dtype=x.dtype), 0),
    "empty_permuted": lambda x: x + aten.fill(aten.empty_permuted([4], [0], dtype=x.dtype), 0),
    "full": lambda x: x + aten.full([4], 0.0, dtype=x.dtype),
    "full_like": lambda x: x + aten.full_like(x, 0.0),
    "new_full": lambda x: x + aten.new_full(x, [4], 0.0),
}
ELSEWHERE = {
    # Attention is recorded by its definition, and these run on other devices than the tests.
    *Family.ATTENTION.names,
    *("cudnn_batch_norm", "miopen_batch_norm", "cudnn_grid_sampler"),
    # Forms of batch norm that only other exporters make; the same law as `native_batch_norm`.
    *(name for name in Family.BATCH_NORMS.names if "legit" in name or "update" in name),
    # Of tensors that functionalisation has not wrapped: constants and integers.
    *("lift", "lift_fresh_copy", "detach", "scalar_tensor", *Family.QUESTIONS.names),
    # What functionalisation makes another of, or rarely leaves; `test_fold_flat` has such cases.
    *("unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "rrelu_with_noise", "neg_view", "contiguous"),
}


@pytest.mark.filterwarnings("ignore:index_reduce")  # in beta, in PyTorch 2.15
@pytest.mark.parametrize("name", [*HOMOGENEOUS, *OF_SEVERAL])
def test_what_the_laws_allow_is_exact_and_what_they_forbid_is_not(name: str) -> None:
    function, tensors = (HOMOGENEOUS | OF_SEVERAL)[name]
    flat = flatten(Applied(function, tensors), (), {})
    system, arguments = System(flat), list(flat.parameters)
    (result,) = flat.outputs
    allowed = 0
    for exponents, out in assignments(len(tensors)):
        if system.holds({result: out} | dict(zip(arguments, exponents, strict=True))):
            allowed += 1
            assert _error(function, tensors, exponents, out) < 1e-11, (exponents, out)
        else:
            assert _error(function, tensors, exponents, out) > 1e-6, (exponents, out)
    assert allowed > 1, "some scale passes"


def _passes(flat: Flat, argument: int, out: int) -> bool:
    (result,) = flat.outputs
    return System(flat).holds({result: out} | dict.fromkeys(flat.parameters, argument))


@pytest.mark.parametrize("name", BLIND)
def test_what_does_not_see_a_scale(name: str) -> None:
    x, function = rand(5), BLIND[name]
    flat = flatten(Applied(function, (x,)), (), {})
    assert _passes(flat, 1, 0)
    assert not _passes(flat, 1, 1)
    assert torch.equal(function(SCALE * x), function(x))


@pytest.mark.parametrize("name", MADE)
def test_zeros_and_memory_without_content(name: str) -> None:
    x, function = rand(4), MADE[name]
    flat = flatten(Applied(function, (x,)), (), {})
    assert _passes(flat, 1, 1)
    assert not _passes(flat, 1, 0)
    torch.testing.assert_close(function(SCALE * x), SCALE * function(x), rtol=1e-14, atol=0)


def test_a_batch_norm_whose_running_mean_follows_its_input() -> None:
    """``surgeon.batch_norm``: of its five tensors the variance alone stays."""
    variance = torch.rand(2, dtype=torch.float64) + 0.5

    def function(x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, training=False)

    tensors = (rand(3, 2, 4), rand(2), rand(2), rand(2))
    flat = flatten(Applied(function, tensors), (), {})
    calls = [
        dataclasses.replace(c, name="surgeon.batch_norm") if "batch_norm" in c.name else c for c in flat.calls
    ]
    system, arguments = System(dataclasses.replace(flat, calls=tuple(calls))), list(flat.parameters)
    (result,) = flat.outputs
    passed = set()
    for exponents, out in assignments(4):
        holds = system.holds({result: out} | dict(zip(arguments, exponents, strict=True)))
        assert holds == (_error(function, tensors, exponents, out) < 1e-11), (exponents, out)
        passed |= {(exponents, out)} if holds else set()
    assert ((1, 1, 0, 1), 1) in passed
    assert ((0, 0, 1, 1), 1) in passed
    assert ((1, 0, 0, 1), 1) not in passed


@pytest.mark.slow
def test_every_law_is_tried() -> None:
    """Composite operators dissolve into others before they are recorded; the rest has a case."""
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        *(TIGHT | LOOSE | HOMOGENEOUS | OF_SEVERAL).values(),
        *((function, (rand(4),)) for function in (BLIND | MADE).values()),
    ]
    met = {named(call.name) for f, tensors in cases for call in flatten(Applied(f, tensors), (), {}).calls}
    known = {name for family, law in LAWS.items() if law is not nothing for name in family.names}
    untried = known - met - ELSEWHERE
    assert {name for name in untried if not _dissolves(name)} == set()


def _dissolves(name: str) -> bool:
    found = [getattr(aten, one) for one in (name, f"_{name}", f"{name}_") if hasattr(aten, one)]
    names = [getattr(packet, packet.overloads()[0])._name for packet in found]
    dispatch = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(dispatch(one, "CompositeImplicitAutograd") for one in names)
