"""Ramps: their values, their end, resuming, and an evaluating model that does not drift."""

import math
import warnings
from typing import Any

import pytest
import torch
from blocks import Plain, randomise, same
from torch import nn

import surgeon

X = torch.zeros(2, 4)


def gated(**options: Any) -> nn.Module:
    model = randomise(nn.Sequential(*(Plain() for _ in range(4))))
    return surgeon.apply(model, "linear", drop_rate=0.5, example=X, **options)


@pytest.mark.parametrize(
    ("shape", "start", "expected"),
    [
        ("linear", 0.0, [0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        ("linear", 0.4, [0.4] * 6),
        ("cosine", 0.0, [0.2 * (1 - math.cos(math.pi * t / 4)) for t in range(5)] + [0.4]),
        ("early", 0.0, [0.4, 0.4, 0.4, 0.4, 0, 0]),
        ("late", 0.1, [0.1, 0.1, 0.1, 0.1, 0.4, 0.4]),
        ("plateau-decay-recovery", 0.0, [0.4, 0.4, 0.4, 0.4 * 0.05 / 0.3, 0, 0]),
        (lambda t: t * t, 0.0, [0, 0.4 / 16, 0.1, 0.4 * 9 / 16, 0.4, 0.4]),
    ],
)
def test_values(shape: Any, start: float, expected: list[float]) -> None:
    model = gated()
    ramp = surgeon.Ramp(model, 0.4, steps=4, shape=shape, start=start)
    seen = [ramp.rate] + [ramp.step() for _ in range(5)]
    assert seen == pytest.approx(expected)
    ramp = surgeon.Ramp(model, 0.4, steps=4, shape=shape, start=start)
    for rate in expected:
        assert [g.drop_rate for g in surgeon.status(model).gates] == pytest.approx(
            [rate * l / 4 for l in (1, 2, 3, 4)]
        )
        ramp.step()


def test_a_ramp_resumes() -> None:
    first, second = surgeon.Ramp(gated(), 0.4, steps=10), surgeon.Ramp(gated(), 0.3, steps=7, shape="late")
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.rate == first.rate == pytest.approx(0.16)
    assert surgeon.status(second.model) == surgeon.status(first.model)
    assert [first.step() for _ in range(8)] == [second.step() for _ in range(8)]


def half(t: float) -> float:
    return t / 2


def test_a_ramp_of_a_callable_resumes() -> None:
    first, second = (surgeon.Ramp(gated(), 0.4, steps=10, shape=half) for _ in range(2))
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.rate == first.rate == pytest.approx(0.08)
    with pytest.raises(
        surgeon.SurgeonError, match="the saved ramp has the shape callable half, this one linear"
    ):
        surgeon.Ramp(gated(), 0.4, steps=10).load_state_dict(first.state_dict())


def test_a_shape_outside_its_range_is_refused() -> None:
    with pytest.raises(
        surgeon.SurgeonError, match=r"the shape callable <lambda> gave 2\.0 for 0\.0; .* \[0, 1\]"
    ):
        surgeon.Ramp(gated(), 0.4, steps=10, shape=lambda t: 2)


def test_evaluation_does_not_drift() -> None:
    model = gated(scaling="paper").eval()
    x = torch.randn(3, 4)
    before = model(x)
    with pytest.warns(UserWarning, match=r"multiplying 4 branches \(0\.add first\) by the survival"):
        ramp = surgeon.Ramp(model, 0.9, steps=3)
    for _ in range(4):
        assert same(model(x), before)
        ramp.step()


@pytest.mark.parametrize(
    ("shape", "rate", "start", "warns"),
    [
        ("linear", 0.5, 0.0, False),
        ("cosine", 0.5, 0.2, False),
        ("late", 0.5, 0.0, False),
        ("late", 0.4, 0.5, True),
        ("early", 0.5, 0.0, True),
        ("early", 0.2, 0.5, False),
        ("linear", 0.0, 0.5, True),
    ],
)
@pytest.mark.parametrize("scaling", ["paper", "inverted"])
def test_an_end_at_other_rates_than_those_of_apply_is_told(
    shape: Any, rate: float, start: float, warns: bool, scaling: str
) -> None:
    """Evaluation multiplies by the rates of `apply`; the status shows by what where the rates are others."""
    model = gated(scaling=scaling)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ramp = surgeon.Ramp(model, rate, steps=2, shape=shape, start=start)
    assert bool(told) == (warns and scaling == "paper")
    ramp.step()
    ramp.step()
    text = str(surgeon.status(model))
    assert ("evaluates x" in text) == (warns and scaling == "paper")
    if "evaluates x" in text:
        assert all(f"{1 - 0.5 * l / 4:.4f}" in text for l in (1, 2, 3, 4))


def test_wrong_settings_are_named() -> None:
    model = gated()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 3, "shape": "square"}, "'square'; known are 'linear'"),
        ({"steps": 3, "start": 1.0}, "start is 1.0"),
    ]
    for options, message in wrong:
        with pytest.raises(surgeon.SurgeonError, match=message):
            surgeon.Ramp(model, 0.3, **options)
    explicit = surgeon.apply(nn.Sequential(Plain(), Plain()), [0.1, 0.2], example=X)
    wanted = 'the gates follow explicit rates; a ramp needs a named schedule; apply with schedule="linear"'
    with pytest.raises(surgeon.SurgeonError, match=wanted):
        surgeon.Ramp(explicit, 0.3, steps=3)
    assert [gate.drop_rate for gate in surgeon.status(explicit).gates] == [0.1, 0.2]
    with pytest.raises(surgeon.SurgeonError, match="no gates"):
        surgeon.Ramp(nn.Linear(2, 2), 0.3, steps=3)
