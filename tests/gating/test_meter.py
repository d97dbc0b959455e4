"""The realised depth: the mean of what was drawn, in every way of drawing; nothing else changes."""

import math

import pytest
import torch
from blocks import Plain, randomise
from torch import nn

import surgeon
from surgeon.errors import NotGatedError


def gated(**options) -> nn.Module:
    model = randomise(nn.Sequential(*(Plain() for _ in range(6))))
    return surgeon.apply(model, "linear", drop_rate=0.5, example=torch.zeros(2, 4), **options)


@pytest.mark.parametrize("options", [{"unit": "batch"}, {"skip": True}, {"skip": False}], ids=str)
def test_its_mean_is_the_expected_depth(options) -> None:
    """False alarm rate about 1e-6: five standard errors of independent coins, the widest of these laws."""
    torch.manual_seed(0)
    model = gated(**options)
    meter, count = surgeon.DepthMeter(model), 400
    for _ in range(count):
        model(torch.randn(4, 4))
    status = surgeon.status(model)
    spread = math.sqrt(sum(gate.survival * gate.drop_rate for gate in status.gates) / count)
    assert meter.take() == pytest.approx(status.expected_depth, abs=5 * spread)
    assert meter.take() is None  # nothing since


def test_it_counts_what_ran() -> None:
    torch.manual_seed(1)
    model = gated(unit="batch")
    ran = []
    for block in model:
        next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_hook(
            lambda *_: ran.append(1)
        )
    meter = surgeon.DepthMeter(model)
    for _ in range(20):
        model(torch.randn(3, 4))
    assert meter.take() == pytest.approx(len(ran) / 20)
    assert 0 < len(ran) < 120


def test_the_model_draws_as_before() -> None:
    outputs = []
    for counted in (False, True):
        torch.manual_seed(2)
        model = gated()
        if counted:
            surgeon.DepthMeter(model)
        outputs.append(model(torch.ones(8, 4)))
    assert torch.equal(*outputs)


def test_open_gates_count_whole_and_evaluation_not() -> None:
    model = surgeon.set_drop_rate(gated(), 0.0)
    meter = surgeon.DepthMeter(model)
    model(torch.randn(3, 4))
    assert meter.take() == 6
    surgeon.set_drop_rate(model, 0.5)
    model.eval()(torch.randn(3, 4))
    assert meter.take() is None


def test_a_plain_model_has_none() -> None:
    with pytest.raises(NotGatedError, match="the model has no gates"):
        surgeon.DepthMeter(nn.Linear(2, 2))
