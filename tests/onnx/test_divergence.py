"""The node at which a graph and a model part: spoiled on purpose, one weight or operator at a time."""

import functools

import numpy as np
import onnx_ir as ir
import pytest
import torch
from blocks import randomise
from torch import nn

from surgeon._onnx import exporter as _exporter
from surgeon._onnx.signature import signature
from surgeon._onnx.verify import verify

IMAGES = torch.zeros(2, 3, 8, 8)


class Block(nn.Module):
    """A convolution with a fused norm, and a token mixer whose products and sums the exporter splits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm(4)
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 4)
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = x + torch.relu(self.norm(self.conv(x)))
        y = self.layer_norm(x.permute(0, 2, 3, 1))
        y = self.fc2(nn.functional.gelu(self.fc1(y))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def made():
    from torch.onnx._internal.exporter import _registration

    kept = functools.cache(_registration.ONNXRegistry.from_torchlib)
    model = randomise(Net()).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(kept))
        graph = _exporter.to_onnx(model, signature(model, IMAGES), opset=None, dynamic_batch=True)
    return model, graph


def spoiled(graph, name):
    """A graph with one value of one weight off, and the node that reads it."""
    copied = graph.clone()
    value = copied.graph.initializers[name]
    array = value.const_value.numpy().copy()
    array.flat[array.size // 2] += 5
    value.const_value = ir.tensor(array, name=name)
    return copied, next(iter(value.uses())).node.name


def weights(graph):
    return [v.name for v in graph.graph.initializers.values() if v.dtype is ir.DataType.FLOAT and v.shape]


def save(graph, tmp_path):
    ir.save(graph, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def anonymous(graph):
    """As from another exporter: no names of modules, weights or values."""
    for index, node in enumerate(graph.graph):
        node.metadata_props.clear()
        node.name = f"n{index}"
    for index, value in enumerate(list(graph.graph.initializers.values())):
        value.name = f"w{index}"
    return graph


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("index", range(0, 26, 5))
def test_a_spoiled_weight_is_found(made, tmp_path, index, foreign):
    model, graph = made
    names = weights(graph)
    wrong, node = spoiled(graph, names[index % len(names)])
    if foreign:
        position = [one.name for one in wrong.graph].index(node)
        node = f"n{position}"
        anonymous(wrong)
    report = verify(model, save(wrong, tmp_path), example=IMAGES, batch_sizes=(2,))
    assert not report.ok
    assert report.divergence.node == node
    assert str(report.divergence) in report.fault
    assert f"node {node}" in str(report)


def test_what_is_said_of_it(made, tmp_path):
    model, graph = made
    wrong, node = spoiled(graph, "blocks.1.fc2.bias")
    found = verify(model, save(wrong, tmp_path), example=IMAGES, batch_sizes=(2,)).divergence
    assert (found.op_type, found.module, found.operator) == ("Add", "blocks.1.fc2", "aten.addmm.default")
    assert found.absolute == pytest.approx(5, rel=1e-4)
    assert found.note == "blocks.1.fc2.bias differs in 1 of 4 values, by up to 5"
    assert str(found).startswith(
        f"the two part at node {node} (Add) of blocks.1.fc2, which differs from PyTorch"
    )


def test_a_wrong_operator_is_found(made, tmp_path):
    model, graph = made
    wrong = graph.clone()
    node = next(node for node in wrong.graph if node.op_type == "Relu")
    node.op_type = "Sigmoid"
    found = verify(model, save(wrong, tmp_path), example=IMAGES, batch_sizes=(2,)).divergence
    assert (found.node, found.op_type, found.operator) == (node.name, "Sigmoid", "aten.relu.default")


def test_values_that_are_not_finite_are_found(made, tmp_path):
    model, graph = made
    wrong = graph.clone()
    value = wrong.graph.initializers["blocks.0.fc1.bias"]
    value.const_value = ir.tensor(np.full(8, np.nan, np.float32), name=value.name)
    found = verify(model, save(wrong, tmp_path), example=IMAGES, batch_sizes=(2,)).divergence
    assert found.module == "blocks.0.fc1"


def test_where_the_two_agree_there_is_none(made, tmp_path):
    model, graph = made
    report = verify(model, save(graph, tmp_path), example=IMAGES)
    assert report.ok
    assert report.divergence is None
    assert report.to_dict()["divergence"] is None


def test_another_models_weights_part_at_the_first_layer(made, tmp_path):
    _, graph = made
    other = randomise(Net(), seed=2).eval()
    found = verify(other, save(graph, tmp_path), example=IMAGES).divergence
    assert (found.op_type, found.module) == ("Conv", "stem")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 8).unbind(2)
        y = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return self.head(y[:, 0])


@pytest.mark.parametrize(
    ("changed", "module"), [("head.weight", "head"), ("head.bias", "head"), ("qkv.weight", "qkv")]
)
def test_parts_of_a_result_are_known_and_excuse_nothing(tmp_path, changed, module):
    """What is picked out of a result (a token, one of q, k and v) is looked up like all else."""
    torch.manual_seed(0)
    model, tokens = Attention().eval(), torch.randn(2, 3, 8)
    graph = _exporter.to_onnx(model, signature(model, tokens), opset=None, dynamic_batch=True)
    ir.save(graph, tmp_path / "m.onnx")
    with torch.no_grad():
        model.get_parameter(changed)[8 if module == "qkv" else 0] += 1
    found = verify(model, tmp_path / "m.onnx", example=tokens).divergence
    assert found is not None
    assert found.module == module
    assert found.relative > 1e-3
    if changed != "head.bias":  # of zeros, which the exporter leaves out
        assert found.note.startswith(f"{changed} differs in")
