"""Which rows survive: as often as the gate says, in every combination, without a bias.

Random quantities are tested with exact binomial tests or by enumeration, on fixed seeds; the stated
false-alarm rate is that of a fresh seed.
"""

import itertools

import pytest
import torch
from blocks import Linear, Twice, randomise, skipping
from scipy.stats import binomtest, chi2
from torch import Tensor, nn

import surgeon
import surgeon._gating.gate as _gate
from surgeon._gating.decided import BranchFacts, Decision
from surgeon._gating.gate import Gate

X = torch.zeros(2, 4)
ALARM = 1e-7  # of one test of a frequency


def gate(rate: float, *, statistics: bool = False) -> Gate:
    return Gate(Decision(), BranchFacts(skips=True, statistics=statistics), rate)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(("count", "rate"), [(1, 0.3), (2, 0.5), (3, 0.75), (5, 0.9), (8, 0.3), (64, 0.01)])
def test_every_row_survives_as_often_as_its_gate_says(count: int, rate: float, statistics: bool) -> None:
    """Binomial per row, at a false-alarm rate of 1e-7 each."""
    g, draws = gate(rate, statistics=statistics), 6000
    hits = torch.zeros(count)
    for _ in range(draws):
        kept = g.survivors(count)
        assert not (statistics and kept == 1 < count)
        hits[g.rows(count, kept, torch.device("cpu"))] += 1
    for row in hits.tolist():
        assert binomtest(int(row), draws, 1 - rate).pvalue > ALARM


def test_the_test_of_frequencies_can_fail() -> None:
    """Negative control: rounding the number of rows always down (as with a fixed share) is noticed."""
    g, draws = gate(0.3), 6000
    hits = sum(0 in g.rows(5, int(0.7 * 5), torch.device("cpu")) for _ in range(draws))
    assert binomtest(hits, draws, 0.7).pvalue < ALARM


@pytest.mark.parametrize(("count", "rate"), [(4, 0.5), (5, 0.4), (7, 0.11)])
def test_the_number_of_rows_is_exact_on_average(count: int, rate: float) -> None:
    """By enumeration: over a fine grid of the uniform number behind it the mean is ``p B``."""
    seen, grid = [], 2000
    with pytest.MonkeyPatch.context() as patch:
        for i in range(grid):
            patch.setattr(_gate, "_drawn", lambda _, i=i: [(i + 0.5) / grid, 0.0])
            seen.append(gate(rate).survivors(count))
    assert abs(sum(seen) / grid - (1 - rate) * count) <= 1 / grid
    assert max(seen) - min(seen) <= 1


def test_coins_are_those_of_torch_rand() -> None:
    """The same numbers in the same order, so that a script which draws them itself draws the same."""
    torch.manual_seed(3)
    drawn = [number for count in (1, 2, 1, 2) for number in _gate._drawn(count)]
    torch.manual_seed(3)
    assert drawn == [x for count in (1, 2, 1, 2) for x in torch.rand(count, dtype=torch.float64).tolist()]
    with torch.inference_mode():
        assert 0 <= _gate._drawn(7)[0] < 1
    assert 0 <= _gate._drawn(7)[0] < 1  # memory that inference mode made could not be written to here


def test_every_set_of_rows_is_equally_likely() -> None:
    """Chi-squared over the ten pairs of five rows; false alarm 1e-7."""
    g, draws = gate(0.6), 5000
    pairs = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for _ in range(draws):
        pairs[tuple(sorted(g.rows(5, 2, torch.device("cpu")).tolist()))] += 1
    expected = draws / len(pairs)
    assert chi2.sf(sum((n - expected) ** 2 / expected for n in pairs.values()), len(pairs) - 1) > ALARM


def test_gates_are_independent() -> None:
    """Chi-squared on the joint fates of one row at two gates; false alarm 1e-7."""
    model, draws = skipping(Twice()), 4000
    model.f, model.g = Ones(), Tens()
    with torch.no_grad():
        out = [float(model(torch.zeros(4, 4))[2, 0]) for _ in range(draws)]
    counts = [out.count(v) for v in (0.0, 2.0, 20.0, 22.0)]
    assert sum(counts) == draws
    assert chi2.sf(sum((n - draws / 4) ** 2 / (draws / 4) for n in counts), 3) > ALARM


class Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class Tens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 10)


@pytest.mark.parametrize("scaling", ["inverted", "paper"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_mean_training_output_is_the_evaluation_output(rows: int, scaling: str) -> None:
    """Over many draws of a chain linear in its branches; six standard errors, false alarm 2e-9 each."""
    model = skipping(
        randomise(nn.Sequential(*(Linear() for _ in range(3)))).double(),
        0.4,
        scaling=scaling,
        example=X.double(),
    )
    surgeon.set_drop_rate(model, 0.3)
    x = torch.randn(1, 4, dtype=torch.float64).expand(rows, 4)
    with torch.no_grad():
        outs = torch.stack([model(x)[-1] for _ in range(4000)])
        expected = model.eval()(x)[-1]
    error = outs.std(0) / len(outs) ** 0.5
    assert bool(((outs.mean(0) - expected).abs() <= 6 * error + 1e-12).all())
    assert bool(((outs.mean(0) - 1.3 * expected).abs() > 6 * error).any())  # negative control
