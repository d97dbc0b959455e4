"""Zeros before a max pool stay zeros in ONNX Runtime, whose optimiser would take them for -inf."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import surgeon
from surgeon._onnx import exporter, padding
from surgeon._onnx.hygiene import node_counts
from surgeon._onnx.signature import signature
from surgeon.errors import ParityError

pytestmark = pytest.mark.usefixtures("one_registry")

ORT = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
IMAGES = torch.zeros(2, 3, 8, 8)


def stem(pad, pool):
    """Without an activation, so that whole windows of the pool are negative."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 1)
    nn.init.constant_(conv.bias, -4.0)
    return nn.Sequential(conv, pad, pool).eval()


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2),
        pytest.param(nn.MaxPool2d(2, 1, ceil_mode=True), marks=pytest.mark.slow),
        pytest.param(nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), marks=pytest.mark.slow),
    ],
)
def test_zeros_are_kept(pool, tmp_path):
    report = surgeon.export(stem(nn.ZeroPad2d(1), pool), tmp_path / "m.onnx", example=IMAGES)
    assert report.parity.worst.relative < 1e-6
    assert report.nodes == {"Conv": 1, "Pad": 1, "MaxPool": 1}


def test_it_is_the_sign_that_keeps_them(tmp_path):
    surgeon.export(stem(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)), tmp_path / "m.onnx", example=IMAGES)
    graph = ir.load(tmp_path / "m.onnx").graph
    (pad,) = (node for node in graph if node.op_type == "Pad")
    with_what = pad.inputs[2].const_value.numpy()
    assert with_what == 0 and np.signbit(with_what)


@pytest.mark.skipif(ORT >= (1, 32), reason="ONNX Runtime 1.32 no longer makes this mistake")
def test_without_that_they_are_lost(tmp_path, monkeypatch):
    """Negative control. The room can go when surgeon's files no longer meet a runtime before 1.32."""
    monkeypatch.setattr(exporter, "keep_zeros", lambda graph: 0)
    with pytest.raises(ParityError, match="one of its optimisations is at fault and not the file"):
        surgeon.export(stem(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)), tmp_path / "m.onnx", example=IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"dtype": "float16"}, {"optimize": "basic"}, {"optimize": "extended"}])
def test_zeros_are_kept_in_other_forms(how, tmp_path):
    model = stem(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2))
    report = surgeon.export(model, tmp_path / "m.onnx", example=IMAGES, **how)
    assert report.nodes["Pad"] == 1 and report.parity.worst.relative < (2e-3 if "dtype" in how else 1e-6)


@pytest.mark.parametrize(
    ("pad", "pool"),
    [
        (nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)),
        (nn.ZeroPad2d(1), nn.AvgPool2d(3)),
        (nn.ConstantPad2d(1, -float("inf")), nn.MaxPool2d(3)),
        (nn.ReflectionPad2d(1), nn.MaxPool2d(3)),
    ],
)
def test_other_pads_are_as_they_were(pad, pool, monkeypatch):
    monkeypatch.setattr(exporter, "keep_zeros", lambda graph: 0)
    model = stem(pad, pool)
    graph = exporter.to_onnx(model, signature(model, IMAGES), opset=None, dynamic_batch=True)
    assert "Pad" in node_counts(graph) or isinstance(pool, nn.Conv2d)  # the exporter's own fusion
    assert padding.keep_zeros(graph) == 0
