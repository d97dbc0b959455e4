"""Schedules against their formulas, timm's own rates and the paper's worked numbers; overrides and errors.

Rates are compared bit for bit where another library computes them (timm's are float32 numbers), else to
rounding of one operation.
"""

import itertools
import math
from fractions import Fraction

import pytest
import timm
import torch
from blocks import Net, Plain, Twice, case
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn
from torchvision.ops import StochasticDepth

import surgeon
from surgeon._gating.schedule import NAMES, checked_rate, drop_rates
from surgeon.errors import UsageError

X = torch.zeros(2, 4)


def blocks(count: int, adds: int = 1) -> list[str]:
    return [f"blocks.{i}" for i in range(count) for _ in range(adds)]


def chain(count: int) -> nn.Sequential:
    return nn.Sequential(*(Plain() for _ in range(count)))


def rates_of(model: nn.Module) -> list[float]:
    return [gate.drop_rate for gate in surgeon.status(model).gates]


@given(count=st.integers(1, 200), r=st.floats(0, 1, exclude_max=True, allow_subnormal=False))
def test_linear_is_the_formula_of_the_paper(count: int, r: float) -> None:
    rates = drop_rates("linear", r, blocks(count))
    for l, rate in enumerate(rates, start=1):
        assert math.isclose(1 - rate, 1 - Fraction(l, count) * Fraction(r), rel_tol=1e-14, abs_tol=1e-15)


@given(count=st.integers(1, 200), r=st.floats(0, 0.999))
def test_linear_from_zero_is_timms_own_function(count: int, r: float) -> None:
    assert drop_rates("linear-from-zero", r, blocks(count)) == calculate_drop_path_rates(r, count)


@given(count=st.integers(1, 50), r=st.floats(0, 0.999))
def test_uniform_is_the_rate_everywhere(count: int, r: float) -> None:
    assert drop_rates("uniform", r, blocks(count)) == [r] * count


def test_ends() -> None:
    linear, shifted = drop_rates("linear", 0.5, blocks(10)), drop_rates("linear-from-zero", 0.5, blocks(10))
    assert (linear[0], linear[-1]) == (0.05, 0.5)
    assert (shifted[0], shifted[-1]) == (0.0, 0.5)
    assert drop_rates("linear", 0.5, ["only"]) == [0.5]
    assert drop_rates("linear-from-zero", 0.5, ["only"]) == [0.0]


def test_the_papers_worked_numbers() -> None:
    # Huang et al. 2016, section 3: L = 54 blocks, p_L = 0.5, expected depth (3 L - 1) / 4 = 40.25.
    rates = drop_rates("linear", 0.5, blocks(54))
    assert math.isclose(math.fsum(1 - rate for rate in rates), 40.25, rel_tol=1e-14)
    off_by_one = math.fsum(1 - rate for rate in drop_rates("linear-from-zero", 0.5, blocks(54)))
    assert not math.isclose(off_by_one, 40.25, rel_tol=1e-3)


def test_the_papers_worked_numbers_on_a_model() -> None:
    model = surgeon.apply(chain(54), example=X)
    status = surgeon.status(model)
    assert math.isclose(status.expected_depth, 40.25, rel_tol=1e-12)
    assert "40.25 of 54" in str(status)


def test_the_default_is_linear_at_one_half() -> None:
    assert rates_of(surgeon.apply(chain(4), example=X)) == [0.125, 0.25, 0.375, 0.5]


def test_adds_of_one_block_share_its_rate() -> None:
    assert drop_rates("linear", 0.4, blocks(2, adds=2)) == [0.2, 0.2, 0.4, 0.4]
    model = surgeon.apply(nn.Sequential(Twice(), Twice()), drop_rate=0.4, example=X)
    assert rates_of(model) == [0.2, 0.2, 0.4, 0.4]


def test_blocks_are_counted_in_execution_order_not_in_registration_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Plain(), Plain(), Plain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(self.c(x)))

    gates = surgeon.status(surgeon.apply(Backwards(), drop_rate=0.3, example=X)).gates
    assert [(g.name, g.drop_rate) for g in gates] == [
        ("c.add", 1 / 3 * 0.3),
        ("b.add", 2 / 3 * 0.3),
        ("a.add", 0.3),
    ]


def own_rates(model: nn.Module, x: torch.Tensor) -> list[float]:
    """The rates of the live DropPath modules of a model, in the order in which they run."""
    rates: list[float] = []
    drops = [m for m in model.modules() if isinstance(m, DropPath) and m.drop_prob]
    handles = [m.register_forward_pre_hook(lambda m, _: rates.append(m.drop_prob)) for m in drops]
    with torch.no_grad():
        model.train()(x)
    for handle in handles:
        handle.remove()
    assert rates
    return rates


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "convnext_atto",
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
        pytest.param("poolformerv2_s12", marks=pytest.mark.slow),
    ],
)
def test_linear_from_zero_gives_the_rates_of_timms_own_models(name: str) -> None:
    c = case(f"timm:{name}")
    ours = rates_of(surgeon.apply(c.build(), "linear-from-zero", drop_rate=0.3, example=c.input()))
    own = own_rates(c.build(drop_path_rate=0.3), c.input())
    assert [rate for rate in ours if rate > 0] == own
    assert len(ours) - len(own) in (1, 2)  # the adds of the first block


def test_timms_resnet_computes_its_rates_in_float64_and_agrees_to_float32() -> None:
    c = case("timm:resnet18")
    ours = rates_of(surgeon.apply(c.build(), "linear-from-zero", drop_rate=0.3, example=c.input()))
    own = [0.0, *own_rates(c.build(drop_path_rate=0.3), c.input())]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(own), rtol=2**-23, atol=0)


def test_timms_mixer_is_uniform() -> None:
    c = case("timm:mixer_s32_224")
    ours = rates_of(surgeon.apply(c.build(), "uniform", drop_rate=0.3, example=c.input()))
    assert ours == own_rates(c.build(drop_path_rate=0.3), c.input())


def test_torchvisions_rates_are_the_same_to_float32_rounding() -> None:
    c = case("torchvision:convnext_tiny")
    own = [m.p for m in c.build(stochastic_depth_prob=0.4).modules() if isinstance(m, StochasticDepth)]
    ours = drop_rates("linear-from-zero", 0.4, blocks(len(own)))
    assert len(own) == 18
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(own), rtol=2**-23, atol=0)


def test_a_callable_sees_every_index_and_the_depth_once() -> None:
    asked = []

    def rule(l: int, count: int) -> float:
        asked.append((l, count))
        return 0.1 * l / count

    rates = drop_rates(rule, 0.9, blocks(3, adds=2))
    assert asked == [(1, 3), (2, 3), (3, 3)]
    assert rates == [r for r in (0.1 * 1 / 3, 0.1 * 2 / 3, 0.1 * 3 / 3) for _ in range(2)]


def test_a_sequence_has_a_rate_per_block_or_per_add() -> None:
    assert drop_rates([0.1, 0.2], 0.9, blocks(2, adds=2)) == [0.1, 0.1, 0.2, 0.2]
    assert drop_rates((0.1, 0.2, 0.3, 0.4), 0.9, blocks(2, adds=2)) == [0.1, 0.2, 0.3, 0.4]
    assert drop_rates([0, 0.5], 0.9, blocks(2)) == [0.0, 0.5]


@pytest.mark.parametrize(
    "make", [lambda rates: torch.tensor(rates, dtype=torch.float64), "numpy"], ids=["torch", "numpy"]
)
def test_arrays_are_sequences_too(make: object) -> None:
    import numpy as np

    rates = np.array([0.1, 0.2]) if make == "numpy" else make([0.1, 0.2])  # type: ignore[operator]
    assert rates_of(surgeon.apply(chain(2), rates, example=X)) == [0.1, 0.2]


def test_numpy_numbers_are_rates() -> None:
    import numpy as np

    model = surgeon.apply(chain(2), drop_rate=np.float32(0.5), example=X)
    assert rates_of(model) == [0.25, 0.5]
    assert rates_of(surgeon.set_drop_rate(model, np.float32(0.25))) == [0.125, 0.25]
    assert all(type(rate) is float for rate in rates_of(model))


@pytest.mark.parametrize("given_count", [0, 1, 3, 5])
def test_a_sequence_of_another_length_says_which_lengths_fit(given_count: int) -> None:
    with pytest.raises(
        UsageError,
        match=rf"has {given_count} rates; .*needs 2 \(one per block\) or 4 \(one per residual add\)",
    ):
        drop_rates([0.1] * given_count, 0.5, blocks(2, adds=2))
    with pytest.raises(UsageError, match=r"needs 2 \(one per block\)$"):
        drop_rates([0.1] * 7, 0.5, blocks(2))


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1, 1.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("schedule", NAMES)
def test_a_rate_outside_its_range_is_named(bad: float, schedule: str) -> None:
    with pytest.raises(UsageError, match=rf"drop_rate is {float(bad)}; a drop rate lies in \[0, 1\)"):
        drop_rates(schedule, bad, blocks(3))


@pytest.mark.parametrize("bad", [math.nan, -0.01, 1.0])
def test_a_bad_rate_from_a_callable_or_sequence_names_the_block(bad: float) -> None:
    with pytest.raises(UsageError, match=r"drop rate of blocks\.2 is "):
        drop_rates([0.1, 0.1, bad], 0.5, blocks(3))
    with pytest.raises(UsageError, match=r"drop rate of blocks\.2 is "):
        drop_rates(lambda l, _: bad if l == 3 else 0.1, 0.5, blocks(3))


@pytest.mark.parametrize("bad", ["half", None, [0.5], object()])
def test_a_rate_that_is_no_number_is_named(bad: object) -> None:
    with pytest.raises(UsageError, match=r"give a number in \[0, 1\)"):
        checked_rate(bad)  # type: ignore[arg-type]


def test_an_unknown_schedule_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown schedule 'cosine'") as caught:
        drop_rates("cosine", 0.5, blocks(3))
    for name in NAMES:
        assert repr(name) in str(caught.value)


def test_overrides_go_by_name_and_block_and_the_last_one_counts() -> None:
    names = [f"{b}.add{'_1' * (i % 2)}" for i, b in enumerate(blocks(3, adds=2))]
    at = blocks(3, adds=2)
    assert drop_rates("uniform", 0.5, at, names, {"blocks.1": 0.0}) == [0.5, 0.5, 0, 0, 0.5, 0.5]
    assert drop_rates("uniform", 0.5, at, names, {"*.add_1": 0.1}) == [0.5, 0.1] * 3
    assert drop_rates("uniform", 0.5, at, names, {"*": 0.1, "blocks.2": 0.2}) == [0.1] * 4 + [0.2] * 2
    assert drop_rates("uniform", 0.5, at, names, {"blocks.2": 0.2, "*": 0.1}) == [0.1] * 6


def test_an_override_that_matches_nothing_is_named() -> None:
    with pytest.raises(UsageError, match=r"overrides: 'layer9\.\*' matches no residual add"):
        drop_rates("linear", 0.5, ["a"], ["a.add"], {"layer9.*": 0.1})


@pytest.mark.parametrize("bad", [1.0, -1, math.nan])
def test_a_bad_override_is_named(bad: float) -> None:
    with pytest.raises(UsageError, match="drop rate of a is "):
        drop_rates("linear", 0.5, ["a"], ["a.add"], {"a": bad})


def test_overrides_on_a_model_outlive_a_new_rate() -> None:
    model = surgeon.apply(chain(3), "uniform", drop_rate=0.2, overrides={"1": 0.0}, example=X)
    assert rates_of(model) == [0.2, 0.0, 0.2]
    assert rates_of(surgeon.set_drop_rate(model, 0.4)) == [0.4, 0.0, 0.4]


def test_set_drop_rate_follows_the_schedule_of_the_gates() -> None:
    model = surgeon.apply(chain(4), "linear", drop_rate=0.4, example=X)
    assert rates_of(surgeon.set_drop_rate(model, 0.2)) == [l / 4 * 0.2 for l in (1, 2, 3, 4)]
    assert rates_of(surgeon.set_drop_rate(model, [0.4, 0.3, 0.2, 0.1])) == [0.4, 0.3, 0.2, 0.1]
    assert rates_of(surgeon.set_drop_rate(model, lambda l, count: l / count / 10)) == [
        l / 4 / 10 for l in (1, 2, 3, 4)
    ]
    assert surgeon.status(model).schedule == "callable <lambda>"
    assert rates_of(surgeon.set_drop_rate(model, 0)) == [0.0] * 4
    assert surgeon.status(model).schedule == "linear"


def test_overrides_stay_on_top_of_a_new_schedule_until_they_are_dropped() -> None:
    model = surgeon.apply(chain(3), drop_rate=0.3, overrides={"1*": 0.9}, example=X)
    assert rates_of(surgeon.set_drop_rate(model, [0.1, 0.1, 0.1])) == [0.1, 0.9, 0.1]
    assert surgeon.status(model).schedule == "explicit rates"
    assert rates_of(surgeon.set_drop_rate(model, lambda l, _: l / 10)) == pytest.approx([0.1, 0.9, 0.3])
    assert rates_of(surgeon.set_drop_rate(model, 0.6, overrides={})) == pytest.approx([0.2, 0.4, 0.6])
    assert rates_of(surgeon.set_drop_rate(model, 0.3)) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_set_drop_rate_leaves_evaluation_where_it_is(scaling: str) -> None:
    model = surgeon.apply(Net(Plain()), scaling=scaling, example=X)
    x = torch.randn(2, 4)
    before = model.eval()(x)
    surgeon.set_drop_rate(model, 0.1)
    assert torch.equal(model(x), before)
    (gate,) = surgeon.status(model).gates
    assert (gate.drop_rate, gate.scale) == (0.1, 0.5 if scaling == "paper" else 1.0)


def test_set_drop_rate_refuses_what_it_cannot_follow() -> None:
    model = surgeon.apply(chain(2), [0.1, 0.2], example=X)
    with pytest.raises(UsageError, match="explicit rates; give a sequence"):
        surgeon.set_drop_rate(model, 0.3)
    named = surgeon.apply(chain(2), example=X)
    for bad in (1.0, -0.1, math.nan, [0.1, 0.2, 0.3], [0.1, 1.0], lambda l, count: math.nan):
        with pytest.raises(UsageError):
            surgeon.set_drop_rate(named, bad)
        assert rates_of(named) == [0.25, 0.5]


@pytest.mark.parametrize("name", [*NAMES, "cosine"])
def test_set_drop_rate_takes_no_name_of_a_schedule(name: str) -> None:
    model = surgeon.apply(chain(2), example=X)
    with pytest.raises(UsageError):
        surgeon.set_drop_rate(model, name)  # type: ignore[arg-type]
    assert rates_of(model) == [0.25, 0.5]


def test_a_callable_of_a_schedules_name_is_not_that_schedule() -> None:
    def linear(l: int, count: int) -> float:
        return 0.1 * l

    model = surgeon.apply(chain(2), linear, example=X)
    assert surgeon.status(model).schedule == "callable linear"
    with pytest.raises(UsageError, match="the gates follow callable linear; give a sequence"):
        surgeon.set_drop_rate(model, 0.5)
    with pytest.raises(UsageError, match="a ramp needs a named schedule"):
        surgeon.Ramp(model, 0.5, steps=3)
    assert rates_of(model) == [0.1, 0.2]


def test_two_halves_of_a_model_keep_their_own_schedules() -> None:
    model = nn.Sequential(chain(2), chain(2))
    surgeon.apply(model[0], "uniform", drop_rate=0.1, example=X)
    surgeon.apply(model[1], "linear", drop_rate=0.4, example=X)
    assert rates_of(model) == [0.1, 0.1, 0.2, 0.4] or sorted(rates_of(model)) == [0.1, 0.1, 0.2, 0.4]
    surgeon.set_drop_rate(model[1], 0.2)
    assert rates_of(model[0]) == [0.1, 0.1]
    assert rates_of(model[1]) == [0.1, 0.2]


def test_timms_function_is_the_one_compared_with() -> None:
    """The guard of the comparisons above: timm's models do use this function's numbers."""
    own = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3)
    rates = [m.drop_prob for m in own.modules() if isinstance(m, DropPath)]
    expected = [rate for rate in calculate_drop_path_rates(0.3, 12) if rate > 0]
    assert rates == list(itertools.chain.from_iterable((rate, rate) for rate in expected))


class Paths(nn.Module):
    """Three streams side by side, each with two residual adds."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(6)])

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        streams = [x, y, z]
        for step in range(2):
            streams = [s + self.f[3 * step + i](s) for i, s in enumerate(streams)]
        return tuple(streams)


class Stack(nn.Module):
    """Six blocks written out in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for f in self.f:
            x = x + f(x)
        return x


@pytest.mark.parametrize(
    ("model", "inputs", "rates"),
    [(Paths(), 3, [0.6] * 6), (Stack(), 1, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])],
)
def test_adds_side_by_side_share_a_rate(model: nn.Module, inputs: int, rates: list[float]) -> None:
    surgeon.apply(model, drop_rate=0.6, example=(torch.zeros(2, 4),) * inputs)
    assert [gate.drop_rate for gate in surgeon.status(model).gates] == pytest.approx(rates)
    surgeon.set_drop_rate(model, 0.3)
    assert [gate.drop_rate for gate in surgeon.status(model).gates] == pytest.approx([r / 2 for r in rates])
