"""The fold, ending by ending: which parameters take the scale, and the numbers in float64.

Norm statistics and affine weights are random, as a zero-initialised last norm makes any fold look right.
"""

import copy
import dataclasses
import random
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from surgeon import _balance, _gate  # noqa: F401 - the gate registers the mark
from surgeon._fold import FoldPlan, Kept, Step, commit, plan
from surgeon.errors import FoldError

SCALE = 0.7


class Gated(nn.Module):
    """``shortcut + c * branch(x)``; a mark stands for ``c`` while ``scale`` is None."""

    def __init__(self, branch: nn.Module, gate: int = 0, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.gate = gate
        self.scale: float | None = None
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result = self.branch(x)
        mark = self.scale is None
        result = torch.ops.surgeon.mark(result, self.gate) if mark else result * self.scale
        return self.shortcut(x) + result


class Of(nn.Module):
    """A branch written as a function of its own module: its parameters are attributes."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def randomised(model: nn.Module) -> nn.Module:
    """Float64, evaluating, and nothing left at the zeros and ones of an initialisation."""
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            positive = name.endswith(("running_var", "original0"))
            tensor.copy_(torch.rand_like(tensor) + 0.5 if positive else torch.randn_like(tensor) * 0.5)
    return model


def scaled(model: nn.Module, scales: Mapping[int, float] | None) -> None:
    """Each gate multiplies by its scale, or marks."""
    for module in model.modules():
        if isinstance(module, Gated):
            module.scale = None if scales is None else scales.get(module.gate, 1.0)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def folds(model: nn.Module, x: Tensor, scales: Mapping[int, float] | None = None) -> FoldPlan:
    """Plan and commit; the outputs must be those of the explicit factors, and not those without them."""
    scales = scales or {0: SCALE}
    made = plan(model, (x,), {}, scales)
    with torch.no_grad():
        scaled(model, scales)
        expected = model(x)
        scaled(model, {})
        ungated = model(x)
        folded = copy.deepcopy(model)
        commit(folded, made, scales)
        scaled(folded, {kept.gate: scales[kept.gate] for kept in made.kept})
        assert difference(folded(x), expected) < 1e-12
        assert difference(ungated, expected) > 1e-6, "the scale has no effect: the case proves nothing"
    scaled(model, None)
    return made


def exponents(made: FoldPlan) -> dict[str, int]:
    assert not made.kept, made
    return {step.parameter.removeprefix("branch."): step.exponent for step in made.steps}


def image(channels: int = 4, size: int = 6) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Ghost(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.primary = nn.Sequential(
            nn.Conv2d(channels, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()
        )
        self.cheap = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class SpatialAttention(nn.Module):
    """CBAM's second half: a map over places, from the mean and the maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


def weights(*names: str) -> dict[str, int]:
    return {f"{name}.{kind}": 1 for name in names for kind in ("weight", "bias")}


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
    made = plan(model, (x,), {}, {0: SCALE})
    wrong = {
        "nothing": dataclasses.replace(made, steps=()),
        "twice": dataclasses.replace(made, steps=made.steps * 2),
        "inverse": dataclasses.replace(
            made, steps=tuple(dataclasses.replace(s, exponent=-s.exponent) for s in made.steps)
        ),
        "one missing": dataclasses.replace(made, steps=made.steps[1:]),
    }
    with torch.no_grad():
        scaled(model, {0: SCALE})
        expected = model(x)
        for name, plan_of in wrong.items():
            damaged = copy.deepcopy(model)
            commit(damaged, plan_of, {0: SCALE})
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
    assert made.steps == ()
    assert made.kept == (Kept(0, reason),)


# Parts of parameters.


def dual_path(block: nn.Module, x: Tensor) -> Tensor:
    """Half of the channels go onto the shortcut, the other half beside it; in place, as users write it."""
    y = block.bn(block.conv(x)).relu()
    y[:, :2] = torch.ops.surgeon.mark(y[:, :2], 0) if block.scale is None else y[:, :2] * block.scale
    y[:, :2] += x[:, :2]
    return y


class Parts(Gated):
    """A gate somewhere inside, on a part of a value."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__(nn.Identity())
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def gated(self, branch: Tensor, gate: int = 0) -> Tensor:
        if self.scale is None:
            return torch.ops.surgeon.mark(branch, gate)
        return branch * self.scale


def rows(made: FoldPlan) -> dict[str, tuple[tuple[int, int] | None, int, int]]:
    assert not made.kept, made
    return {step.parameter: (step.rows, step.dim, step.exponent) for step in made.steps}


def test_channels_beside_the_shortcut_keep_their_scale() -> None:
    model = randomised(Parts(dual_path, conv=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5)))
    assert rows(folds(model, image())) == {"bn.weight": ((0, 2), 0, 1), "bn.bias": ((0, 2), 0, 1)}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_takes_the_scale_on_some_channels(transposed: bool) -> None:
    conv = nn.ConvTranspose2d(4, 5, 1) if transposed else nn.Conv2d(4, 5, 1)

    def dense(block: nn.Module, x: Tensor) -> Tensor:
        first, rest = block.conv(x).split([2, 3], dim=1)
        return torch.cat([block.gated(first) + x[:, :2], rest], dim=1)

    dim = 1 if transposed else 0
    made = folds(randomised(Parts(dense, conv=conv)), image())
    assert rows(made) == {"conv.weight": ((0, 2), dim, 1), "conv.bias": ((0, 2), 0, 1)}


def test_values_alone_are_scaled_in_a_joint_projection() -> None:
    def attend(block: nn.Module, x: Tensor) -> Tensor:
        query, key, value = block.qkv(x).chunk(3, dim=-1)
        return x + block.gated((query @ key.mT).softmax(-1) @ value)

    made = folds(randomised(Parts(attend, qkv=nn.Linear(8, 24))), tokens())
    assert rows(made) == {"qkv.weight": ((16, 24), 0, 1), "qkv.bias": ((16, 24), 0, 1)}


def test_a_table_of_gammas_is_scaled_row_by_row() -> None:
    def table(block: nn.Module, x: Tensor) -> Tensor:
        for row in range(3):
            branch = block.table[row] * block.fc(x)
            x = x + (block.gated(branch) if row == 1 else branch)
        return x

    made = folds(randomised(Parts(table, fc=nn.Linear(8, 8), table=torch.ones(3, 8))), tokens())
    assert rows(made) == {"table": ((1, 2), 0, 1)}


def test_a_table_read_as_a_whole_besides_is_not_split() -> None:
    def table(block: nn.Module, x: Tensor) -> Tensor:
        return x * block.table.sum() + block.gated(block.table[0] * x.sigmoid())

    made = folds(randomised(Parts(table, table=torch.ones(3, 8))), tokens())
    assert [kept.reason for kept in made.kept] == ["the parameter 'table' is also used outside of the branch"]


def test_scaling_a_row_twice_is_seen() -> None:
    model, x = randomised(Parts(dual_path, conv=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5))), image()
    made = plan(model, (x,), {}, {0: SCALE})
    with torch.no_grad():
        scaled(model, {0: SCALE})
        expected = model(x)
        for part in (None, (0, 3), (1, 2)):
            damaged = copy.deepcopy(model)
            steps = tuple(dataclasses.replace(step, rows=part) for step in made.steps)
            commit(damaged, dataclasses.replace(made, steps=steps), {0: SCALE})
            scaled(damaged, {})
            assert difference(damaged(x), expected) > 1e-6, part


# Shared weights.


class Twice(nn.Module):
    """Two gates over one branch."""

    def __init__(self) -> None:
        super().__init__()
        branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.first, self.second = Gated(branch, 0), Gated(branch, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_tied_weights_fold_together_when_the_scales_agree() -> None:
    made = folds(randomised(Twice()), tokens(), {0: SCALE, 1: SCALE})
    assert [str(step) for step in made.steps] == [
        "gate 0: first.branch.1.weight *= scale",
        "gate 0: first.branch.1.bias *= scale",
    ]
    assert made.together == ((0, 1),)
    assert made.folded == (0, 1)


def test_tied_weights_stay_when_the_scales_disagree() -> None:
    made = folds(randomised(Twice()), tokens(), {0: 0.5, 1: 0.6})
    assert made.steps == ()
    assert [kept.gate for kept in made.kept] == [0, 1]
    assert "the parameter 'first.branch.1." in made.kept[0].reason
    assert "is also used outside of the branch" in made.kept[0].reason


def test_gates_that_fold_together_must_keep_equal_scales() -> None:
    model = randomised(Twice())
    made = plan(model, (tokens(),), {}, {0: SCALE, 1: SCALE})
    with pytest.raises(FoldError, match=r"\(0, 1\) share weights and fold only with equal scales"):
        commit(model, made, {0: 0.5, 1: 0.6})


def test_one_gate_passed_twice_is_one_gate() -> None:
    gated = Gated(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    assert exponents(folds(randomised(nn.Sequential(gated, nn.ReLU(), gated)), tokens())) == {
        "0.branch.1.weight": 1,
        "0.branch.1.bias": 1,
    }


def test_a_weight_also_used_on_the_shortcut_stays() -> None:
    tied = nn.Linear(8, 8, bias=False)
    made = folds(randomised(Gated(tied, shortcut=tied)), tokens())
    assert [kept.reason for kept in made.kept] == [
        "the parameter 'branch.weight' is also used outside of the branch"
    ]


def test_two_parameters_over_one_memory_are_one() -> None:
    model = randomised(Gated(nn.Linear(8, 8), shortcut=nn.Linear(8, 8)))
    model.shortcut.weight = nn.Parameter(model.branch.weight.data)  # type: ignore[union-attr, assignment]
    made = plan(model, (tokens(),), {}, {0: SCALE})
    assert not made.steps
    assert "'branch.weight' is also used outside of the branch" in made.kept[0].reason


def test_a_parameter_that_shares_part_of_its_memory_stays() -> None:
    model = randomised(Gated(nn.Linear(8, 8, bias=False)))
    model.register_parameter("view", nn.Parameter(model.branch.weight.data[:4]))  # type: ignore[union-attr, index]
    made = plan(model, (tokens(),), {}, {0: SCALE})
    assert not made.steps


# Several gates, and gates inside branches.


def test_each_gate_takes_its_own_scale() -> None:
    blocks = [Gated(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), i) for i in range(4)]
    model = randomised(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(144, 3)))
    made = folds(model, image(), {0: 0.9, 1: 0.5, 2: 0.1, 3: 1.7})
    assert [(s.parameter, s.gate) for s in made.steps] == [
        (f"{i}.branch.1.{kind}", i) for i in range(4) for kind in ("weight", "bias")
    ]


def test_nested_gates_multiply() -> None:
    inner = Gated(nn.Linear(8, 8), 1, shortcut=nn.Linear(8, 8))
    made = folds(randomised(Gated(inner, 0)), tokens(), {0: 0.9, 1: 0.5})
    assert not made.kept
    both = {
        step.parameter: {s.gate for s in made.steps if s.parameter == step.parameter} for step in made.steps
    }
    assert both == {
        "branch.branch.weight": {0, 1},
        "branch.branch.bias": {0, 1},
        "branch.shortcut.weight": {0},
        "branch.shortcut.bias": {0},
    }


def test_a_gate_the_forward_does_not_reach_is_kept() -> None:
    made = plan(randomised(Gated(nn.Linear(8, 8))), (tokens(),), {}, {0: 0.5, 7: 0.5})
    assert made.kept == (Kept(7, "the model's forward did not pass it"),)


def test_a_branch_value_returned_beside_the_output_stays() -> None:
    class Escaping(Gated):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            result = self.branch(x)
            factor = result if self.scale is None else result * self.scale
            marked = torch.ops.surgeon.mark(result, 0) if self.scale is None else factor
            return torch.cat([x + marked, result])

    made = folds(randomised(Escaping(nn.Linear(8, 8))), tokens())
    assert len(made.kept) == 1


def test_the_search_is_cut_where_it_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_balance, "_CHOICES", 1)
    made = plan(Gated(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), (tokens().float(),), {}, {0: SCALE})
    assert made.kept == (Kept(0, "the search for a place to put the scale was cut after 1 tries"),)


# The plan changes nothing.


class Caching(nn.Module):
    """Keeps what it saw, in every place a module may."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.cache: dict[str, object] = {"old": 1, "deep": {"list": [1]}}
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x + torch.rand(()) + random.random())  # noqa: S311
        self.cache["new"] = y
        self.cache["deep"]["list"].append(y)  # type: ignore[index]
        self.seen.append(y)
        self.last = y
        return y

    def train(self, mode: bool = True) -> "Caching":
        raise AssertionError("an overridden train() is not to be called")


def test_the_plan_leaves_everything_as_it_was() -> None:
    model = Gated(nn.Sequential(Caching(), nn.BatchNorm1d(5), nn.Dropout()))
    object.__setattr__(model.branch[1], "training", False)  # type: ignore[index]
    state = {name: (id(t), t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    flags = [module.training for module in model.modules()]
    attributes = [{k: id(v) for k, v in vars(module).items()} for module in model.modules()]
    plain, python = torch.get_rng_state(), random.getstate()
    fast = torch.backends.mha.get_fastpath_enabled()
    made = plan(model, (torch.randn(2, 5, 8),), {}, {0: SCALE})
    torch.set_rng_state(plain)  # the example itself was drawn after the state was taken
    assert made.steps
    after = model.state_dict(keep_vars=True)
    for name, (identity, value, version) in state.items():
        assert (id(after[name]), after[name]._version) == (identity, version)
        assert torch.equal(after[name], value)
    assert [module.training for module in model.modules()] == flags
    assert [{k: id(v) for k, v in vars(module).items()} for module in model.modules()] == attributes
    caching = model.branch[0]  # type: ignore[index]
    assert caching.cache == {"old": 1, "deep": {"list": [1]}}
    assert (caching.seen, caching.last) == ([], None)
    assert random.getstate() == python
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_the_plan_leaves_the_random_state_alone() -> None:
    model, x = Gated(Caching()), torch.randn(2, 5, 8)
    before = torch.get_rng_state()
    plan(model, (x,), {}, {0: SCALE})
    assert torch.equal(torch.get_rng_state(), before)


def test_the_plan_is_the_same_in_training_mode() -> None:
    model, x = Gated(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5))), tokens().float()
    assert plan(model.train(), (x,), {}, {0: SCALE}) == plan(model.eval(), (x,), {}, {0: SCALE})


def test_keyword_arguments_and_frozen_parameters() -> None:
    model = randomised(Gated(nn.Linear(8, 8))).requires_grad_(requires_grad=False)
    assert exponents(plan(model, (), {"x": tokens()}, {0: SCALE})) == {"weight": 1, "bias": 1}


# The commit.


def test_the_commit_keeps_the_parameters() -> None:
    model = Gated(nn.Linear(8, 8))
    before = [(id(p), p.clone(), p.requires_grad) for p in model.parameters()]
    commit(model, plan(model, (tokens().float(),), {}, {0: SCALE}), {0: SCALE})
    for (identity, value, grad), parameter in zip(before, model.parameters(), strict=True):
        assert (id(parameter), parameter.requires_grad) == (identity, grad)
        assert torch.equal(parameter, (value.double() * SCALE).float())  # rounded once


def test_the_inverse_scales_undo_the_fold() -> None:
    model, x = (
        randomised(Gated(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), SqueezeExcite(4)))),
        image(),
    )
    made = plan(model, (x,), {}, {0: SCALE})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    commit(model, made, {0: 1 / SCALE})
    assert not torch.equal(model.state_dict()["branch.1.weight"], before["branch.1.weight"])
    commit(model, made, {0: SCALE})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("damage", "dtype", "scale", "message"),
    [
        (float("nan"), torch.float32, 0.5, "'branch.bias' holds NaN or infinite values"),
        (float("inf"), torch.float32, 0.5, "'branch.bias' holds NaN or infinite values"),
        (3e38, torch.float32, 2.0, "'branch.bias' overflows torch.float32"),
        (6e4, torch.float16, 2.0, "'branch.bias' overflows torch.float16"),
        (1e-45, torch.float32, 0.3, "'branch.bias' underflows torch.float32"),
        (1e-6, torch.float16, 0.77, "'branch.bias' underflows torch.float16"),
    ],
)
def test_a_commit_that_fails_changes_nothing(
    damage: float, dtype: torch.dtype, scale: float, message: str
) -> None:
    model = Gated(nn.Linear(8, 8))
    made = plan(model, (tokens().float(),), {}, {0: scale})
    model.to(dtype)
    nn.init.constant_(model.branch.bias, damage)  # type: ignore[arg-type, union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FoldError, match=message):
        commit(model, made, {0: scale})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_single_weights_may_vanish_beside_larger_ones() -> None:
    model = Gated(nn.Linear(8, 8))
    made = plan(model, (tokens().float(),), {}, {0: 0.3})
    model.branch.weight.data[0, 0] = 1e-45  # type: ignore[union-attr, index]
    commit(model, made, {0: 0.3})
    assert model.branch.weight[0, 0] == 0  # type: ignore[union-attr, index]


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_must_be_positive(scale: float) -> None:
    model = Gated(nn.Linear(8, 8))
    made = plan(model, (tokens().float(),), {}, {0: SCALE})
    with pytest.raises(FoldError, match="only a finite scale above 0 can be folded"):
        plan(model, (tokens().float(),), {}, {0: scale})
    with pytest.raises(FoldError, match="only a finite scale above 0 can be folded"):
        commit(model, made, {0: scale})
    with pytest.raises(FoldError, match="no scale was given"):
        commit(model, made, {})


def test_a_plan_for_another_model_is_refused() -> None:
    made = FoldPlan((Step("branch.weight", 0, 1), Step("elsewhere.weight", 0, 1)), ())
    model = Gated(nn.Linear(8, 8))
    before = model.branch.weight.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(FoldError, match=r"no parameter 'elsewhere\.weight'"):
        commit(model, made, {0: 0.5})
    assert torch.equal(model.branch.weight, before)  # type: ignore[arg-type]


def test_meta_parameters_are_planned_but_not_written() -> None:
    model = Gated(nn.Linear(8, 8)).to("meta")
    made = plan(model, (torch.randn(2, 5, 8, device="meta"),), {}, {0: SCALE})
    assert len(made.steps) == 2
    with pytest.raises(FoldError, match="on the meta device"):
        commit(model, made, {0: SCALE})


def test_a_model_that_cannot_run_is_an_error() -> None:
    with pytest.raises(FoldError, match="could not run on fake tensors in evaluation mode"):
        plan(Gated(nn.Linear(8, 8)), (torch.randn(2, 5),), {}, {0: SCALE})


def test_a_forward_that_asks_for_a_value_is_an_error() -> None:
    class Asking(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(FoldError, match="could not run on fake tensors"):
        plan(Asking(nn.Linear(8, 8)), (tokens().float(),), {}, {0: SCALE})


def test_a_plan_prints_well() -> None:
    steps = (
        Step("a.weight", 0, 1),
        Step("b.weight", 0, -1),
        Step("table", 1, 1, rows=(2, 3)),
        Step("w", 1, 1, (0, 4), 1),
    )
    made = FoldPlan(steps, (Kept(2, "the branch ends in silu, which does not commute with a scale"),))
    assert str(made).splitlines() == [
        "2 gates fold into 4 parameters, 1 keep a factor",
        "gate 0: a.weight *= scale",
        "gate 0: b.weight *= scale ** -1",
        "gate 1: table[2:3] *= scale",
        "gate 1: w[:, 0:4] *= scale",
        "gate 2: kept, the branch ends in silu, which does not commute with a scale",
    ]


# Random branches.

CHANNELS = 4
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "bare conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
    "standardised": lambda: ScaledStdConv2d(CHANNELS, CHANNELS, 1),
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "bare norm": lambda: nn.GroupNorm(2, CHANNELS, affine=False),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "relu6": nn.ReLU6,
    "pool": lambda: nn.AvgPool2d(3, 1, 1),
    "excite": lambda: SqueezeExcite(CHANNELS),
    "ghost": lambda: Ghost(CHANNELS),
    "gamma": lambda: Of(lambda m, x: x * m.gamma, gamma=torch.ones(CHANNELS, 1, 1)),
    "spatial": SpatialAttention,
    "halves": lambda: Of(lambda m, x: torch.cat([x[:, :2].relu(), x[:, 2:] * m.gain], 1), gain=torch.ones(1)),
    "first half": lambda: Of(
        lambda m, x: torch.cat([x[:, :2], F.silu(x[:, :2]) * m.gain], 1), gain=torch.ones(1)
    ),
}


class Joined(nn.Module):
    def __init__(self, how: str, parts: list[nn.Module]) -> None:
        super().__init__()
        self.how, self.parts = how, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (part(x) for part in self.parts)
        match self.how:
            case "add":
                return first + second
            case "mul":
                return first * second
            case "gate":
                return first * second.sigmoid()
        return torch.maximum(first, second) + x.mean()


def branches() -> st.SearchStrategy[nn.Module]:
    layer = st.sampled_from(sorted(LAYERS)).map(lambda name: LAYERS[name]())
    return st.recursive(
        layer,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=4).map(lambda parts: nn.Sequential(*parts)),
            st.builds(
                Joined,
                st.sampled_from(["add", "mul", "gate", "maximum"]),
                st.lists(inner, min_size=2, max_size=2),
            ),
        ),
        max_leaves=6,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(branch=branches(), seed=st.integers(0, 9))
def test_a_random_branch_folds_exactly_or_is_kept(branch: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = randomised(Gated(branch)), image()
    made = plan(model, (x,), {}, {0: SCALE})
    assert bool(made.steps) != bool(made.kept)
    with torch.no_grad():
        scaled(model, {0: SCALE})
        expected = model(x)
        commit(model, made, {0: SCALE})
        scaled(model, {kept.gate: SCALE for kept in made.kept})
        assert difference(model(x), expected) < 1e-12
