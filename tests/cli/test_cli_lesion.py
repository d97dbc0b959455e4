"""``surgeon lesion`` and ``export --depth``: a folder of images, and the file of the shorter network."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

import surgeon
from surgeon._checkpoint import save_checkpoint
from surgeon._pruning.choose import Costs
from surgeon.cli.main import main

pytest.importorskip("matplotlib")

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.f(x)


class Net(nn.Module):
    """Mean colour through three blocks: the largest channel is the class."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block() for _ in range(4)])
        self.head = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def net() -> nn.Module:
    return Net()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three colours, a checkpoint that tells them apart, and the network as an importable file."""
    root, noise = tmp_path_factory.mktemp("lesion"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = np.clip(np.array(colour) + noise.normal(0, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    torch.manual_seed(0)
    model = Net()
    model.head.weight.data = torch.eye(3)[[2, 1, 0]]  # blue, green, red
    save_checkpoint(model, root / "net.safetensors")
    return root


MODEL = [f"{__name__}:net", "--input-size", "3x16x16"]


def surgeon_command(work: Path, *words: str) -> Result:
    given = [words[0], *MODEL, "--checkpoint", str(work / "net.safetensors"), *words[1:]]
    return CliRunner().invoke(main, given)


def test_lesion_of_labelled_images(work: Path) -> None:
    images = ["--data", str(work / "images"), "--batch-size", "4"]
    done = surgeon_command(
        work, "lesion", *images, "--together", "1,2", "--plot", str(work / "l.png"), "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["labelled"] and found["full"]["accuracy"] == 1.0
    assert [one["name"] for one in found["single"]] == [f"blocks.{i}.add" for i in range(4)]
    assert [row["deleted"] for row in found["curve"]] == [1, 2]
    assert (work / "l.png").read_bytes().startswith(b"\x89PNG")
    said = surgeon_command(work, "lesion", *images, "--limit", "6").stdout
    assert "net: 4 branches; whole network: loss " in said and "100.0%" in said


def test_images_without_labels(work: Path) -> None:
    done = surgeon_command(work, "lesion", "--data", str(work / "images"), "--unlabelled", "--json")
    assert done.exit_code == 0, done.output
    assert not json.loads(done.stdout)["labelled"] and json.loads(done.stdout)["full"]["loss"] < 1e-6


@pytest.mark.parametrize("how", [["--drop-blocks", "blocks.1.add"], ["--depth", "0.75"]])
def test_the_exported_file_is_the_shorter_network(work: Path, how: list[str]) -> None:
    file = work / f"{len(how[1])}.onnx"
    data = ["--data", str(work / "images")] if how[0] == "--depth" else []
    done = surgeon_command(work, "export", "-o", str(file), *how, *data, "--json")
    assert done.exit_code == 0, done.output
    nodes = json.loads(done.stdout)["nodes"]
    assert nodes["Conv"] == 6  # of eight
    model = Net().eval()
    surgeon.load(model, work / "net.safetensors")
    x = torch.rand(2, 3, 16, 16)
    shorter = [surgeon.prune(model, [f"blocks.{i}.add"], example=x)(x) for i in range(4)]
    got = onnxruntime.InferenceSession(file).run(None, {"input": x.numpy()})[0]
    close = [np.allclose(got, one.detach().numpy(), atol=1e-5) for one in shorter]
    assert sum(close) == 1
    assert how[0] == "--depth" or close[1]


def test_messages(work: Path) -> None:
    def said(*words: str) -> str:
        done = surgeon_command(work, *words)
        assert done.exit_code == 2, done.output
        return done.stderr

    assert "give --data FOLDER" in said("lesion")
    assert "is no folder" in said("lesion", "--data", str(work / "nowhere"))
    assert "give --data FOLDER" in said("export", "-o", str(work / "x.onnx"), "--depth", "0.5")
    assert "--together is '1,a'" in said("lesion", "--data", str(work / "images"), "--together", "1,a")
    (work / "empty").mkdir(exist_ok=True)
    assert "no image" in said("lesion", "--data", str(work / "empty"))
    (work / "two" / "a").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(work / "two" / "a" / "0.png")
    assert "1 folders of images and 3 outputs" in said("lesion", "--data", str(work / "two"))


def test_a_budget_in_milliseconds(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: each of four branches takes two of ten milliseconds."""
    costs = Costs(10.0, {f"blocks.{i}.add": 2.0 for i in range(4)})
    monkeypatch.setattr(surgeon, "latency", lambda *_: costs, raising=False)
    monkeypatch.setattr("surgeon._onnx.shorter.timed", lambda *_, **__: ({"shorter": 0.61}, 10.0))
    images = ["--data", str(work / "images")]

    def export(budget: float, *words: str) -> Result:
        file = str(work / "budget.onnx")
        given = [*images, "-o", file, "--overwrite", "--latency-budget", str(budget), *words]
        return surgeon_command(work, "export", *given)

    done = export(6.5, "--json", "--plot", str(work / "budget.png"), "--cache", str(work / "cache.jsonl"))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    told = found["shorter"]
    assert found["nodes"]["Conv"] == 4 and len(told["deleted"]) == 2
    assert (told["whole"]["ms"], told["shorter"]["ms"], told["predicted"]) == (10.0, 6.1, 6.0)
    assert told["whole"]["worth"]["accuracy"] == 1.0 and len(told["lesions"]["curve"][-1]["at_random"]) == 5
    assert (work / "budget.png").read_bytes().startswith(b"\x89PNG") and (work / "cache.jsonl").exists()
    assert "above" not in done.stderr and "above 6.05 ms" in export(6.05).stderr
    assert "within 12 ms; nothing was deleted" in export(12).stderr
    refused = export(1.5)
    assert refused.exit_code == 2 and "2 are left; give that or more" in refused.stderr


def test_what_was_pruned_is_told_beside_the_whole(work: Path) -> None:
    done = surgeon_command(
        work, "export", "-o", str(work / "b.onnx"), "--overwrite", "--drop-blocks", "blocks.1.add"
    )
    assert done.exit_code == 0, done.output
    assert "1 branch of 4 deleted" in done.stdout and "latency, ms" in done.stdout
    assert "without  blocks.1.add" in done.stdout and "accuracy" not in done.stdout  # there is no data
    both = surgeon_command(
        work, "export", "-o", str(work / "c.onnx"), "--drop-blocks", "blocks.1.add", "--depth", "0.5"
    )
    assert both.exit_code == 2 and "give one of --drop-blocks, --depth" in both.stderr
