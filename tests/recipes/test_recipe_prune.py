"""A network that is shortened before it is trained: what goes, and what its checkpoint says of that."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors import safe_open

import surgeon
from surgeon import _recipes
from surgeon.cli.main import main
from surgeon.errors import UsageError

SMALL = {
    "model": {"name": "timm:resnet18", "kwargs": {"layers": [2, 2, 1, 1], "channels": [8, 8, 8, 8]}},
    "data": {"kind": "fake", "samples": 16, "image_size": 32},
    "optimizer": {"lr": 0.05},
    "train": {"epochs": 2, "batch_size": 4},
    "prune": {"depth": 0.5, "images": 8},
    "deliver": {"onnx": False, "plot": False},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return _recipes.load("finetune")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL | {"output": str(tmp_path / "run")}))
    return str(path)


def test_half_of_the_branches_are_gone_in_all_that_is_delivered(
    recipe: ModuleType, small: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    report = recipe.main(small, ["train.distill=1", "log.probe=true", "train.epochs=1"])
    assert len(report["deleted"]) == 3 == report["gates"] and report["stock"]["disagree"] == 0
    assert json.loads((run / "pruned.json").read_text()) == report["deleted"]
    with safe_open(run / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["pruned"]) == report["deleted"]
        kept = set(file.keys())
    whole = timm.create_model("resnet18", num_classes=4, **SMALL["model"]["kwargs"])  # type: ignore[index]
    example = torch.zeros(2, 3, 32, 32)
    shorter = surgeon.prune(whole, report["deleted"], example=example)
    assert kept == shorter.state_dict().keys() < whole.state_dict().keys()
    assert not (run / "config.json").exists()  # timm would make the whole network of it
    card = (run / "README.md").read_text()
    assert f"surgeon.prune(model, {report['deleted']})" in card and "without 3 branches" in card
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (probed,) = [line for line in lines if line["kind"] == "probe"]
    assert sum(key.endswith("/gradient") for key in probed) == 3
    weights = ["--checkpoint", str(run / "model.safetensors"), "--num-classes", "4"]
    done = CliRunner().invoke(main, ["inspect", "timm:resnet18", "--json", *weights])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["gates"]) == 3


def test_a_run_that_goes_on_deletes_the_same(recipe: ModuleType, small: str, tmp_path: Path) -> None:
    first = recipe.main(small, ["train.epochs=1"])
    again = recipe.main(small, ["train.epochs=2", "resume=true"])
    assert again["deleted"] == first["deleted"] and again["stock"]["disagree"] == 0


@pytest.mark.parametrize("depth", [0, 1, 1.5])
def test_a_depth_out_of_range_is_refused_by_its_key(recipe: ModuleType, small: str, depth: float) -> None:
    with pytest.raises(UsageError, match=r"prune\.depth: "):
        recipe.main(small, [f"prune.depth={depth}"])
