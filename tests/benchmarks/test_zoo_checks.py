"""The checks of the coverage sweep can fail: each is shown a network with the fault that it looks for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import _zoo_checks, _zoo_report
from surgeon import _removal
from surgeon._folding import fold
from surgeon._folding.fold import FoldPlan


class Block(nn.Module):
    """``keep * x + f(x)``; with ``keep`` 0 the shortcut carries nothing."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep + self.f(x)


class Net(nn.Module):
    """Two blocks, of which the second has the given ``keep``."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.first, self.second = Block(1.0), Block(keep)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


class Restless(Net):
    """Evaluates otherwise each time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


EXAMPLE = torch.zeros(3, 6)


def test_a_sound_network_passes() -> None:
    row = _zoo_checks.numbers(Net(1.0), EXAMPLE)
    assert row["gated"] == row["live"] == row["carried"] == 2
    assert row["eval_equal"] and row["eval_finite"] and row["train_ok"] and row["restored"]


def test_a_gate_that_loses_the_input_is_named() -> None:
    row = _zoo_checks.numbers(Net(0.0), EXAMPLE)
    assert row["lost"] == ["second.add"] and row["carried"] == 1


def test_a_gate_that_nothing_depends_on_is_named() -> None:
    model = Net(1.0)
    model.second.f[2].register_forward_hook(lambda *call: call[-1] * 0)
    assert _zoo_checks.numbers(model, EXAMPLE)["dead"] == ["second.add"]


def test_unequal_evaluation_is_seen() -> None:
    assert not _zoo_checks.numbers(Restless(1.0), EXAMPLE)["eval_equal"]


def test_a_fold_is_exact_and_not_a_silent_nothing() -> None:
    row = _zoo_checks.folds(Net(1.0).double(), EXAMPLE.double())
    assert row["left"] == {} and row["divided"] == 4 and row["silent"] == []
    assert max(row["fold_error"], row["kept_error"], row["round_trip"], row["weights_error"]) < 1e-14
    assert row["fold_moved"] > 1e-3


def test_a_fold_that_leaves_a_gate_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: nn.Module, plan: FoldPlan, scales: dict[str, float]) -> None:
        kept = tuple(p for p in plan.products if p.gate != "second.add")
        fold.commit(model, replace(plan, products=kept), scales)

    monkeypatch.setattr(_removal, "commit", forgetful)
    row = _zoo_checks.folds(Net(1.0).double(), EXAMPLE.double())
    assert row["fold_error"] > 1e-3 and "second.add" in row["silent"]


def test_a_gate_whose_fold_nothing_shows_is_named() -> None:
    model = Net(1.0).double()
    model.second.register_forward_hook(lambda block, given, _: given[0])  # Nobody sees what the block does.
    assert _zoo_checks.folds(model, EXAMPLE.double())["silent"] == ["second.add"]


def test_what_a_fold_would_leave_is_told_without_weights() -> None:
    plain, silent = Net(1.0).to("meta"), Net(1.0)
    silent.second.f[2] = nn.SiLU()
    assert _zoo_checks.leftover(plain, EXAMPLE.to("meta")) == {"planned": 2, "left": {}}
    row = _zoo_checks.leftover(silent.to("meta"), EXAMPLE.to("meta"))
    assert row["planned"] == 2 and list(row["left"]) == ["second.add"]
    assert "silu" in row["left"]["second.add"]
    rows = [{"library": "mine", "model": "net", "gates": 2, "stage": "leftover", **row}]
    assert _zoo_report._leftover(rows) == [
        "- gates that fold into weights, by the plan of a fold alone: 1 of 2 in 1 models"
    ]


def test_the_page_is_made_from_the_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    found = {"gates": 2, "own_live": 3, "recalled": 2, "missed": {"drop": "no shortcut"}, "find_s": 0.5}
    measured = [
        {"stage": "structure", **found},
        {"stage": "numbers", "error": "ValueError: first try"},
        {"stage": "numbers", **_zoo_checks.numbers(Net(0.0), EXAMPLE)},
    ]
    named = [{"library": "mine", "model": "net", **row} for row in measured]
    rows.write_text("".join(json.dumps(row) + "\n" for row in named))
    _zoo_report.write(_zoo_report.read(rows), tmp_path / "coverage.csv")
    page = (tmp_path / "coverage.md").read_text()
    assert "| mine | 1 | 1 | 0 | 0 | 2 | 2 of 3 |" in page
    assert "| no shortcut | 1 | net 1 |" in page and "- mine:net: second.add" in page
    assert "first try" not in page  # the last row of a stage counts
    assert (tmp_path / "coverage.csv").read_text().count("\n") == 2
