"""Predicted and realised steps: the arithmetic by known times, and real steps of a small network."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon import _measure
from surgeon._gating.gated import gates_of
from surgeon._measure import measure
from surgeon._plan import Settings
from surgeon.errors import NoResidualsError, UsageError

X = torch.zeros(2, 6)


class Block(nn.Module):
    def __init__(self, *first: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*first, nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def net() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(6, 3))


TIMES = {"plain": 2.0, "masked": 2.2, "skipped": 1.6, "empty": 0.4, "half": 1.5}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of known times."""

    def taken(steps: dict[str, Callable[[], None]], rounds: int, *_: object) -> dict[str, list[float]]:
        for step in steps.values():
            step()  # they do run
        return {name: [TIMES[name]] * rounds for name in steps}

    monkeypatch.setattr(_measure, "_in_turns", taken)


def test_a_step_is_reckoned_from_steps_that_need_no_rate(known: None) -> None:
    found = measure(net(), Settings(drop_rate=0.5, example=X), batch=8)
    dropped = (0.25 + 0.5) / 2  # linear, two branches alike
    extra = 1.5 - (2.2 - (2.0 - 0.4) / 2)  # of half of the rows everywhere; six rows and four are some, too
    assert found.predicted == pytest.approx((2.2 - (2.0 - 0.4) * dropped + extra) / 2.0)
    assert (found.masked, found.empty, found.skipped) == (1.1, 0.2, 0.8) and found.plain == 2000
    assert found.break_even == 0  # below one row of eight there are seldom only some, and then most


def test_the_break_even_is_where_the_saving_is_what_rows_take(
    known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TIMES, "half", 2.0)  # 0.6 longer than half of the branches say
    found = measure(net(), Settings(drop_rate=0.3, example=X), batch=8)
    assert found.break_even == pytest.approx(0.5, abs=0.002)  # 1.6 * (0.25 + 0.5) / 2 is 0.6, too
    assert "from drop rate 0.5 on" in str(found) and found.to_dict()["break_even"] == found.break_even


@pytest.mark.parametrize(
    ("batch", "rate", "statistics", "rounding", "expected"),
    [
        (8, 0.5, False, "random", 1.0),  # four rows
        (4, 0.05, False, "random", 0.2),  # three in a fifth of the steps, else four
        (4, 0.95, False, "random", 0.2),
        (4, 0.75, True, "random", 0.5),  # one row alone is two or none
        (2, 0.5, True, "random", 0.0),
        (4, 0.05, False, "fixed", 0.0),
        (4, 0.3, False, "fixed", 1.0),
    ],
)
def test_how_often_some_rows_run_and_others_do_not(
    batch: int, rate: float, statistics: bool, rounding: str, expected: float
) -> None:
    """By the formula, and by the gate's own draws."""
    model = net() if not statistics else nn.Sequential(Block(nn.BatchNorm1d(6)), nn.Linear(6, 3))
    gated = surgeon.apply(model, "uniform", drop_rate=rate, rounding=rounding, skip=True, example=X)
    gate = gates_of(gated)[0]
    assert gate.branch.statistics == statistics
    assert _measure._partly(gate, batch, rate) == pytest.approx(expected)
    torch.manual_seed(0)
    drawn = [0 < gate.survivors(batch) < batch for _ in range(2000)]
    assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=0.06)  # five standard deviations


def test_a_coin_for_the_batch_masks_and_gathers_nothing(known: None) -> None:
    found = measure(net(), Settings(drop_rate=0.5, unit="batch", example=X), batch=8)
    assert found.predicted == pytest.approx((2.0 - 1.6 * 0.375) / 2.0) and found.break_even == 0
    assert "skipping takes less than a mask at any drop rate" in str(found)


def test_where_rows_cost_more_than_branches_there_is_no_break_even(
    known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TIMES, "half", 300.0)
    found = measure(net(), Settings(drop_rate=0.5, example=X), batch=8)
    assert "a mask takes less than skipping at every drop rate" in str(found)
    assert found.to_dict()["break_even"] is None


@pytest.mark.parametrize(("unit", "batch"), [("sample", 8), ("sample", 1), ("sample", 2), ("batch", 4)])
def test_real_steps_leave_the_model_and_the_generator_alone(unit: str, batch: int) -> None:
    model = net().eval()
    before: Sequence[Tensor] = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    settings = surgeon.plan(model, drop_rate=0.5, unit=unit, example=X).settings
    found = measure(model, settings, batch=batch, rounds=2)
    assert all(map(torch.equal, before, model.parameters())) and not model.training
    assert torch.equal(state, torch.get_rng_state())
    assert found.plain > 0 and found.skipped > 0 and "predicted" in str(found)


def test_draws_stand_for_the_mean() -> None:
    """A coin for the batch: the seeds drop what is dropped on average, within a tenth."""
    gated = surgeon.apply(nn.Sequential(*(Block() for _ in range(12))), unit="batch", example=X)
    gates = gates_of(gated)
    expected = sum(gate.survival for gate in gates)
    for seed in _measure._typical(gates, "batch", 8):
        torch.manual_seed(seed)
        assert abs(sum(gate.survives() for gate in gates) - expected) < 0.1 * len(gates)


def test_what_is_refused() -> None:
    with pytest.raises(NoResidualsError):
        measure(nn.Linear(6, 6), Settings(example=X), batch=4)
    with pytest.raises(UsageError, match="batch is 0"):
        measure(net(), Settings(example=X), batch=0)
