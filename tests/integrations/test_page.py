"""docs/integrations.md: its code runs as it is printed, with the real libraries, and does what it says."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet

import surgeon
from surgeon._gating.gated import is_gated

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
SNIPPETS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def ran(library: str, **given: Any) -> dict[str, Any]:
    """What the page's code for a library leaves, begun with those names."""
    scope = {"surgeon": surgeon, "torch": torch, **given}
    exec(compile(SNIPPETS[library], "integrations.md", "exec"), scope)  # noqa: S102 - our own page
    return scope


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small() -> nn.Module:
    torch.manual_seed(0)
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def batches(side: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, 3, side, side), torch.arange(8) % 3), 4)


def same(plain: nn.Module, gated: nn.Module, x: Any, near: float = 1e-5) -> None:
    """Evaluation is that of the gated model, whose training it has been through, without a gate."""
    assert not is_gated(plain) and is_gated(gated)
    with torch.no_grad():
        one, two = plain.eval()(x), gated.eval()(x)
    torch.testing.assert_close(one, two, rtol=near, atol=near)


def moved(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether training has changed weights inside branches."""
    blocks = tuple(gate.block for gate in surgeon.status(model))
    after = model.state_dict()
    return any(
        not torch.equal(after[key], value)
        for key, value in before.items()
        if key.startswith(blocks) and value.is_floating_point()
    )


def test_transformers() -> None:
    pytest.importorskip("transformers")
    from hf import Images, arguments, images, network

    model = network()
    before = copy.deepcopy(model.state_dict())
    scope = ran("transformers", model=model, args=arguments(Path("out")), images=Images())
    assert moved(before, model)
    with torch.no_grad():
        ours, theirs = (m.eval()(images()).logits for m in (model, scope["plain"]))
    torch.testing.assert_close(theirs, ours)
    assert not is_gated(scope["plain"])


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = small()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    module = Module()
    before = copy.deepcopy(module.network.state_dict())
    scope = ran("lightning", module=module, loader=batches())
    assert moved(before, module.network)
    same(scope["plain"], module.network, torch.randn(2, 3, 16, 16))
    assert Path("out/plain/model.onnx").exists()


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = small()
    before = copy.deepcopy(model.state_dict())
    scope = ran(
        "accelerate",
        accelerator=accelerate.Accelerator(cpu=True),
        model=model,
        loader=batches(),
        optimizer=torch.optim.SGD(model.parameters(), 0.01),
        loss=nn.CrossEntropyLoss(),
    )
    assert moved(before, model) and scope["gates"].done == 2
    same(scope["plain"], model, torch.randn(2, 3, 16, 16))
    assert Path("out/state").is_dir()


def steps(losses: Any, model: nn.Module) -> None:
    """Two steps of training."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.train().parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        losses().backward()
        optimizer.step()
    assert moved(before, model)


def test_segmentation_models() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    x, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64))
    scope = ran(
        "segmentation_models_pytorch", train=lambda model, loss: steps(lambda: loss(model(x), masks), model)
    )
    assert len(surgeon.status(scope["model"])) == 8
    same(smp.from_pretrained("out/unet"), scope["model"], x)


def test_torchvision_detection() -> None:
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    images = list(torch.rand(2, 3, 96, 96))
    scope = ran(
        "torchvision",
        train=lambda model: steps(lambda: sum(model(images, [boxes, boxes]).values()), model),
    )
    assert len(surgeon.status(scope["model"])) == 10
    same(scope["plain"], scope["model"], images)


def test_open_clip() -> None:
    pytest.importorskip("open_clip")
    images, words = torch.randn(2, 3, 224, 224), torch.randint(1, 400, (2, 77))
    scope = ran("open_clip", train=lambda model, loss: steps(lambda: loss(*model(images, words)), model))
    model = scope["model"]
    assert {gate.block.split(".")[0] for gate in surgeon.status(model)} == {"visual"}
    assert len(surgeon.status(model)) == 24
    same(scope["plain"].visual, model.visual, images)


def test_ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    pytest.importorskip("ultralytics")
    from PIL import Image

    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / split / f"{i}.png")
            (tmp_path / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text(
        f"{{path: {tmp_path}, train: images/train, val: images/val, names: {{0: thing}}}}"
    )
    settings = {"epochs": 2, "batch": 2, "workers": 0, "device": "cpu", "plots": False, "project": "runs"}
    scope = ran("ultralytics", size=64, settings=settings | {"project": str(tmp_path / "runs")})
    trained = scope["YOLO"](scope["yolo"].trainer.best).model.float()
    assert len(surgeon.status(trained)) == 6  # the bottlenecks with a shortcut
    saved = Path("plain.pt").read_bytes()
    assert b"surgeon" not in saved
    same(
        scope["YOLO"]("plain.pt").model.float(), trained, torch.rand(1, 3, 64, 64), near=1e-2
    )  # saved in half


def test_the_page_has_code_for_each_library() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert len(SNIPPETS) == 7
    assert all(any(name.startswith(library[:12]) for name in tested) for library in SNIPPETS)
