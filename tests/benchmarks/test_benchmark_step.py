"""`benchmarks.step` on a network of two blocks: its rows, going on, the page and the picture."""

import json
from pathlib import Path

import pytest
import timm
import torch
from blocks import grads, randomise
from click.testing import CliRunner
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

import surgeon
from benchmarks import _step_models, _step_small, step
from benchmarks._step_by_hand import by_hand
from benchmarks._step_cifar import Basic, cifar_resnet
from benchmarks._step_measure import Taken, drawing, typical
from benchmarks._step_models import Net


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), Basic(4, 4, 1), Basic(4, 4, 1), nn.Flatten(), nn.Linear(256, 10))


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_step_models.NETS, "tiny", Net(tiny, 8))


@pytest.mark.usefixtures("_tiny")
def test_rows_page_and_picture_and_nothing_measured_twice(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    given = ["--models", "tiny", "--batch", "4", "--rounds", "2", "--still", "2", "--rows", str(rows)]
    given += ["--page", str(page), "--threads", str(torch.get_num_threads())]
    for rates, lines in (("0.5", 2 + 8), ("0.5", 2 + 8), ("0.5,0.1", 2 + 16)):
        ran = CliRunner().invoke(step.main, [*given, "--rates", rates], catch_exceptions=False)
        assert ran.exit_code == 0
        assert len(rows.read_text().splitlines()) == lines
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    steps = {(r["rate"], r["variant"]): r for r in found if r["kind"] == "step"}
    assert steps[0.5, "plain"]["ratio"] == 1
    assert 0 < steps[0.5, "empty"]["drawn"] < 0.5
    assert (
        steps[0.5, "mask"]["bound"] == 1 > steps[0.1, "batch"]["bound"] > steps[0.5, "batch"]["bound"] > 0.5
    )
    assert all(r["seconds"] > 0 and r["megabytes"] > 0 for r in steps.values())
    assert {r["variant"] for r in found if r["kind"] == "still"} == {"evaluation", "rate 0"}
    text = page.read_text()
    assert "| tiny | 4 | 0.5 | sample |" in text
    assert text.count("| tiny | 4 | evaluation |") == 1
    assert page.with_suffix(".png").stat().st_size > 5000


NETS = {
    "bottleneck": lambda: ResNet(Bottleneck, (1, 1, 2, 1), num_classes=10, stem_width=8),
    "cifar": lambda: cifar_resnet(14),
    "vit": lambda: timm.create_model("test_vit"),
    "convnext": lambda: timm.create_model("test_convnext"),
}


@pytest.mark.parametrize("unit", ["sample", "batch"])
@pytest.mark.parametrize("name", NETS)
def test_by_hand_is_what_the_gates_do(name: str, unit: str) -> None:
    """Outputs and gradients under one seed; and something was dropped."""
    size = 160 if name == "vit" else 32
    x = torch.randn(8, 3, size, size).double()
    plain, hand, gated = (randomise(NETS[name]()).double().train() for _ in range(3))
    by_hand(hand, unit, 0.5)
    surgeon.apply(gated, drop_rate=0.5, example=x, unit=unit, skip=True)
    sides = []
    for model in (hand, gated, plain):
        torch.manual_seed(1)
        out = model(x)
        out.square().mean().backward()
        sides.append((out.detach(), {k: g for k, g in grads(model).items() if g is not None}))
    torch.testing.assert_close(*sides[:2], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(sides[0][0], sides[2][0], rtol=1e-3)


def test_an_unknown_network_is_named() -> None:
    ran = CliRunner().invoke(step.main, ["--models", "resnet9"])
    assert ran.exit_code == 2
    assert "'resnet9' is not among resnet50" in ran.output


@pytest.mark.parametrize("options", [{"unit": "batch"}, {"skip": True}])
def test_the_share_drawn_is_that_of_what_ran(options: dict[str, object]) -> None:
    """On average that is the bound; with every row kept it is one."""
    model = surgeon.apply(tiny(), "uniform", drop_rate=0.4, example=torch.zeros(2, 3, 8, 8), **options)
    x, shares = torch.randn(4, 3, 8, 8), []
    for _ in range(200):
        with drawing(model) as share:
            model(x)
        shares.append(share())
    assert sum(shares) / 200 == pytest.approx(surgeon.status(model).expected_flops, abs=0.06)
    surgeon.set_drop_rate(model, 0.0)
    with drawing(model) as share:
        model(x)
    assert share() == 1


def test_typical_draws_are_what_a_step_draws() -> None:
    model = surgeon.apply(
        cifar_resnet(56), drop_rate=0.5, example=torch.zeros(2, 3, 8, 8), unit="batch"
    ).train()
    expected, seeds = surgeon.status(model).expected_flops, typical(model, 3)
    assert len(set(seeds)) == 3
    for seed in seeds:
        torch.manual_seed(seed)
        with drawing(model) as share:
            model(torch.zeros(4, 3, 8, 8))
        assert share() == pytest.approx(expected, abs=0.006)


def test_the_fastest_step_of_each_draw_counts() -> None:
    assert Taken([5.0, 2.0, 9.0, 4.0, 3.0, 6.0]).fastest == pytest.approx((4 + 2 + 6) / 3)
    assert Taken([5.0, 2.0]).fastest == 3.5


def test_small_kernels_are_measured_once_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_step_small, "BLOCKS", 2)
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    given = ["--small", "3", "--rows", str(rows), "--page", str(page)]
    for _ in range(2):
        ran = CliRunner().invoke(step.main, given, catch_exceptions=False)
        assert ran.exit_code == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [r["variant"] for r in found if r["batch"] == 2] == [
        *("rate 0", "batch", "sample", "mask", "timm's drop path", "auto", "plain again"),
        *("evaluation", "plain again, evaluation"),
    ]
    assert {r["batch"] for r in found} == {2, 8}
    assert all(0.2 < r["ratio"] < 20 for r in found)
    assert page.read_text().count("| 8 | timm's drop path |") == 1


def test_a_quick_look_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_step_small, "BLOCKS", 2)
    for name in ("resnet110", "vit_small"):
        monkeypatch.setitem(_step_models.NETS, name, Net(tiny, 8))
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    given = ["--quick", "--rows", str(rows), "--page", str(page)]
    ran = CliRunner().invoke(step.main, given, catch_exceptions=False)
    assert ran.exit_code == 0
    assert "| 8 | evaluation |" in ran.output
    assert "| resnet110 | 2 | 0.5 | sample |" in ran.output
    assert not rows.exists()
    assert not page.exists()
