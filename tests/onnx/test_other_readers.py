"""Exported files in the hands of OpenVINO, OpenCV and onnxslim, wherever these are installed."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch

import surgeon

NAMES = ["resnet18", "mobilenetv2_050", "convnext_atto", "vit_tiny_patch16_224"]
BATCH = 2


@pytest.fixture(scope="module", params=NAMES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=10).eval()
    x = torch.randn(BATCH, 3, 224, 224)
    for module in model.modules():  # some begin with zeros, so that branches do nothing
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 1.0  # the statistics are those of one batch
    model.train()(x)
    model.eval()
    surgeon.apply(model, scaling="paper", unit="batch", example=x)
    place = tmp_path_factory.mktemp("onnx") / f"{request.param}.onnx"
    surgeon.export(model, place, example=x, dynamic_batch=False)
    return place, x


def own(place: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(place))
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return found


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max())


def test_openvino(exported: tuple[Path, torch.Tensor]) -> None:
    openvino = pytest.importorskip("openvino")
    place, x = exported
    core = openvino.Core()
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(place)), "CPU", precision)
    assert close(compiled(x.numpy())[0], own(place, x))
    assert not close(compiled(x.flip(3).numpy())[0], own(place, x))


def test_opencv(exported: tuple[Path, torch.Tensor]) -> None:
    cv2 = pytest.importorskip("cv2")
    place, x = exported
    network = cv2.dnn.readNetFromONNX(str(place))
    network.setInput(x.numpy())
    assert close(network.forward(), own(place, x))


def test_onnxslim(exported: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    onnxslim = pytest.importorskip("onnxslim")
    place, x = exported
    slim = tmp_path / "slim.onnx"
    onnxslim.slim(str(place), str(slim))
    assert close(own(slim, x), own(place, x))
