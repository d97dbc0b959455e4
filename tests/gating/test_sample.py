"""Draws of the gates at evaluation: everything else evaluates, and the laws of what comes out."""

import pytest
import torch
from blocks import Plain, randomise
from torch import Tensor, nn

import surgeon
from surgeon._sample import Samples, calibration
from surgeon.errors import NotGatedError, UsageError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Noisy(nn.Module):
    """A block whose children behave otherwise in training: a norm over the batch and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.parametrize("unit", ["sample", "batch"])
@pytest.mark.parametrize("skip", [True, False])
def test_each_draw_is_the_network_with_some_branches_left_out(unit: str, skip: bool) -> None:
    model = randomise(nn.Sequential(Noisy(), Noisy())).eval()
    f, g = (block.f for block in model)
    surgeon.apply(model, "uniform", drop_rate=0.5, unit=unit, skip=skip, example=X)
    with torch.no_grad():
        both = [[h + b * 2 * g(h) for b in (0, 1)] for h in (X, X + 2 * f(X))]
    possible = torch.stack([h for row in both for h in row])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = surgeon.sample(model, X, 40).outputs
    assert drawn.shape == (40, 6, 4)
    distance = (drawn[:, None] - possible[None]).abs().amax(-1)  # draws x possible x samples
    assert (distance.amin(1) < 1e-5).all()
    used = distance.argmin(1)
    assert len(used.unique()) == 4
    rows_differ = (used != used[:, :1]).any()
    assert bool(rows_differ) == (unit == "sample")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # no statistics moved
    assert not any(module.training for module in model.modules())


def test_the_mean_over_draws_is_evaluation_where_the_network_is_linear_in_its_branch() -> None:
    model = randomise(nn.Sequential(Plain())).eval()
    surgeon.apply(model, "uniform", drop_rate=0.5, example=X)
    drawn = surgeon.sample(model, X, 4000)
    error = drawn.spread / 4000**0.5
    assert ((drawn.mean - model(X)).abs() < 5 * error + 1e-5).all()


def test_disagreement_is_zero_where_all_draws_agree_and_log_2_where_two_certain_ones_do_not() -> None:
    certain = torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]])
    assert Samples(certain).disagreement.item() == pytest.approx(0.6931, abs=1e-3)
    assert Samples(certain[:1]).disagreement.item() == pytest.approx(0, abs=1e-6)
    assert Samples(certain).probabilities.tolist() == [[pytest.approx(0.5), pytest.approx(0.5)]]


def test_calibration_by_hand() -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.25, 0.75], [0.45, 0.55]])
    found = calibration(probabilities, torch.tensor([0, 1, 1, 0]), bins=10)
    assert found.accuracy == 0.5
    assert found.nll == pytest.approx(
        -sum(torch.tensor([0.95, 0.15, 0.75, 0.45]).log().tolist()) / 4, rel=1e-5
    )
    assert found.ece == pytest.approx((0.05 + 0.85 + 0.25 + 0.55) / 4, rel=1e-5)  # one answer in each bin
    assert found.auarc == pytest.approx((1 + 1 / 2 + 2 / 3 + 2 / 4) / 4)
    assert str(found).startswith("accuracy 50.0%, NLL ")


def test_a_calibrated_forecaster_has_no_calibration_error() -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(200_000, generator=generator)
    labels = (torch.rand(200_000, generator=generator) < p).long()
    assert calibration(torch.stack([1 - p, p], 1), labels).ece < 0.005
    assert calibration(torch.stack([1 - p, p], 1).square().softmax(-1), labels).ece > 0.05


def test_messages() -> None:
    model = nn.Sequential(Plain())
    with pytest.raises(NotGatedError, match="no gates to draw"):
        surgeon.sample(model, X)
    surgeon.apply(model, example=X)
    with pytest.raises(UsageError, match="draws is 0"):
        surgeon.sample(model, X, 0)
    with pytest.raises(UsageError, match=r"probabilities \[2, 2\] and labels \[3\] do not fit"):
        calibration(torch.eye(2), torch.zeros(3).long())
    pair = nn.Sequential(Plain(), nn.Flatten(0))
    surgeon.apply(pair, example=X)
    with pytest.raises(UsageError, match="not one tensor with a row per sample"):
        surgeon.sample(pair, X, 2)
