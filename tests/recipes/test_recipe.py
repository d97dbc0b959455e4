"""The recipe on small jobs: every shipped config, an image folder, stopping and going on, what it refuses."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from surgeon import SurgeonError, _recipes
from surgeon.errors import UsageError

CONFIGS = sorted(path.stem for path in (_recipes.locate() / "configs").rglob("*.yaml"))

FAKE = [
    *("data.kind=fake", "data.samples=8", "data.image_size=32", "data.classes=4", "data.workers=0"),
    *("train.batch_size=4", "train.epochs=1", "train.accumulate=1", "model.pretrained=false", "device=cpu"),
    *("deliver.onnx=false", "deliver.timing_steps=1", "log.every=1"),
]
# What makes each model small enough for a test; its kind of block stays.
SMALLER = {
    "digits": ["data.channels=1", "pretrain.classes=2", "pretrain.epochs=1", "deliver.onnx=true"],
    "resnet50": ["model.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}"],
    "vit_small": ["model.kwargs={img_size: 32, depth: 2, embed_dim: 32, num_heads: 2}"],
}
SMALL = {
    "model": {"name": "timm:resnet18", "kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}},
    "data": {"kind": "fake", "samples": 16},
    "gates": {"unit": "batch", "scaling": "paper"},
    "optimizer": {"lr": 0.1, "warmup_epochs": 1, "weight_decay": 1e-4},
    "train": {"epochs": 3, "batch_size": 4},
    "deliver": {"onnx": False, "plot": False},
    "log": {"every": 1},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return _recipes.load("finetune")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its device and precision in globals; one process here plays many."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL | {"output": str(tmp_path / "run")}))  # JSON is YAML
    return str(path)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_folds_and_delivers(
    recipe: ModuleType, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = recipe.main(name, [*FAKE, *SMALLER[name], f"output={tmp_path}"])
    assert report["stock"]["disagree"] == 0
    assert report["stock"]["max_difference"] < 1e-4
    assert report["gates"] > 0
    assert {Path(file).name for file in report["files"]} >= {
        "model.safetensors",
        "metrics.jsonl",
        "survival.png",
    }
    assert all(Path(file).stat().st_size for file in report["files"])
    assert [line["kind"] for line in lines(tmp_path)] == ["step", "step", "epoch"]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    shown = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, shown)) <= 80, shown
    if name == "digits":
        assert report["onnx"]["disagree"] == 0
        assert report["onnx"]["gates_kept"] == 0
        assert report["parity"]["ok"]


def test_checkpoint_loads_into_a_stock_model(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    recipe.main(small, ["train.epochs=1"])
    state = load_file(tmp_path / "run" / "model.safetensors")
    stock = timm.create_model("resnet18", num_classes=4, **SMALL["model"]["kwargs"])  # type: ignore[index]
    assert set(state) == set(stock.state_dict())
    stock.load_state_dict(state)


def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(
    recipe: ModuleType, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train.ema=0.9", "train.mixup=0.5", "gates.ramp_epochs=2", "optimizer.momentum=0.9"]
    recipe.main(small, [*options, f"output={tmp_path / 'whole'}"])

    class Killed(Exception):
        pass

    def killed(trainer: Any, *args: Any) -> None:
        if trainer.epoch == 1 and trainer.step == 6:  # in the middle, with lines in the log
            raise Killed
        after_step(trainer, *args)

    after_step = recipe.Trainer.after_step
    monkeypatch.setattr(recipe.Trainer, "after_step", killed)
    with pytest.raises(Killed):
        recipe.main(small, [*options, f"output={tmp_path / 'parts'}"])
    monkeypatch.undo()
    recipe.main(small, [*options, f"output={tmp_path / 'parts'}", "resume=true"])

    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    for file in ("last.pt", "model.safetensors"):
        read = load_file if file.endswith("safetensors") else _tensors
        whole, parts = read(tmp_path / "whole" / file), read(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved state under flat names."""
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, below in value.items():
                walk(f"{name}.{key}", below)

    state = torch.load(path, weights_only=True)
    walk("", state)
    assert any(name.startswith(".optimizer") for name in found)
    assert any(name.startswith(".model") for name in found)
    return found


def test_other_seeds_are_other_runs(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    """The control of the test above: its equality is no accident of a training that draws nothing."""
    for seed in (0, 1):
        recipe.main(small, [f"seed={seed}", f"output={tmp_path / str(seed)}"])
    assert lines(tmp_path / "0") != lines(tmp_path / "1")


def test_output_of_another_run_is_kept(recipe: ModuleType, small: str) -> None:
    recipe.main(small, ["train.epochs=1"])
    with pytest.raises(
        UsageError, match=r"already holds a run: resume=true .* overwrite=true .* output=PATH"
    ):
        recipe.main(small, ["train.epochs=1"])
    recipe.main(small, ["train.epochs=1", "overwrite=true"])
    with pytest.raises(UsageError, match=r"last\.pt was left by a run with optimizer: .*same settings"):
        recipe.main(small, ["train.epochs=1", "resume=true", "optimizer.lr=0.2"])


def test_nothing_to_resume_is_an_error(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"resume=true, but there is no .*last\.pt"):
        recipe.main(small, ["resume=true"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(b"not a state")
    with pytest.raises(SurgeonError, match=r"last\.pt cannot be read: it is damaged; start again"):
        recipe.main(small, ["resume=true"])
    torch.save({"weights": torch.zeros(1)}, tmp_path / "run" / "last.pt")
    with pytest.raises(SurgeonError, match=r"last\.pt is no state of this recipe; start again"):
        recipe.main(small, ["resume=true"])


def test_best_weights_are_those_of_the_best_epoch(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    report = recipe.main(small, ["deliver.weights=best"])
    best = max(line["top1"] for line in lines(tmp_path / "run") if line["kind"] == "epoch")
    assert math.isclose(report["stock"]["top1"], best, abs_tol=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(recipe: ModuleType, small: str) -> None:
    with pytest.raises(SurgeonError, match=r"the loss is (nan|inf) at step \d+ of epoch \d.*optimizer\.lr"):
        recipe.main(small, ["optimizer.lr=1e30", "optimizer.warmup_epochs=0"])


def test_accumulated_steps_are_counted_as_one(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    recipe.main(small, ["train.accumulate=3", "train.epochs=1", "train.clip_norm=1.0"])
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 2]  # 4 batches: 3 and 1


def test_tensorboard_events_are_written(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe.main(small, ["train.epochs=1", "log.tensorboard=true"])
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("daisy", "rose"):
            folder = tmp_path / "flowers" / split / kind
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "flowers"


FOLDER = [
    "data.kind=folder",
    "data.image_size=32",
    "train.epochs=1",
    "data.auto_augment=rand-m9",
    "data.erase=0.5",
]


def test_image_folder(recipe: ModuleType, small: str, flowers: Path, tmp_path: Path) -> None:
    report = recipe.main(small, [*FOLDER, f"data.root={flowers}"])
    assert report["samples"] == 4
    assert load_file(tmp_path / "run" / "model.safetensors")["fc.weight"].shape[0] == 2


def test_torchvision_network_gets_a_head_for_the_classes(
    recipe: ModuleType, small: str, flowers: Path
) -> None:
    model = ["model.name=torchvision:mobilenet_v3_small", "model.kwargs={width_mult: 0.25}"]
    report = recipe.main(small, [*FOLDER, *model, f"data.root={flowers}", "gates.scaling=inverted"])
    assert report["stock"]["disagree"] == 0


def test_folder_that_is_not_there(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"data\.train: there is no folder .*nowhere/train; expected .*CLASS/IMAGE"
    ):
        recipe.main(small, [*FOLDER, f"data.root={tmp_path / 'nowhere'}"])


def test_folders_of_different_classes(recipe: ModuleType, small: str, flowers: Path) -> None:
    (flowers / "val" / "rose").rename(flowers / "val" / "tulip")
    with pytest.raises(UsageError, match=r"same classes.*only in one of train and val: rose, tulip"):
        recipe.main(small, [*FOLDER, f"data.root={flowers}"])


def test_class_without_images(recipe: ModuleType, small: str, flowers: Path) -> None:
    (flowers / "train" / "tulip").mkdir()
    with pytest.raises(UsageError, match=r"data\.train: .* is not an image folder: .*tulip"):
        recipe.main(small, [*FOLDER, f"data.root={flowers}"])


def _no_network(*args: Any, **kwargs: Any) -> nn.Module:
    raise OSError("Name or service not known")


def test_timm_weights_without_a_network(
    recipe: ModuleType, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", _no_network)
    message = (
        r"the pretrained weights of timm:resnet18 could not be fetched from https://huggingface\.co/timm/resnet18"
        r"\S* \(Name or service not known\).*model\.checkpoint=FILE"
    )
    with pytest.raises(SurgeonError, match=message):
        recipe.main(small, ["model.pretrained=true"])


def test_torchvision_weights_without_a_network(
    recipe: ModuleType, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", _no_network)
    message = (
        r"torchvision:resnet18 could not be fetched from https://download\.pytorch\.org/models/resnet18-\S+"
    )
    with pytest.raises(SurgeonError, match=message):
        recipe.main(small, ["model.pretrained=true", "model.name=torchvision:resnet18", "model.kwargs={}"])


def test_a_wrong_model_argument_is_no_network_failure(recipe: ModuleType, small: str) -> None:
    with pytest.raises(SurgeonError, match="colour"):
        recipe.main(small, ["model.kwargs={colour: red}"])


def test_plot_has_a_bar_per_gate(tmp_path: Path) -> None:
    from types import SimpleNamespace

    _recipes.load("finetune")
    import finetune_plot  # type: ignore[import-not-found, unused-ignore]  # on the path since the load

    gates = [SimpleNamespace(name=f"b{i}.add", block=f"b{i}", survival=1 - i / 10) for i in range(1, 6)]
    path = finetune_plot.plot_survival(
        SimpleNamespace(gates=gates, expected_depth=3.5), "title", tmp_path / "p.png"
    )
    with Image.open(path) as image:
        assert image.width > 600
    assert list(tmp_path.iterdir()) == [path]  # no draft is left behind


@pytest.mark.slow
def test_two_processes_train_with_one_coin_per_batch(small: str, tmp_path: Path) -> None:
    """Each with coins of its own, under DDP as the launcher makes it; a hang is killed and fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    script = str(_recipes.locate() / "finetune.py")
    ran = subprocess.run(
        [*launcher, script, small, "gates.drop_rate=0.6"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert [line["epoch"] for line in lines(tmp_path / "run") if line["kind"] == "epoch"] == [1, 2, 3]
