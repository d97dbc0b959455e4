"""The recipe on small jobs: every shipped config, an image folder, stopping and going on, what it refuses."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torchvision
from pictures import broken, clutter, odd, sound
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from surgeon import SurgeonError, _recipes
from surgeon.errors import UsageError

CONFIGS = [name for name, _ in _recipes.load("finetune_config").list_configs()]

FAKE = [
    *("data.image_size=32", "data.workers=0", "train.batch_size=4", "train.accumulate=1", "device=cpu"),
    *("deliver.onnx=false", "deliver.timing_steps=1", "train.precision=no"),
]
# What makes each model small enough for a test; its kind of block stays.
CONVNEXT = ["model.kwargs={depths: [1, 1, 1, 1], dims: [8, 8, 16, 16]}"]
RESNET = ["model.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}"]
SMALLER = {
    "digits": ["deliver.onnx=true"],
    "resnet50": RESNET,
    "vit_small": ["model.kwargs={depth: 2, embed_dim: 32, num_heads: 2}"],
    "paper/resnet152_imagenet": RESNET,
}


def smaller(name: str) -> list[str]:
    if name in SMALLER:
        return SMALLER[name]
    # The papers' networks are made of few numbers; what is tested is the config, on a small one of the kind.
    return ["model.name=timm:resnet18", *RESNET] if name.startswith("paper/") else CONVNEXT


SMALL = {
    "model": {"name": "timm:resnet18", "kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}},
    "data": {"kind": "fake", "samples": 16, "image_size": 32},
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


CLOCK = ("seconds", "images_per_second")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for what the clock said."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_two_steps_and_delivers(
    recipe: ModuleType, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = recipe.main(name, [*FAKE, *smaller(name), f"output={tmp_path / 'untouched'}"], dry_run=True)
    assert report["stock"]["disagree"] == 0
    assert report["stock"]["max_difference"] < 1e-4
    assert report["gates"] > 0
    assert {Path(file).name for file in report["files"]} >= {
        *("model.safetensors", "config.json", "README.md", "report.md", "report.json", "metrics.jsonl"),
        *("last.pt", "config.yaml", "env.json", "curves.png", "survival.png"),
    }
    assert not list(tmp_path.iterdir())  # nothing stays
    shown = capsys.readouterr()
    figures = [line for line in shown.out.splitlines() if not line.startswith("  /")]
    assert max(map(len, figures)) <= 80, figures
    assert re.search(r"^epoch 1/1  loss \d", shown.err, re.MULTILINE)
    if name == "digits":
        assert "ungated     top-1" in shown.out
        assert report["onnx"]["disagree"] == 0
        assert report["onnx"]["gates_kept"] == 0
        assert report["parity"]["ok"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("paper/")])
def test_the_networks_of_the_papers_are_there(recipe: ModuleType, name: str) -> None:
    from surgeon._source import check_spec

    check_spec(recipe.load_config(name, []).model.name)


def test_the_state_of_a_run_knows_its_model(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    """`surgeon fold run/last.pt` gives the weights that the run itself delivers."""
    from click.testing import CliRunner

    from surgeon.cli.main import main

    recipe.main(small, ["train.epochs=1", "gates.scaling=paper", "gates.unit=batch", "train.ema=0.9"])
    run = tmp_path / "run"
    done = CliRunner().invoke(main, ["fold", str(run / "last.pt"), "-o", str(tmp_path / "mine.safetensors")])
    assert done.exit_code == 0, done.stderr
    assert "weights taken from average; there is also model" in done.stderr
    own, delivered = load_file(tmp_path / "mine.safetensors"), load_file(run / "model.safetensors")
    assert own.keys() == delivered.keys()
    assert all(torch.allclose(own[key], delivered[key], rtol=1e-6) for key in own)
    again = ["fold", str(run / "last.pt"), "-o", str(tmp_path / "raw.safetensors"), "--entry", "model"]
    assert CliRunner().invoke(main, again).exit_code == 0
    raw = load_file(tmp_path / "raw.safetensors")
    assert any(not torch.allclose(raw[key], own[key]) for key in own)  # the control


def test_the_state_of_a_complete_run_needs_no_fold(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from surgeon.cli.main import main

    recipe.main(small, ["train.epochs=1", "gates.scaling=inverted"])
    line = ["fold", str(tmp_path / "run" / "last.pt"), "-o", str(tmp_path / "mine.safetensors")]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 4, done.stderr
    assert "need no evaluation scales; there is nothing to fold" in done.stderr


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
    # What is torn, and what may change on the way.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "ste')
    changed = ["resume=true", "log.every=1", "data.workers=1", "threads=1"]
    recipe.main(small, [*options, f"output={tmp_path / 'parts'}", *changed])

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


def test_output_of_another_run_is_kept(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    recipe.main(small, ["train.epochs=1"])
    with pytest.raises(
        UsageError, match=r"already holds a run: resume=true .* overwrite=true .* output=PATH"
    ):
        recipe.main(small, ["train.epochs=1"])
    recipe.main(small, ["train.epochs=1", "overwrite=true"])
    changed = ["resume=true", "optimizer.lr=0.2", "gates.schedule=uniform", "model.name=timm:resnet26"]
    with pytest.raises(UsageError) as caught:
        recipe.main(small, ["train.epochs=1", *changed])
    for told in (
        *("optimizer.lr: 0.1 then, 0.2 now", "gates.schedule: 'linear' then, 'uniform' now"),
        *("model.name: 'timm:resnet18' then, 'timm:resnet26' now", "may change: output, device"),
    ):
        assert told in str(caught.value)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    for changed, told in (
        ({"processes": 2}, "was left by 2 processes, and now there are 1"),
        ({"images": {**state["images"], "train": 7}}, "other images (7 images to train on then, 16 now"),
        ({"images": {**state["images"], "classes": ["0", "1", "2", "cat"]}}, "only in one of both: 3, cat"),
    ):
        torch.save({**state, **changed}, tmp_path / "run" / "last.pt")
        with pytest.raises(UsageError, match=re.escape(told)):
            recipe.main(small, ["train.epochs=1", "resume=true"])


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


def test_classes_that_do_not_fit_the_weights(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    with pytest.raises(
        SurgeonError, match=r"is to tell 4 classes apart, but gives \(2, 1000\) for two images"
    ):
        recipe.main(small, ["model.keep_head=true"])
    other = timm.create_model("resnet18", num_classes=7, **SMALL["model"]["kwargs"])  # type: ignore[index]
    torch.save(other.state_dict(), tmp_path / "seven.pth")
    with pytest.raises(SurgeonError, match=r"fc\.weight is 7x8, .* Give model\.kwargs\.num_classes=7"):
        recipe.main(small, [f"model.checkpoint={tmp_path / 'seven.pth'}"])
    with pytest.raises(UsageError, match=r"model\.checkpoint: there is no file .*none\.pth"):
        recipe.main(small, [f"model.checkpoint={tmp_path / 'none.pth'}"])
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_run_says_which_weights_it_starts_from(
    recipe: ModuleType, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets = [timm.create_model("resnet18", **SMALL["model"]["kwargs"]) for _ in range(2)]  # type: ignore[index]
    torch.save(
        {"state_dict": nets[0].state_dict(), "state_dict_ema": nets[1].state_dict()}, tmp_path / "m.pth"
    )
    recipe.main(small, [f"model.checkpoint={tmp_path / 'm.pth'}", "model.entry=state_dict", "train.epochs=1"])
    assert "taken from state_dict; there is also state_dict_ema" in capsys.readouterr().err


def test_best_weights_are_those_of_the_best_epoch(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    report = recipe.main(small, ["deliver.weights=best"])
    best = max(line["top1"] for line in lines(tmp_path / "run") if line["kind"] == "epoch")
    assert math.isclose(report["stock"]["top1"], best, abs_tol=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    message = (
        r"the loss.* is (nan|inf) at step \d+ of epoch \d.*optimizer\.lr.*last\.pt keeps epoch \d; "
        r"a new run starts from it with model\.checkpoint="
    )
    with pytest.raises(SurgeonError, match=message):
        recipe.main(small, ["optimizer.lr=1e30", "optimizer.warmup_epochs=0"])
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_accumulated_steps_are_counted_as_one(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    recipe.main(small, ["train.accumulate=3", "train.epochs=1", "train.clip_norm=1.0"])
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 2]  # 4 batches: 3 and 1


def test_tensorboard_events_are_written(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    report = recipe.main(small, ["train.epochs=1", "log.trackers=tensorboard"])
    assert [path for path in report["files"] if "events.out.tfevents" in path]


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return sound(tmp_path / "flowers")


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


def test_an_odd_folder_end_to_end(recipe: ModuleType, small: str, flowers: Path, tmp_path: Path) -> None:
    """The delivered accuracy again, by stock timm from the delivered folder alone, and by ONNX Runtime."""
    import onnxruntime
    from timm.data import create_transform, resolve_data_config

    for name in ("daisy", "rose"):
        odd(flowers / "train" / name)
        broken(flowers / "train" / name)
    clutter(flowers)
    options = [*FOLDER, f"data.root={flowers}", "data.broken=skip", "deliver.onnx=true", "train.epochs=2"]
    report = recipe.main(small, options)
    assert report["samples"] == 4

    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    names = model.pretrained_cfg["label_names"]
    session = onnxruntime.InferenceSession(str(tmp_path / "run" / "model.onnx"))
    told = session.get_modelmeta().custom_metadata_map
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        noted = file.metadata()
    assert names == json.loads(noted["classes"]) == json.loads(told["labels"]) == ["daisy", "rose"]
    for key in ("input_size", "crop_pct", "mean", "std"):
        assert json.loads(noted[key]) == json.loads(told[key])
    assert noted["interpolation"] == told["interpolation"] == model.pretrained_cfg["interpolation"]
    hits = ort = 0
    for path in (flowers / "val").rglob("*.png"):
        with Image.open(path) as image:
            batch = transform(image.convert("RGB")).unsqueeze(0)
        with torch.no_grad():
            hits += names[int(model(batch).argmax())] == path.parent.name
        (scores,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        ort += names[int(scores.argmax())] == path.parent.name
    assert 25 * hits == pytest.approx(report["stock"]["top1"])
    assert 25 * ort == pytest.approx(report["onnx"]["top1"])
    written = {str(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert written == set(report["files"])
