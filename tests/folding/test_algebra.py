"""The laws, operator by operator, against the operators themselves in float64.

Each case is one small function of some tensors. Its laws come from a flat trace. Every assignment of small
exponents that satisfies them must be exact; where the laws are tight, every other one must be wrong.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from surgeon._folding import algebra as _algebra
from surgeon._folding.algebra import Law
from surgeon._folding.flat import Flat, flatten
from surgeon._folding.operators import laws
from surgeon._folding.recorder import Value

SCALE = 0.7
Function = Callable[..., Tensor]


class Applied(nn.Module):
    """A function of Parameters alone, so that every argument is free."""

    def __init__(self, function: Function, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.arguments = nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])
        self.function = function

    def forward(self) -> Tensor:
        return self.function(*self.arguments)


_stream = torch.Generator().manual_seed(0)  # the cases are made on import, before any fixture


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_stream)


class System:
    """All laws of a flat list as one linear system."""

    def __init__(self, flat: Flat) -> None:
        found = [law.terms for call in flat.calls for law in laws(call)]
        found += [((v, 1),) for call in flat.calls for v in (*call.inputs, *call.outputs) if not v.scalable]
        made = {value for call in flat.calls for value in call.outputs}
        read = {value for call in flat.calls for value in call.inputs}
        found += [((v, 1),) for v in read - made - set(flat.parameters)]
        self.values = sorted({v for terms in found for v, _ in terms}, key=lambda v: v.number)
        self.matrix = np.zeros((len(found), len(self.values)))
        for row, terms in enumerate(found):
            for value, coefficient in terms:
                self.matrix[row, self.values.index(value)] += coefficient

    def holds(self, known: dict[Value, int]) -> bool:
        """Whether exponents of some values extend to all."""
        fixed = [value in known for value in self.values]
        right = self.matrix[:, fixed] @ np.array([known[v] for v in self.values if v in known])
        left = self.matrix[:, [not one for one in fixed]]
        whole = np.column_stack([left, right])
        return bool(_rank(left) == _rank(whole))


def _rank(matrix: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(matrix)) if matrix.size else 0


def assignments(count: int) -> Iterator[tuple[tuple[int, ...], int]]:
    for exponents in itertools.product((-1, 0, 1), repeat=count):
        for out in range(-3, 4):
            yield exponents, out


def weight_standardised(x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    flat = weight.reshape(1, len(weight), -1)
    standard = F.batch_norm(flat, None, None, weight=gain * 0.1, training=True, momentum=0.0, eps=1.0)
    return F.conv2d(x, standard.reshape_as(weight), bias)


def squeeze_excite(x: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    return x * torch.sigmoid(F.linear(torch.relu(F.linear(x.mean(0), reduce)), expand))


def in_place(x: Tensor, other: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] += other[:, :2]
    return y.mul_(2.0).relu_()


def padded(x: Tensor) -> Tensor:
    y = x.new_zeros(4, 8)
    y[:, 2:6] = x
    return y


POSITIVE = rand(3, 4).abs() + 0.5
IMAGE, VOLUME, LINE = rand(2, 4, 6, 6), rand(1, 2, 4, 4, 4), rand(2, 4, 9)
MASK = rand(3, 4) > 0

TIGHT: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "relu": (torch.relu, (rand(3, 4),)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), (rand(3, 4),)),
    "prelu": (F.prelu, (rand(3, 4), rand(1).abs())),
    "clamp_min_0": (lambda x: x.clamp(min=0), (rand(3, 4),)),
    "relu6": (lambda x: F.relu6(x * 9), (rand(3, 40),)),
    "clamp": (lambda x: x.clamp(-1, 1), (rand(3, 40),)),
    "hardswish": (F.hardswish, (rand(3, 4),)),
    "silu": (F.silu, (rand(3, 4),)),
    "gelu": (F.gelu, (rand(3, 4),)),
    "softmax": (lambda x: x.softmax(-1), (rand(3, 4),)),
    "star_relu": (lambda x, s, b: s * torch.relu(x) ** 2 + b, (rand(3, 4), rand(1), rand(1))),
    "abs_sum": (lambda x: x.abs().sum(1), (rand(3, 4),)),
    "mean": (lambda x: x.mean(1), (rand(3, 4),)),
    "amax": (lambda x: x.amax(1), (rand(3, 4),)),
    "max_values": (lambda x: x.max(1).values, (rand(3, 4),)),
    "topk_values": (lambda x: x.topk(2).values, (rand(3, 4),)),
    "std": (lambda x: x.std(1), (rand(3, 4),)),
    "var_mean": (lambda x: torch.var_mean(x, 1)[0], (rand(3, 4),)),
    "norm": (lambda x: x.norm(dim=1), (rand(3, 4),)),
    "normalize": (lambda x: F.normalize(x, eps=2.0), (rand(30, 4),)),
    "sqrt": (torch.sqrt, (POSITIVE,)),
    "rsqrt": (torch.rsqrt, (POSITIVE,)),
    "reciprocal": (torch.reciprocal, (POSITIVE,)),
    "cube": (lambda x: x**3, (rand(3, 4),)),
    "add": (torch.add, (rand(3, 4), rand(3, 4))),
    "sub": (lambda x, y: x - 2 * y, (rand(3, 4), rand(3, 4))),
    "add_number": (lambda x: x + 1, (rand(3, 4),)),
    "rsub_number": (lambda x: 1 - x, (rand(3, 4),)),
    "mul_number": (lambda x: x * 0.2, (rand(3, 4),)),
    "mul": (torch.mul, (rand(3, 4), rand(3, 4))),
    "mul_self": (lambda x: x * x, (rand(3, 4),)),
    "div": (torch.div, (rand(3, 4), POSITIVE)),
    "div_number": (lambda x: x / 3, (rand(3, 4),)),
    "cat": (lambda x, y: torch.cat([x, y]), (rand(3, 4), rand(3, 4))),
    "stack_sum": (lambda x, y: torch.stack([x, y]).sum(0), (rand(3, 4), rand(3, 4))),
    "add_integers": (lambda x: x + torch.ones(4, dtype=torch.int64), (rand(3, 4),)),
    "cat_integers": (lambda x: torch.cat([x, torch.ones(3, 4, dtype=torch.int64)]), (rand(3, 4),)),
    "to_integers": (lambda x: (9 * x).long().double(), (rand(3, 4),)),
    "max_unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (IMAGE,)),
    "scatter": (lambda x, y: x.scatter(1, torch.tensor([[0, 2]] * 3), y), (rand(3, 4), rand(3, 4))),
    "index_put": (lambda x, y: x.index_put((torch.tensor([0, 2]),), y), (rand(3, 4), rand(2, 4))),
    "index_put_one": (lambda x: x.index_fill(1, torch.tensor([0, 2]), 1.0), (rand(3, 4),)),
    "maximum": (torch.maximum, (rand(3, 4), rand(3, 4))),
    "where": (lambda x, y: torch.where(MASK, x, y), (rand(3, 4), rand(3, 4))),
    "where_zero": (lambda x: torch.where(MASK, x, 0.0), (rand(3, 4),)),
    "where_one": (lambda x: torch.where(MASK, x, 1.0), (rand(3, 4),)),
    "masked_fill_zero": (lambda x: x.masked_fill(MASK, 0.0), (rand(3, 4),)),
    "masked_fill_one": (lambda x: x.masked_fill(MASK, 1.0), (rand(3, 4),)),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), (rand(3, 4), rand(3, 4))),
    "addcmul": (torch.addcmul, (rand(3, 4), rand(3, 4), rand(3, 4))),
    "addcdiv": (torch.addcdiv, (rand(3, 4), rand(3, 4), POSITIVE)),
    "matmul": (torch.matmul, (rand(2, 3, 4), rand(4, 5))),
    "bmm": (torch.bmm, (rand(2, 3, 4), rand(2, 4, 5))),
    "einsum": (lambda x, w: torch.einsum("bij,kj->bki", x, w), (rand(2, 3, 4), rand(5, 4))),
    "addmm": (F.linear, (rand(3, 4), rand(5, 4), rand(5))),
    "linear_3d": (F.linear, (rand(2, 3, 4), rand(5, 4), rand(5))),
    "baddbmm": (torch.baddbmm, (rand(2, 3, 5), rand(2, 3, 4), rand(2, 4, 5))),
    "outer": (torch.outer, (rand(3), rand(4))),
    "embedding": (lambda w: F.embedding(torch.tensor([0, 2]), w), (rand(3, 4),)),
    "conv1d": (F.conv1d, (LINE, rand(3, 4, 3), rand(3))),
    "conv2d_grouped": (lambda x, w, b: F.conv2d(x, w, b, groups=2), (IMAGE, rand(6, 2, 3, 3), rand(6))),
    "conv3d": (F.conv3d, (VOLUME, rand(3, 2, 2, 2, 2), rand(3))),
    "conv_transpose2d": (F.conv_transpose2d, (IMAGE, rand(4, 3, 2, 2), rand(3))),
    "deform_conv2d": (
        lambda x, w, b, m: torchvision.ops.deform_conv2d(
            x, 0.3 * torch.ones(2, 18, 4, 4).double(), w, b, mask=m
        ),
        (IMAGE, rand(3, 4, 3, 3), rand(3), rand(2, 9, 4, 4)),
    ),
    "weight_standardised": (weight_standardised, (IMAGE, rand(3, 4, 3, 3), rand(3), rand(3))),
    "weight_norm": (torch._weight_norm, (rand(3, 4), POSITIVE[:, :1])),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, torch.ones(4).double(), torch.ones(4).double(), w, b),
        (IMAGE, rand(4), rand(4)),
    ),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b, eps=1.0), (rand(3, 4), rand(4), rand(4))),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b, eps=1.0), (IMAGE, rand(4), rand(4))),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w, eps=1.0), (rand(3, 4), rand(4))),
    "instance_norm": (
        lambda x, w, b: F.instance_norm(x, None, None, w, b, eps=1.0),
        (IMAGE, rand(4), rand(4)),
    ),
    "attention": (F.scaled_dot_product_attention, (rand(1, 2, 3, 4), rand(1, 2, 3, 4), rand(1, 2, 3, 4))),
    "squeeze_excite": (squeeze_excite, (rand(3, 4).abs(), rand(2, 4).abs(), rand(4, 2))),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (IMAGE,)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, padding=1), (IMAGE,)),
    "adaptive_pool": (lambda x: F.adaptive_avg_pool2d(x, 3) + F.adaptive_max_pool2d(x, 3), (IMAGE,)),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), (IMAGE,)),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (IMAGE,)),
    "grid_sample": (
        lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2).double(), align_corners=True),
        (IMAGE,),
    ),
    "pad_zero": (lambda x: F.pad(x, (1, 1)), (rand(3, 4),)),
    "pad_one": (lambda x: F.pad(x, (1, 1), value=1.0), (rand(3, 4),)),
    "pad_reflect": (lambda x: F.pad(x, (1, 1), mode="reflect"), (rand(3, 4),)),
    "unfold_fold": (lambda x: F.fold(F.unfold(x, 2), (6, 6), 2), (IMAGE,)),
    "rearranged": (lambda x: x.permute(0, 2, 3, 1).flip(1).roll(1, 2).reshape(2, -1)[:, ::2], (IMAGE,)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (IMAGE,)),
    "split_unbind": (lambda x: x.split([1, 3], 1)[1].unbind(0)[0], (rand(3, 4),)),
    "gather": (lambda x: x.gather(1, torch.tensor([[0], [1], [2]])), (rand(3, 4),)),
    "index": (lambda x: x[torch.tensor([0, 2])], (rand(3, 4),)),
    "in_place": (in_place, (rand(3, 4), rand(3, 4))),
    "into_zeros": (padded, (rand(4, 4),)),
    "cast": (lambda x: x.float().double() if x.dtype == torch.float64 else x, (rand(3, 4).float().double(),)),
    "fft": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), (rand(4, 4),)),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x) * (1 + 2j)), (rand(3, 2),)),
    "compare_0": (lambda x, y: (x > 0).double() * y, (rand(3, 4), rand(3, 4))),
    "sign": (lambda x, y: x.sign() * y, (rand(3, 4), rand(3, 4))),
}
"""Cases whose laws say all there is: what they forbid is wrong."""

LOOSE: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "spectral_norm": (lambda w: w / torch.dot(w.sum(1), w.sum(1)).sqrt(), (rand(3, 4),)),
    "div_floor": (lambda x, y: torch.div(9 * x, y, rounding_mode="floor"), (rand(3, 4), POSITIVE)),
    "prod": (lambda x: x.prod(1), (rand(3, 2),)),
    "compare_two": (lambda x, y: (x > y).double() * x, (rand(3, 4), rand(3, 4))),
    "argmax": (lambda x: x.argmax(1).double() + 1, (rand(3, 4),)),
    "pow_2.5": (lambda x: x**2.3, (POSITIVE,)),
    "unknown": (torch.special.bessel_j0, (rand(3, 4),)),
    "random": (lambda x: x * torch.ones(4).double(), (rand(3, 4),)),
}
"""Cases whose laws are careful: exact where they allow, silent about the rest."""


@pytest.mark.parametrize("name", [*TIGHT, *LOOSE])
def test_what_the_laws_allow_is_exact_and_what_they_forbid_is_not(name: str) -> None:
    function, tensors = (TIGHT | LOOSE)[name]
    rounding = 1e-7 if name == "cast" else 1e-11
    flat = flatten(Applied(function, tensors), (), {})
    system, arguments = System(flat), list(flat.parameters)
    (result,) = flat.outputs
    allowed = 0
    for exponents, out in assignments(len(tensors)):
        known = {result: out} | dict(zip(arguments, exponents, strict=True))
        if system.holds(known):
            allowed += 1
            assert _error(function, tensors, exponents, out) < rounding, (exponents, out)
        elif name in TIGHT:
            assert _error(function, tensors, exponents, out) > 1e-6, (exponents, out)
    assert allowed >= 1  # nothing scaled is always allowed


def _error(function: Function, tensors: tuple[Tensor, ...], exponents: tuple[int, ...], out: int) -> float:
    scaled = [tensor * SCALE**e for tensor, e in zip(tensors, exponents, strict=True)]
    expected = function(*tensors) * SCALE**out
    return float((function(*scaled) - expected).abs().max() / expected.abs().max())


def test_an_unknown_operator_lets_nothing_through() -> None:
    flat = flatten(Applied(torch.special.bessel_j0, (rand(2),)), (), {})
    (call,) = flat.calls
    assert list(laws(call)) == [Law(((call.outputs[0], 1),)), Law(((call.inputs[0], 1),))]


def test_infinity_and_zero_are_the_only_numbers_a_scale_leaves_alone() -> None:
    assert all(_algebra.is_scale_free(number) for number in (0, 0.0, -0.0, math.inf, -math.inf, None))
    assert not any(_algebra.is_scale_free(number) for number in (1, -1.0, 1e-30, math.nan))
