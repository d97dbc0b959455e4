"""The fold, ending by ending: which parameters take the scale, or why none does, and the numbers in float64.

Norm statistics and affine weights are random, as a zero-initialised last norm makes any fold look right.
"""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from blocks import Of
from folds import (
    SCALE,
    Attention,
    Gated,
    Ghost,
    GraphAttention,
    SpatialAttention,
    SqueezeExcite,
    difference,
    exponents,
    folds,
    image,
    randomised,
    scaled,
    tokens,
    weights,
)
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from surgeon._folding.fold import Kept, commit, plan

ENDINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, int]]] = {
    "conv1d": (
        lambda: nn.Conv1d(4, 4, 3, padding=1),
        lambda: torch.randn(2, 4, 9).double(),
        {"weight": 1, "bias": 1},
    ),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), image, {"weight": 1, "bias": 1}),
    "conv2d without bias": (lambda: nn.Conv2d(4, 4, 1, bias=False), image, {"weight": 1}),
    "conv3d": (
        lambda: nn.Conv3d(2, 2, 3, padding=1),
        lambda: torch.randn(1, 2, 4, 4, 4).double(),
        {"weight": 1, "bias": 1},
    ),
    "conv transpose": (
        lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
        image,
        {"weight": 1, "bias": 1},
    ),
    "linear": (lambda: nn.Linear(8, 8), tokens, {"weight": 1, "bias": 1}),
    "matmul with a weight": (lambda: Of(lambda m, x: x @ m.w, w=torch.ones(8, 8)), tokens, {"w": 1}),
    "einsum with a weight": (
        lambda: Of(lambda m, x: torch.einsum("bnc,cd->bnd", x, m.w), w=torch.ones(8, 8)),
        tokens,
        {"w": 1},
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        image,
        weights("1"),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), tokens, weights("1")),
    "rms norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)), tokens, {"1.weight": 1}),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), image, weights("1")),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True)),
        image,
        weights("1"),
    ),
    "relu after batch norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        image,
        weights("1"),
    ),
    "what commutes": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.1), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Dropout()
        ),
        image,
        weights("0"),
    ),
    "reshaped": (
        lambda: Of(
            lambda m, x: m.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).flip(2).roll(1, 3),
            fc=nn.Linear(4, 4),
        ),
        image,
        weights("fc"),
    ),
    "layer scale": (
        lambda: Of(lambda m, x: m.gamma * m.fc(x), fc=nn.Linear(8, 8), gamma=torch.ones(8)),
        tokens,
        {"gamma": 1},
    ),
    "layer scale, reshaped and in place": (
        lambda: Of(
            lambda m, x: m.conv(x).mul_(m.gamma.reshape(1, -1, 1, 1)),
            conv=nn.Conv2d(4, 4, 1),
            gamma=torch.ones(4),
        ),
        image,
        {"gamma": 1},
    ),
    "skip-init gain": (
        lambda: Of(lambda m, x: m.conv(x).mul_(m.gain), conv=nn.Conv2d(4, 4, 1), gain=torch.ones(())),
        image,
        {"gain": 1},
    ),
    "constant factor": (lambda: Of(lambda m, x: m.fc(x) * 0.2, fc=nn.Linear(8, 8)), tokens, weights("fc")),
    "affine": (
        lambda: Of(lambda m, x: torch.addcmul(m.beta, m.alpha, x), alpha=torch.ones(8), beta=torch.ones(8)),
        tokens,
        {"alpha": 1, "beta": 1},
    ),
    "standardised conv with gain": (
        lambda: ScaledStdConv2d(4, 4, 3, padding=1),
        image,
        {"gain": 1, "bias": 1},
    ),
    "standardised conv without gain": (
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), StdConv2d(4, 4, 3, padding=1, bias=False)),
        image,
        weights("0"),
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
        tokens,
        {"parametrizations.weight.original0": 1, "bias": 1},
    ),
    "squeeze and excitation": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), SqueezeExcite(4)),
        image,
        weights("1") | {"2.fc1.weight": -1},
    ),
    "squeeze and excitation, channels last": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), SqueezeExcite(4, nn.AdaptiveAvgPool2d(1))
        ),
        lambda: image().to(memory_format=torch.channels_last),
        weights("1") | {"2.fc1.weight": -1},
    ),
    "attention along edges": (
        GraphAttention,
        lambda: torch.randn(5, 8, dtype=torch.float64),
        weights("left", "right") | {"scores": -1},
    ),
    "spatial attention": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), SpatialAttention()),
        image,
        {"0.weight": 1, "1.conv.weight": -1},
    ),
    "ghost module": (
        lambda: Ghost(4),
        image,
        weights("primary.1", "cheap.1") | {"cheap.0.weight": -1},
    ),
    "attention": (Attention, tokens, weights("attention.out_proj")),
    "cat": (
        lambda: Of(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 2, 1)),
        image,
        weights("a", "b"),
    ),
    "stack and sum": (
        lambda: Of(lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(0), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        tokens,
        weights("a", "b"),
    ),
    "norm, pooled, less itself": (
        lambda: Of(lambda m, x: F.avg_pool2d(m.norm(x), 3, 1, 1) - m.norm(x), norm=nn.GroupNorm(1, 4)),
        image,
        weights("norm"),
    ),
    "one layer twice": (
        lambda: Of(lambda m, x: m.fc(x) + m.fc(x.flip(1)).relu(), fc=nn.Linear(8, 8)),
        tokens,
        weights("fc"),
    ),
    "a residual inside": (
        lambda: Of(lambda m, x: (y := m.a(x)) + m.b(y), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        tokens,
        weights("a") | {"b.bias": 1},
    ),
    "grouped query values": (
        lambda: Of(lambda m, x: (x @ x.mT).softmax(-1) @ m.value(x), value=nn.Linear(8, 8)),
        tokens,
        weights("value"),
    ),
    "complex filter": (
        lambda: Of(
            lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.w), n=8),
            w=torch.ones(5, 2),
        ),
        tokens,
        {"w": 1},
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_takes_the_scale_exactly(ending: str) -> None:
    branch, example, expected = ENDINGS[ending]
    model = randomised(Gated(branch()))
    assert exponents(folds(model, example())) == expected


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_fold_done_wrong_is_seen(ending: str) -> None:
    branch, example, _ = ENDINGS[ending]
    model, x = randomised(Gated(branch())), example()
    made = plan(model, (x,), {}, {"0": SCALE})
    wrong = {
        "nothing": dataclasses.replace(made, products=()),
        "twice": dataclasses.replace(made, products=made.products * 2),
        "inverse": dataclasses.replace(
            made, products=tuple(dataclasses.replace(s, exponent=-s.exponent) for s in made.products)
        ),
        "one missing": dataclasses.replace(made, products=made.products[1:]),
    }
    with torch.no_grad():
        scaled(model, {"0": SCALE})
        expected = model(x)
        for name, plan_of in wrong.items():
            damaged = copy.deepcopy(model)
            commit(damaged, plan_of, {"0": SCALE})
            scaled(damaged, {})
            assert difference(damaged(x), expected) > 1e-6, name


def _with_buffer() -> nn.Module:
    branch = Of(lambda m, x: x.sigmoid() * m.table)
    branch.register_buffer("table", torch.ones(8))
    return branch


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "silu": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()),
        image,
        "the branch ends in silu in 'branch.2', which does not commute with a scale",
    ),
    "gelu": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()),
        tokens,
        "the branch ends in gelu in 'branch.1', which does not commute with a scale",
    ),
    "relu6": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU6()),
        tokens,
        "the branch ends in relu6 in 'branch.1', which does not commute with a scale",
    ),
    "hard swish behind a permutation": (
        lambda: Of(lambda m, x: m.act(m.fc(x)).transpose(1, 2).mT, fc=nn.Linear(8, 8), act=nn.Hardswish()),
        tokens,
        "the branch ends in hardswish in 'branch.act', which does not commute with a scale",
    ),
    "norm without affine": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False)),
        tokens,
        "the branch ends in layer_norm in 'branch.1', which has no weight of its own to take a scale",
    ),
    "added constant": (
        lambda: Of(lambda m, x: m.fc(x) + 1, fc=nn.Linear(8, 8)),
        tokens,
        "the branch ends in add in 'branch', which adds a constant",
    ),
    "pool alone": (
        lambda: nn.AvgPool2d(3, 1, 1),
        image,
        "the branch reaches its own shortcut without passing a parameter that could take the scale",
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(8, 8, bias=False)),
        tokens,
        "the branch reaches its own shortcut without passing a parameter that could take the scale",
    ),
    "fake-quantised weight": (
        lambda: Of(
            lambda m, x: x.relu() @ torch.fake_quantize_per_tensor_affine(m.w, 0.1, 0, -99, 99),
            w=torch.ones(8, 8),
        ),
        tokens,
        "the branch reaches its own shortcut without passing a parameter that could take the scale",
    ),
    "square of the only weight": (
        lambda: Of(lambda m, x: x.sigmoid() * m.w**2, w=torch.ones(8)),
        tokens,
        "only a root of the scale would do before pow in 'branch'",
    ),
    "buffer": (
        _with_buffer,
        tokens,
        "the branch ends in sigmoid in 'branch', which does not commute with a scale",
    ),
}


@pytest.mark.parametrize("ending", REFUSED)
def test_a_refusal_says_why(ending: str) -> None:
    branch, example, reason = REFUSED[ending]
    model = randomised(Gated(branch()))
    made = folds(model, example())
    assert made.products == ()
    assert made.kept == (Kept("0", reason),)
    [kept] = made.kept
    assert not kept.operator or f" {kept.operator} " in reason
    assert not kept.module or f"'{kept.module}'" in reason
