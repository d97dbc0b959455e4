"""Latency of networks and their branches: by known times, and of real files."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon._onnx import latency
from surgeon._onnx.latency import Latency, timed
from surgeon._onnx.shorter import beside
from surgeon._onnx.signature import signature
from surgeon._pruning.lesion import lesions
from surgeon._pruning.trial import Trial
from surgeon.errors import NoResidualsError, UsageError

X = torch.randn(2, 8, 16, 16)


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(8, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, 8, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def net() -> nn.Module:
    return nn.Sequential(*map(Block, (8, 8, 128, 8)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_branches_of_one_make_share_what_goes_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three alike take a tenth each and a fourth a half; without all, a little more than the sum is saved."""
    shares = {"0": 0.7, "1": 0.5, "none": 0.12}

    def known(files: dict[str, Path], *_: object, **__: object) -> tuple[dict[str, float], float]:
        return {name: shares[name] for name in files if name != "full"}, 20.0

    monkeypatch.setattr(latency, "timed", known)
    found = surgeon.latency(net(), X)
    assert found.full == 20.0 and len(found.branches) == 4
    assert found.branches["2.add"] == pytest.approx(20 * 0.5 * 0.88 / 0.8)
    cheap = [found.branches[f"{i}.add"] for i in (0, 1, 3)]
    assert cheap == pytest.approx([20 * 0.1 * 0.88 / 0.8] * 3)


def test_what_is_left_is_the_whole_less_the_branches() -> None:
    found = Latency(10.0, {"a": 2.0, "b": 3.0})
    assert found.without(["a"]) == 8 and found.without(["a", "b", "unknown"]) == 5
    assert "10 ms a run, batch 1, one thread" in str(found) and found.to_dict()["branches"] == {
        "a": 2.0,
        "b": 3.0,
    }


def test_each_run_counts_against_those_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down steadily: the whole network's runs around another one tell its speed."""
    clock = itertools.count(1)

    def run(path: Path, *_: object) -> Callable[[], float]:
        return lambda: float(path.name) * (1 + 0.01 * next(clock))

    monkeypatch.setattr(latency, "_run", run)
    called = signature(net(), X)
    shares, ms = timed({"whole": Path("2"), "half": Path("1"), "third": Path("0.5")}, called, rounds=9)
    assert shares == pytest.approx({"half": 0.5, "third": 0.25}, rel=1e-3) and ms > 2000


def test_real_files() -> None:
    """The branch of sixteen times the arithmetic takes most of the time."""
    found = surgeon.latency(net(), X, rounds=15)
    assert set(found.branches) == {f"{i}.add" for i in range(4)}
    assert found.branches["2.add"] > 2 * found.branches["0.add"] == 2 * found.branches["3.add"]
    assert sum(found.branches.values()) < found.full


def test_what_is_refused() -> None:
    with pytest.raises(NoResidualsError, match="no branch can be deleted"):
        surgeon.latency(nn.Linear(4, 4), torch.zeros(1, 4))
    with pytest.raises(UsageError, match="batch is 0"):
        surgeon.latency(net(), X, batch=0)


def test_a_shorter_file_is_measured_beside_the_whole_one(tmp_path: Path) -> None:
    """Without the dear branch: fewer weights, FLOPs and bytes, and most of the time gone."""
    model = net().eval()
    trial = Trial(model, data=[X], example=X)
    shorter = trial.shorter(["2.add"])
    reports = tuple(
        surgeon.export(one, tmp_path / f"{i}.onnx", example=X) for i, one in enumerate((model, shorter))
    )
    found = beside(
        trial, shorter, reports, ["2.add"], lesions=lesions(trial, ["2.add"], [1], 2, 0), predicted=0.5
    )
    assert found.shorter.ms < 0.7 * found.whole.ms and found.predicted == pytest.approx(0.5 * found.whole.ms)
    assert found.shorter.parameters == sum(p.numel() for p in shorter.parameters()) < found.whole.parameters
    assert found.shorter.bytes == (tmp_path / "1.onnx").stat().st_size < found.whole.bytes
    assert found.shorter.flops == found.whole.flops - 2 * 2 * 16 * 16 * 8 * 128 * 9 * 2
    assert found.whole.worth == found.lesions.full and found.shorter.worth == trial(["2.add"])
    said = str(found)
    assert "1 branch of 4 deleted" in said and "agreement" in said and "as many at random: " in said
    assert "without  2.add" in said and "predicted, ms" in said
