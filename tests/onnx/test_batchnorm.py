"""Batch norms before linear layers and convolutions: taken in where that is exact, else left."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from blocks import randomise
from torch import nn

from surgeon._onnx import exporter as _exporter
from surgeon._onnx.batchnorm import fuse_batchnorm
from surgeon._onnx.hygiene import node_counts
from surgeon._onnx.signature import signature
from surgeon._onnx.verify import verify

pytestmark = pytest.mark.usefixtures("one_registry")

PIXELS = torch.zeros(2, 4, 6, 6)
ROWS = torch.zeros(2, 4)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def exported(model, example, tmp_path):
    """The graph after fusion, what was fused, and whether it still agrees with the model."""
    graph = _exporter.to_onnx(model, signature(model, example), opset=None, dynamic_batch=True)
    fused = fuse_batchnorm(graph)
    ir.save(graph, tmp_path / "m.onnx")
    report = verify(model, tmp_path / "m.onnx", example=example)
    return node_counts(graph), fused, report.worst.relative


@pytest.mark.parametrize(
    ("layers", "example", "left"),
    [
        ((nn.BatchNorm1d(4), nn.Linear(4, 5)), ROWS, "Gemm"),
        slow((nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False)), ROWS, "Gemm"),
        slow((nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), PIXELS, "Conv"),
        ((nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=False)), PIXELS, "Conv"),
        slow((nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, groups=4)), PIXELS, "Conv"),
    ],
)
def test_taken_in(layers, example, left, tmp_path):
    nodes, fused, relative = exported(randomise(nn.Sequential(*layers)).eval(), example, tmp_path)
    assert fused == 1
    assert set(nodes) == {left}
    assert relative < 1e-6


class Shared(nn.Module):
    """What the norm gives is read twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.norm(x)
        return x + self.conv(x)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)),
        slow(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1))),
        Shared(),
        slow(nn.BatchNorm2d(4)),
    ],
    ids=["padded", "activation", "shared", "alone"],
)
def test_left_alone(model, tmp_path):
    nodes, fused, relative = exported(randomise(model).eval(), PIXELS, tmp_path)
    assert fused == 0
    assert nodes["BatchNormalization"] == 1
    assert relative < 1e-6


def norm_and(layer, **attributes):
    """A hand-made graph: a norm and a layer of one weight behind it."""
    arrays = {name: np.ones(3, np.float32) for name in ("weight", "bias", "mean", "var")}
    values = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    matrix = ir.val("matrix", const_value=ir.tensor(np.ones((3, 3), np.float32), name="matrix"))
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["batch", 3])
    norm = ir.node("BatchNormalization", [x, *values], attributes.pop("norm", {}), name="norm")
    node = ir.node(layer, [norm.outputs[0], matrix], attributes, name="layer")
    graph = ir.Graph([x], node.outputs, nodes=[norm, node], initializers=[*values, matrix], name="made")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("attributes", "fused"),
    [
        ({}, 1),
        ({"transB": 1}, 1),
        ({"alpha": 2.0}, 0),
        ({"beta": 0.0}, 0),
        ({"transA": 1}, 0),
        ({"norm": {"training_mode": 1}}, 0),
    ],
)
def test_forms_of_a_product(attributes, fused):
    model = norm_and("Gemm", **attributes)
    assert fuse_batchnorm(model) == fused
    assert ("BatchNormalization" in node_counts(model)) == (not fused)


def test_numbers_of_both_orders():
    """``W (s x + t) = (W s) x + W t``, weights stored either way round."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(3, 3)).astype(np.float32)
    for attributes, outputs in (({}, matrix.T), ({"transB": 1}, matrix)):
        model = norm_and("Gemm", **attributes)
        values = model.graph.initializers
        given = {
            name: generator.uniform(0.5, 2, 3).astype(np.float32)
            for name in ("weight", "bias", "mean", "var")
        }
        for name, array in (given | {"matrix": matrix}).items():
            values[name].const_value = ir.tensor(array, name=name)
        fuse_batchnorm(model)
        weight, bias = (values[f"layer_{what}"].const_value.numpy() for what in ("weight", "bias"))
        scale = given["weight"] / np.sqrt(given["var"] + 1e-5)
        x = generator.normal(size=3)
        expected = outputs @ (scale * (x - given["mean"]) + given["bias"])
        assert np.allclose((weight if attributes else weight.T) @ x + bias, expected, rtol=1e-5)
