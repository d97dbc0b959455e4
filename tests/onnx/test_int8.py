"""int8: settings are chosen on some images and measured on others; too few answers kept is a refusal."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import surgeon
from surgeon._onnx.int8 import Int8Report, to_int8
from surgeon.cli.main import main
from surgeon.errors import UsageError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x).relu()


class Colours(nn.Module):
    """Tells which of three channels is brightest; it says so loudly, so int8 can keep it."""

    def __init__(self, spread: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.block = Block()
        self.fc = nn.Linear(8, 3)
        self.num_classes = 3
        with torch.no_grad():
            for layer in (self.stem, self.block.conv, self.fc):
                layer.weight.mul_(0.01)
                layer.bias.zero_()
            self.stem.weight[:3, :, 0, 0] = torch.eye(3)
            self.fc.weight[:, :3] = torch.eye(3)
            self.fc.bias += torch.tensor([spread, -spread, 0.0]) - torch.tensor([1.0, -1.0, 0.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class Far(Colours):
    """The answer hangs on the thousandth part of a large sum, which 8 bits do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.bias.data[:3] = 1000.0


def images(count: int) -> torch.Tensor:
    torch.manual_seed(0)
    made = torch.rand(count, 3, 16, 16) * 0.1
    for number in range(count):
        made[number, number // 2 % 3] += 0.5
    return made


def exported(model: nn.Module, folder: Path) -> Path:
    surgeon.export(model.eval(), folder / "float.onnx", example=images(2), metadata={"labels": "abc"})
    return folder / "float.onnx"


def test_the_file_is_the_network_in_whole_numbers(tmp_path: Path) -> None:
    source, place = exported(Colours(), tmp_path), tmp_path / "int8.onnx"
    report = to_int8(source, place, [images(24)[:16], images(24)[16:]])
    assert report.ok
    assert (report.agreement, report.calibrated, report.measured) == (1.0, 12, 12)
    assert len(report.trials) >= 5
    held = onnx.load(place)
    kinds = {tensor.data_type for tensor in held.graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in held.graph.node}
    said = {entry.key: entry.value for entry in held.metadata_props}
    assert said["labels"] == "abc"
    assert said["int8"] == report.chosen
    batch = images(24)  # an oracle: ONNX Runtime by itself, on what was measured
    run = [
        onnxruntime.InferenceSession(str(path)).run(None, {"input": batch[1::2].numpy()})[0]
        for path in (place, source)
    ]
    assert (run[0].argmax(1) == run[1].argmax(1)).mean() == report.agreement
    assert not np.array_equal(run[0], run[1])
    for words in ("agreement  100.0%: 12 of 12", "latency", "MB", "per channel, 8 bits, MinMax"):
        assert words in str(report)


def test_layers_that_lose_most_stay_in_float(tmp_path: Path) -> None:
    report = to_int8(exported(Far(), tmp_path), tmp_path / "int8.onnx", [images(24)])
    assert any("in float" in trial.settings for trial in report.trials)
    assert max(trial.agreement for trial in report.trials[:5]) < 0.99


def test_what_it_cannot_measure_is_refused(tmp_path: Path) -> None:
    source = exported(Colours(), tmp_path)
    with pytest.raises(UsageError, match=r"--int8 needs images to calibrate with and others .*, not 3"):
        to_int8(source, tmp_path / "int8.onnx", [images(3)])
    surgeon.export(Block().eval(), tmp_path / "maps.onnx", example=torch.zeros(2, 8, 16, 16))
    with pytest.raises(UsageError, match=r"--int8 compares answers; outputs of shape .* are no scores"):
        to_int8(tmp_path / "maps.onnx", tmp_path / "int8.onnx", [torch.rand(4, 8, 16, 16)])


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images(16)):
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colours.py").write_text(
        "import sys\nsys.path.insert(0, " + repr(str(Path(__file__).parent)) + ")\n"
        "from test_int8 import Colours, Far\n"
    )
    return folder


def test_the_command_writes_or_refuses(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["export", "colours:Colours", "--input-size", "3x16x16", "--int8", str(photos)]
    done = CliRunner().invoke(main, [*line, "-o", "int8.onnx"])
    assert done.exit_code == 0, done.stderr
    assert "agreement  100.0%: 8 of 8 other images answered as in float" in done.stdout
    assert Path("int8.onnx").exists()

    import surgeon._onnx.int8 as room

    answers = room._compared
    monkeypatch.setattr(room, "_compared", lambda found, reference: (0.9, answers(found, reference)[1]))
    done = CliRunner().invoke(main, [*line, "-o", "bad.onnx"])
    assert done.exit_code == 3
    assert "int8 keeps 90.0% of the answers, 99% are asked for. Nothing was written" in done.stderr
    assert "agreement  90.0%" in done.stdout
    assert not Path("bad.onnx").exists()
    assert sorted(path.name for path in Path().iterdir() if path.suffix == ".onnx") == ["int8.onnx"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--fp16"], "--int8 and --fp16 are two forms of one file"),
        (["--int8", "nowhere"], "nowhere is no folder"),
    ],
)
def test_usage(photos: Path, more: list[str], told: str) -> None:
    line = ["export", "colours:Colours", "--input-size", "3x16x16", "--int8", str(photos), "-o", "m.onnx"]
    done = CliRunner().invoke(main, [*line, *more])
    assert done.exit_code == 2
    assert told in done.stderr


def test_a_report_knows_its_verdict() -> None:
    report = Int8Report((), "", 1, 100, 0.99, 0.99, (1, 1), (1.0, 1.0), 1)
    assert report.ok
    assert not Int8Report((), "", 1, 100, 0.98, 0.99, (1, 1), (1.0, 1.0), 1).ok
