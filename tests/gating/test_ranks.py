"""Draws shared by ranks, as far as one process shows them; the rest is in `promises/test_distributed.py`."""

import copy
import pickle
from typing import Any

import pytest
import torch
from blocks import Plain, grads, randomise, same
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgeon
import surgeon._gating.ranks as _ranks
from surgeon._gating.gated import gates_of
from surgeon._gating.ranks import _REMEMBERED, _check
from surgeon.errors import UsageError

X = torch.zeros(2, 4)
ALARM = 1e-7


def gated(rate: float = 0.5, **options: Any) -> nn.Module:
    model = randomise(nn.Sequential(*(Plain() for _ in range(6))))
    return surgeon.apply(model, "uniform", drop_rate=rate, sync="ranks", example=X, **options)


FORMS = [{"unit": "batch"}, {"skip": True}, {"skip": False}]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_seed_repeats_a_run_and_every_step_draws_anew(options: dict[str, Any]) -> None:
    x, runs = torch.randn(6, 4), []
    for seed in (1, 1, 2):
        model = gated(**options)
        torch.manual_seed(seed)
        runs.append([model(x) for _ in range(5)])
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert len({tuple(out.flatten().tolist()) for out in runs[0]}) > 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_checkpointing_replays_the_draws(options: dict[str, Any], reentrant: bool) -> None:
    x, sides = torch.randn(5, 4, requires_grad=True, dtype=torch.float64), []
    for replay in (False, True):
        model = gated(unused="zero", **options).double()
        torch.manual_seed(4)
        outs = []
        for _ in range(2):  # two forwards before the backward
            y: Tensor = x
            for block in model:
                y = checkpoint(block, y, use_reentrant=reentrant) if replay else block(y)
            outs.append(y)
        sum(y.square().sum() for y in outs).backward()
        sides.append((outs, grads(model), model(x)))
    # In another order of summation; a draw that differs is off by far more.
    torch.testing.assert_close(*sides, rtol=1e-12, atol=1e-12)


def test_each_gate_survives_as_often_as_its_rate_says() -> None:
    model, draws = gated(0.3, unit="batch"), 4000
    for gate in gates_of(model):
        kept = sum(gate.survives() for _ in range(draws))
        assert binomtest(kept, draws, 0.7).pvalue > ALARM


def test_gates_are_independent_of_each_other_and_of_the_step_before() -> None:
    """Exact binomial on the agreement of neighbouring fates at p = 1/2."""
    first, second, *_ = gates_of(gated(0.5, unit="batch"))
    a, b = zip(*((first.survives(), second.survives()) for _ in range(4000)), strict=True)
    for one, other in ((a, b), (a[1:], a[:-1]), (b[1:], a[:-1])):
        agree = sum(i == j for i, j in zip(one, other, strict=True))
        assert binomtest(agree, len(one), 0.5).pvalue > ALARM


def test_copies_and_pickles_go_on_each_for_itself() -> None:
    model, x = gated(unit="batch"), torch.randn(3, 4)
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        state = torch.random.get_rng_state()
        expected = [copy.deepcopy(model)(x) for _ in range(1)]
        torch.random.set_rng_state(state)
        assert same([twin(x)], expected)
        ranks = {id(gate.decided.ranks) for gate in gates_of(twin)}
        assert len(ranks) == 1
        assert ranks != {id(gates_of(model)[0].decided.ranks)}


def test_only_so_many_draws_are_remembered() -> None:
    gate = gates_of(gated(0.5))[0]
    ranks = gate.decided.ranks
    assert ranks is not None
    for _ in range(_REMEMBERED + 10):
        ranks.numbers(gate, 1)
    assert len(ranks.tokens[0]) == _REMEMBERED


def test_differing_ranks_are_all_named() -> None:
    same_rates = [("1.add", 0.5), ("2.add", 0.5)]
    _check([same_rates, list(same_rates)])
    with pytest.raises(
        UsageError, match=r"rank 0 and ranks 1, 3 have .* \(gate 2.add: drop rate 0.5 against"
    ):
        _check([same_rates, [("1.add", 0.5), ("2.add", 0.25)], same_rates, same_rates[:1]])
    with pytest.raises(UsageError, match="2 gates against 1"):
        _check([same_rates, same_rates[:1]])
    with pytest.raises(UsageError, match=r"gates 1\.add and a\.add"):
        _check([same_rates, [("a.add", 0.5), ("2.add", 0.5)]])


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(UsageError, match="sync is 'all'; known are 'none', 'ranks'"):
        surgeon.apply(Plain(), sync="all", example=X)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler, at a break
def test_a_compiled_graph_breaks_at_the_draw_and_draws_anew() -> None:
    model = gated(skip=False)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(6, 4)
    torch.manual_seed(3)
    expected = [model(x) for _ in range(3)]
    model.load_state_dict(model.state_dict())
    for ranks in {id(g.decided.ranks): g.decided.ranks for g in gates_of(model)}.values():
        assert ranks is not None
        ranks.seed = None  # agree again, with the same seed
    torch.manual_seed(3)
    assert same([compiled(x) for _ in range(3)], expected)
    torch._dynamo.reset()


# --- sync="depth" ------------------------------------------------------------------


def deep(rate: float = 0.5, schedule: str = "linear") -> nn.Module:
    model = randomise(nn.Sequential(*(Plain() for _ in range(6))))
    return surgeon.apply(model, schedule, drop_rate=rate, unit="batch", sync="depth", example=X)


def fates(model: nn.Module, steps: int, monkeypatch: pytest.MonkeyPatch, rank: int) -> list[list[bool]]:
    """Which gates are open in each step, on a rank whose seed has been agreed on."""
    monkeypatch.setattr(_ranks, "several", lambda: True)
    monkeypatch.setattr(_ranks.dist, "get_rank", lambda: rank)
    gates = gates_of(model)
    shared = gates[0].decided.ranks
    assert shared is not None
    shared.seed, shared.size = 17, 1
    return [[gate.survives() for gate in gates] for _ in range(steps)]


def test_equal_depth_on_every_rank_and_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many run on each rank, which ones differs, and each as often as its gate says (binomial, 1e-7)."""
    steps = 1500
    a, b = (fates(deep(), steps, monkeypatch, rank) for rank in (0, 1))
    assert [sum(step) for step in a] == [sum(step) for step in b]
    assert sum(x != y for x, y in zip(a, b, strict=True)) > steps / 2
    assert {sum(step) for step in a} == {4, 5}  # of 6 - 1.75
    for gate, ran in zip(gates_of(deep()), zip(*a, strict=True), strict=True):
        assert binomtest(sum(ran), steps, gate.survival).pvalue > ALARM


def test_equal_depth_follows_a_changed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(0.5, "uniform")
    assert {sum(step) for step in fates(model, 50, monkeypatch, 0)} == {3}
    surgeon.set_drop_rate(model, 0.0)
    assert {sum(step) for step in fates(model, 50, monkeypatch, 0)} == {6}


def test_other_schedules_are_named_with_the_word_of_the_user() -> None:
    with pytest.raises(UsageError, match="sync='depth': rank 0 and rank 1 have different schedules"):
        _check([[("0.add", 0.1)], [("0.add", 0.2)]], "depth")


def test_depth_is_about_whole_branches() -> None:
    with pytest.raises(UsageError, match="sync='depth' is about whole branches"):
        surgeon.apply(Plain(), sync="depth", example=X)
