"""timm's and torchvision's own train.py with the two lines of docs/integrations.md in them.

The scripts are in no wheel: SURGEON_TIMM_TRAIN and SURGEON_TORCHVISION_TRAIN say where they are, with the
files beside them that they import.
"""

import os
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from launch import HERE, launch
from PIL import Image

import surgeon
from surgeon._gating.gated import is_gated

PAGE = (HERE.parents[1] / "docs" / "integrations.md").read_text()
LINES = re.search(r"```python\n(import surgeon\n.*?)```", PAGE, re.DOTALL)[1].replace("\n\n", "\n")  # type: ignore[index]


def script(variable: str, call: str, folder: Path) -> str:
    """The script with the two lines behind the statement that makes the model, written into ``folder``."""
    place = os.environ.get(variable)
    if not place:
        pytest.skip(f"{variable} does not say where the script is")
    for other in Path(place).parent.glob("*.py"):
        (folder / other.name).write_text(other.read_text())
    text = Path(place).read_text()
    statement = rf"^( +)model = {re.escape(call)}(?:[^\n]*\)\n|[^\n]*\n(?:.*?\n)??\1\)\n)"
    found = re.search(statement, text, re.MULTILINE | re.DOTALL)
    assert found, f"{place} makes no model by {call}"
    two = textwrap.indent(LINES + "print('gates', len(surgeon.status(model)))\n", found[1])
    path = folder / "train.py"
    told = text[: found.end()] + two + text[found.end() :]
    path.write_text(told.replace("device_ids=[device]", "device_ids=None"))  # several processes on the CPU
    return str(path)


def photos(folder: Path) -> Path:
    for split in ("train", "val"):
        for kind in "abcde":
            (folder / "data" / split / kind).mkdir(parents=True)
            for i in range(2):
                noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / "data" / split / kind / f"{i}.png")
    return folder / "data"


@pytest.mark.parametrize("ranks", [1, 2])
def test_timm(ranks: int, tmp_path: Path) -> None:
    """With an average (EMA), and resumed: a stock checkpoint comes out."""
    path = script("SURGEON_TIMM_TRAIN", "create_model(", tmp_path)
    options = (
        f"--data-dir {photos(tmp_path)} --model resnet10t --num-classes 5 --img-size 64 -b 2 -j 0 "
        f"--device cpu --no-prefetcher --model-ema --epochs 1 --warmup-epochs 0 "
        f"--output {tmp_path / 'out'} --experiment e"
    ).split()
    assert launch(path, tmp_path, ranks, *options).count("gates 4") == ranks
    last = tmp_path / "out" / "e" / "last.pth.tar"
    saved = torch.load(last, weights_only=False)
    for key in ("state_dict", "state_dict_ema"):
        timm.create_model("resnet10t", num_classes=5).load_state_dict(saved[key])
    if ranks == 1:
        again = [*options[:-1], "again", "--resume", str(last)]
        again[again.index("--epochs") + 1] = "2"
        launch(path, tmp_path, ranks, *again)
        assert (tmp_path / "out" / "again" / "last.pth.tar").exists()


def test_torchvision(tmp_path: Path) -> None:
    """One process: its own several need CUDA."""
    path = script("SURGEON_TORCHVISION_TRAIN", "torchvision.models.", tmp_path)
    options = (
        f"--data-path {photos(tmp_path)} --model resnet18 --device cpu -b 2 -j 0 --epochs 1 --model-ema "
        f"--val-resize-size 64 --val-crop-size 64 --train-crop-size 64 --output-dir {tmp_path / 'out'}"
    ).split()
    assert "gates 8" in launch(path, tmp_path, 1, *options)
    saved = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=False)
    stock = torchvision.models.resnet18(num_classes=5)
    stock.load_state_dict(saved["model"])
    assert not is_gated(stock) and surgeon.find(stock, torch.zeros(2, 3, 64, 64))
