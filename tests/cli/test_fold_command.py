"""``surgeon fold``: from a checkpoint trained by the paper's rule to one of a stock model."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from click.testing import CliRunner, Result
from folds import zoo_randomised
from torch import Tensor, nn

import surgeon
from surgeon._checkpoint import save_checkpoint
from surgeon._container import read_metadata
from surgeon._source import load_model
from surgeon.cli.main import main

TIMM = "timm:test_resnet"
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def trained(spec: str = TIMM, seed: int = 0, **gating: Any) -> nn.Module:
    """A model as it comes out of a training: gated, with weights of its own."""
    torch.manual_seed(seed)
    model = zoo_randomised(load_model(spec, num_classes=10)).float()
    if gating:
        surgeon.apply(model, example=X, **gating)
    return model.eval()


def stock_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "extra" not in name}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def agrees(model: nn.Module, state: dict[str, Tensor], expected: Tensor) -> bool:
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        found = model.eval()(X)
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        (TIMM, lambda: timm.create_model("test_resnet", num_classes=10)),
        pytest.param(
            "torchvision:resnet18",
            lambda: torchvision.models.resnet18(num_classes=10),
            marks=pytest.mark.slow,
        ),
    ],
)
@torch.no_grad()
def test_a_checkpoint_from_elsewhere(spec: str, make: Any, folder: Path) -> None:
    """A plain state dict, trained by the paper's rule in other code: model, schedule and rate are given."""
    model = trained(spec, schedule="linear", drop_rate=0.4, scaling="paper")
    expected = model(X)
    state = stock_state(model)
    torch.save({"epoch": 90, "state_dict": {f"module.{k}": v for k, v in state.items()}}, "ckpt.pth")
    line = ("fold", "ckpt.pth", "--model", spec, "--num-classes", 10, "--img-size", 64, "-o", "m.safetensors")
    done = run(*line, "--schedule", "linear", "--drop-rate", 0.4, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [gate["scale"] for gate in found["gates"]] == [g.scale for g in surgeon.status(model).gates]
    assert found["error"] < 1e-5
    assert agrees(make(), safetensors.torch.load_file("m.safetensors"), expected)
    assert not agrees(make(), state, expected), "the scales have no effect"
    noted = read_metadata("m.safetensors")
    assert (noted["model"], noted["schedule"], noted["drop_rate"]) == (spec, "linear", "0.4")
    assert noted["weights"] == "plain"
    again = run("fold", "m.safetensors", "-o", "n.safetensors")
    assert again.exit_code == 4
    assert "the weights in m.safetensors need no evaluation scales" in again.stderr
    assert not Path("n.safetensors").exists()


@pytest.mark.parametrize("keep_eval", [True, False])
@torch.no_grad()
def test_a_checkpoint_of_surgeon_knows_itself(keep_eval: bool, folder: Path) -> None:
    model = trained(schedule=[0.1, 0.2, 0.0, 0.3], scaling="paper", keep_eval=keep_eval, exclude=[])
    noted = {
        "model": TIMM,
        "model_args": {"num_classes": 10},
        "input_size": [3, 64, 64],
        "classes": ["a"] * 10,
    }
    save_checkpoint(model, "gated.safetensors", noted)
    done = run("fold", "gated.safetensors", "-o", "m.safetensors")
    assert done.exit_code == 0, done.stderr
    assert "3 gates folded, scales 0.7 to 0.9, relative error" in done.stdout
    assert "gated.safetensors -> m.safetensors" in done.stdout
    fresh = timm.create_model("test_resnet", num_classes=10)
    assert agrees(fresh, safetensors.torch.load_file("m.safetensors"), model(X))
    assert json.loads(read_metadata("m.safetensors")["classes"]) == ["a"] * 10
    loaded = load_model(TIMM, checkpoint="m.safetensors", num_classes=10).eval()
    torch.testing.assert_close(loaded(X), model(X))


@torch.no_grad()
def test_divided_weights_of_torch_need_the_model_alone(folder: Path) -> None:
    model = trained(scaling="paper", keep_eval=True)
    torch.save(dict(model.state_dict()), "gated.pth")
    line = (
        "fold",
        "gated.pth",
        "--model",
        TIMM,
        "--num-classes",
        10,
        "--img-size",
        64,
        "-o",
        "m.safetensors",
    )
    done = run(*line, "--drop-rate", 0.3)
    assert done.exit_code == 2
    assert "divided by the scales of its gates, which it notes" in done.stderr
    assert run(*line).exit_code == 0
    fresh = timm.create_model("test_resnet", num_classes=10)
    assert agrees(fresh, safetensors.torch.load_file("m.safetensors"), model(X))


@pytest.mark.slow
@torch.no_grad()
def test_export_and_verify_take_divided_weights_too(folder: Path) -> None:
    model = trained(scaling="paper", keep_eval=True)
    save_checkpoint(model, "gated.safetensors", {"model": TIMM, "model_args": {"num_classes": 10}})
    line = (TIMM, "--checkpoint", "gated.safetensors", "--img-size", 64)
    assert run("export", *line, "-o", "m.onnx").exit_code == 0
    plain = save_checkpoint(surgeon.fold(model), "plain.safetensors", {"model": TIMM})
    done = run("verify", "m.onnx", TIMM, "--checkpoint", plain, "--num-classes", 10, "--img-size", 64)
    assert done.exit_code == 0, done.stderr


def test_inverted_weights_need_no_scales(folder: Path) -> None:
    save_checkpoint(
        trained(schedule="linear"), "m.safetensors", {"model": TIMM, "model_args": {"num_classes": 10}}
    )
    torch.save(trained().state_dict(), "m.pth")
    for line in (
        ("m.safetensors", "--scaling", "inverted"),
        ("m.pth", "--model", TIMM, "--num-classes", 10, "--scaling", "inverted", "--drop-rate", 0.2),
    ):
        done = run("fold", *line, "-o", "n.safetensors", "--json")
        assert done.exit_code == 4, done.stderr
        assert json.loads(done.stdout)["exit_code"] == 4
        assert not Path("n.safetensors").exists()


# Bad input: said in one line, and nothing is left behind.


def _state() -> dict[str, Tensor]:
    return stock_state(trained())


def corrupt(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + bytes(range(256)) * 40)


def truncated(path: Path) -> None:
    torch.save(_state(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def foreign(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))


class Code:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": _state(), "extra": Code()}))


def another(path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), path)


def other_classes(path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path)


def not_finite(path: Path) -> None:
    state = _state()
    state["layer1.0.bn2.weight"][3] = float("nan")
    state["fc.bias"][:2] = float("inf")
    torch.save(state, path)


def no_tensors(path: Path) -> None:
    torch.save({"epoch": 3}, path)


def empty(path: Path) -> None:
    path.touch()


def absent(path: Path) -> None:
    assert not path.exists()


BAD = {
    corrupt: "will not read the checkpoint",  # it may have been a pickle once
    truncated: "cannot read the checkpoint .*truncated or no file of torch",
    foreign: "cannot read the checkpoint .*no file of torch",
    with_code: "will not read the checkpoint .*loading it could run code",
    another: "does not fit ResNet: .*It holds another architecture",
    other_classes: "does not fit ResNet: .*Make the model with num_classes=7",
    not_finite: r"not finite: layer1\.0\.bn2\.weight \(1 of \d+\), fc\.bias \(2 of 10\)",
    no_tensors: "it holds no tensors by name",
    empty: "the file is empty",
    absent: "it does not exist",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_bad_checkpoints(spoil: Any, folder: Path) -> None:
    spoil(folder / "ckpt.pth")
    before = set(Path().iterdir())
    line = (
        "fold",
        "ckpt.pth",
        "--model",
        TIMM,
        "--num-classes",
        10,
        "--drop-rate",
        0.5,
        "-o",
        "m.safetensors",
    )
    done = run(*line)
    assert done.exit_code == 1
    assert done.stdout == ""
    [said] = done.stderr.splitlines()
    assert re.search(BAD[spoil], said), said
    assert set(Path().iterdir()) == before


USAGE = {
    ("ckpt.pth", "-o", "m.safetensors"): "does not say of which model it is; name it with --model",
    (
        "ckpt.pth",
        "--model",
        TIMM,
        "--num-classes",
        "10",
        "-o",
        "m.safetensors",
    ): "does not say with which survival",
    ("ckpt.pth", "--model", TIMM, "--drop-rate", "0.5", "-o", "m.onnx"): "stock checkpoints are safetensors",
    ("ckpt.pth", "--model", TIMM, "--drop-rate", "0.5", "-o", "old.safetensors"): "--overwrite",
    (
        "ckpt.pth",
        "--model",
        TIMM,
        "--num-classes",
        "10",
        "--drop-rate",
        "1",
        "-o",
        "m.safetensors",
    ): "drop_rate",
    ("ckpt.pth", "--model", "timm:resnet_5o", "--drop-rate", "0.5", "-o", "m.safetensors"): "has no model",
}


@pytest.mark.parametrize("line", USAGE)
def test_usage(line: tuple[str, ...], folder: Path) -> None:
    torch.save(_state(), "ckpt.pth")
    Path("old.safetensors").write_bytes(b"old")
    done = run("fold", *line)
    assert done.exit_code == 2
    assert USAGE[line] in done.stderr
    assert sorted(map(str, Path().iterdir())) == ["ckpt.pth", "old.safetensors"]
    assert Path("old.safetensors").read_bytes() == b"old"


def test_a_scale_that_no_weight_takes_is_an_error(folder: Path) -> None:
    """A stock model cannot hold it."""
    (folder / "nets_for_folds.py").write_text(
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.f = nn.Sequential(nn.Conv2d(3, 3, 1), nn.SiLU())\n"
        "    def forward(self, x):\n"
        "        return x + self.f(x)\n"
        "def net():\n"
        "    return nn.Sequential(Block(), nn.Conv2d(3, 3, 1))\n"
    )
    torch.save(load_model("nets_for_folds:net").state_dict(), "ckpt.pth")
    done = run("fold", "ckpt.pth", "--model", "nets_for_folds:net", "--drop-rate", 0.5, "-o", "m.safetensors")
    assert done.exit_code == 1
    assert (
        "no stock model has these weights: 1 gates need a multiplication (0.add: the branch ends in silu"
        in (done.stderr)
    )
    assert not Path("m.safetensors").exists()


def test_a_full_disk_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(_state(), "ckpt.pth")
    Path("m.safetensors").write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    line = ("fold", "ckpt.pth", "--model", TIMM, "--num-classes", 10, "--img-size", 64, "--drop-rate", 0.5)
    done = run(*line, "-o", "m.safetensors", "--overwrite")
    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert Path("m.safetensors").read_bytes() == b"old"
    assert sorted(map(str, Path().iterdir())) == ["ckpt.pth", "m.safetensors"]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_under_the_name(folder: Path) -> None:
    torch.save(_state(), "ckpt.pth")
    code = (
        "import os, safetensors.torch, signal\n"
        "real = safetensors.torch.save_file\n"
        "def halfway(state, path, noted):\n"
        "    real(state, path, noted)\n"
        "    open(path, 'r+b').truncate(1000)\n"
        "    open('reached', 'w').close()\n"
        "    signal.pause()\n"
        "safetensors.torch.save_file = halfway\n"
        "from surgeon.cli.main import main\n"
        f"main(['fold', 'ckpt.pth', '--model', '{TIMM}', '--num-classes', '10', '--img-size', '64',"
        " '--drop-rate', '0.5', '-o', 'm.safetensors'])\n"
    )
    home = str(Path(surgeon.__file__).parents[1])
    started = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": home})
    for _ in range(600):
        if Path("reached").exists():
            break
        time.sleep(0.1)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert Path("reached").exists()
    assert not Path("m.safetensors").exists()


def test_help() -> None:
    done = run("fold", "--help")
    assert done.exit_code == 0
    assert "surgeon fold ckpt.pth --model timm:resnet50 --schedule linear --drop-rate 0.5" in done.stdout
    assert "Exit codes:" in done.stdout
    assert "  --checkpoint" not in done.stdout
