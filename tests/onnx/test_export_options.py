"""What an export can be asked for: sizes, half precision, optimisation, a count of the nodes."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from blocks import randomise
from torch import nn

import surgeon
from surgeon._onnx import export as _export
from surgeon._onnx import export_file as _export_file
from surgeon._onnx import exporter as _exporter
from surgeon._onnx.export import export
from surgeon._onnx.hygiene import node_counts
from surgeon._onnx.signature import signature
from surgeon._onnx.verify import verify
from surgeon.errors import ExportError, ParityError, UsageError

pytestmark = pytest.mark.usefixtures("one_registry")

IMAGES = torch.zeros(2, 3, 16, 16)


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = act

    def forward(self, x):
        return x + self.act(self.bn(self.conv(x)))


class Net(nn.Module):
    """Two blocks, the second of which ends in something that no scale passes."""

    def __init__(self, table=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.table = nn.Parameter(torch.randn(8, 4, 4)) if table else 0.0
        self.blocks = nn.Sequential(Block(nn.ReLU()), Block(nn.SiLU()))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x) + self.table).mean((2, 3)))


@pytest.fixture(scope="module")
def graph():
    net = randomise(Net()).eval()
    return _exporter.to_onnx(net, signature(net, IMAGES), opset=None, dynamic_batch=True)


@pytest.fixture
def net():
    return randomise(Net()).eval()


@pytest.fixture
def quick(graph, monkeypatch):
    """The exporter's answer for the net, taken from the shelf."""
    monkeypatch.setattr(_export, "to_onnx", lambda *_, **__: graph.clone())


def run(path, x):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})[0])


def test_half_precision(net, tmp_path, quick):
    plain = export(net, tmp_path / "a.onnx", example=IMAGES)
    half = export(net, tmp_path / "b.onnx", example=IMAGES, dtype="float16")
    made = ir.load(tmp_path / "b.onnx")
    assert ir.DataType.FLOAT not in {v.dtype for v in made.graph.initializers.values()}
    assert {v.dtype for v in (*made.graph.inputs, *made.graph.outputs)} == {ir.DataType.FLOAT}
    assert {op: n for op, n in half.nodes.items() if op != "Cast"} == plain.nodes
    assert half.bytes < plain.bytes
    assert half.parity.tolerance == 1e-2
    assert 1e-6 < half.parity.worst.relative < 1e-2  # It is rounded, and not by more than that.
    assert (half.metadata["dtype"], plain.metadata["dtype"]) == ("float16", "float32")
    assert half.metadata["torch"] == plain.metadata["torch"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    assert verify(net, tmp_path / "b.onnx", example=IMAGES).tolerance == 1e-2
    assert verify(net, tmp_path / "a.onnx", example=IMAGES).tolerance == 1e-4


def test_half_precision_is_held_to_its_tolerance(net, tmp_path, quick):
    with pytest.raises(ParityError, match="the tolerance is 1e-06 relative"):
        export(net, tmp_path / "m.onnx", example=IMAGES, dtype="float16", tolerance=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_half_precision_cannot_hold_are_named(net, tmp_path, graph, monkeypatch):
    large = graph.clone()
    value = large.graph.initializers["fc.bias"]
    value.const_value = ir.tensor(np.full(5, 1e6, np.float32), name="fc.bias")
    monkeypatch.setattr(_export, "to_onnx", lambda *_, **__: large)
    with pytest.raises(ExportError, match=r"fc.bias holds 1e\+06 and float16 ends at 65504"):
        export(net, tmp_path / "m.onnx", example=IMAGES, dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_beside_the_graph(net, tmp_path, quick, monkeypatch, dtype):
    monkeypatch.setattr(_export_file, "ONE_FILE_LIMIT", 0)
    report = export(net, tmp_path / "m.onnx", example=IMAGES, dtype=dtype)
    assert report.data == str(tmp_path / "m.onnx.data")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(run(tmp_path / "m.onnx", x), net(x), atol=1e-2)


@pytest.mark.parametrize("beside", [False, True])
def test_optimised_by_onnx_runtime(net, tmp_path, quick, monkeypatch, beside):
    monkeypatch.setattr(_export_file, "ONE_FILE_LIMIT", 0 if beside else 2**31)
    report = export(net, tmp_path / "m.onnx", example=IMAGES, optimize="extended")
    assert any(op.startswith("com.microsoft::") for op in report.nodes), report.nodes
    assert report.nodes == node_counts(ir.load(tmp_path / "m.onnx"))
    assert report.metadata["model"] == "Net"
    names = ["m.onnx", "m.onnx.data"] if beside else ["m.onnx"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(run(tmp_path / "m.onnx", x), net(x), atol=1e-5)


def test_sizes_that_vary(net, tmp_path):
    report = export(net, tmp_path / "m.onnx", example=IMAGES, dynamic_size=True)
    assert report.inputs == {"input": ("batch", 3, "height", "width")}
    assert [row.inputs for row in report.parity.rows] == ["random", "random", "extreme", "larger", "odd"]
    x = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        assert torch.allclose(run(tmp_path / "m.onnx", x), net(x), atol=1e-5)


def test_sizes_that_cannot_vary(tmp_path):
    message = r"no dynamic size is possible: Net cannot run on input \(1, 3, 80, 48\): The size of tensor"
    with pytest.raises(UsageError, match=message):
        export(Net(table=True), tmp_path / "m.onnx", example=IMAGES, dynamic_size=True)
    with pytest.raises(UsageError, match="dynamic_size is for images, and none of input is B x C x H x W"):
        export(nn.Linear(2, 3), tmp_path / "m.onnx", example=torch.zeros(2, 2), dynamic_size=True)


class Baked(nn.Module):
    """Runs at any size, with a table that Python makes for the one at hand."""

    def forward(self, x):
        return x + torch.tensor(list(range(x.shape[3])))


@pytest.mark.slow
def test_sizes_that_python_consumes(tmp_path):
    with pytest.raises(ExportError, match=r"Baked .*width.*dynamic_size=False \(no --dynamic-size\)"):
        export(Baked(), tmp_path / "m.onnx", example=IMAGES, dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_nodes_are_those_of_the_ungated_model(net, tmp_path):
    surgeon.apply(net, scaling="paper", example=IMAGES)
    report = export(net, tmp_path / "m.onnx", example=IMAGES, check_nodes=True)
    assert report.folded == ("blocks.0.add",)
    assert [name for name, _ in report.kept] == ["blocks.1.add"]


def test_a_node_too_many_is_found(net, tmp_path, graph, monkeypatch):
    surgeon.apply(net, scaling="paper", example=IMAGES)
    answers = iter([graph.clone(), graph.clone()])  # the kept multiplication is missing in the first
    monkeypatch.setattr(_export, "to_onnx", lambda *_, **__: next(answers))
    with pytest.raises(ExportError, match=r"other nodes than the ungated model's export: -1 Mul\. Nothing"):
        export(net, tmp_path / "m.onnx", example=IMAGES, check_nodes=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; give one of 'float32', 'float16'"),
        ({"optimize": "most"}, "optimize is 'most'; give one of None, 'basic', 'extended', 'all'"),
        ({"optimize": "all", "dtype": "float16"}, "would undo dtype='float16'.*give one of the two"),
        ({"opset": "18"}, "opset is '18'"),
        ({"labels": "cat"}, "labels is 'cat'; give the names of the classes, one string for each"),
        (
            {"metadata": {"accuracy": torch.ones(())}},
            r"metadata\['accuracy'\] is a Tensor, which has",
        ),
    ],
)
def test_choices_are_checked_before_any_work(net, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        export(net, tmp_path / "m.onnx", example=IMAGES, **arguments)


def test_norms_before_layers_are_taken_in_when_asked(net, tmp_path, quick, monkeypatch):
    asked = []
    monkeypatch.setattr(_export, "take_batchnorms", asked.append)
    export(net, tmp_path / "a.onnx", example=IMAGES)
    assert asked == []
    export(net, tmp_path / "b.onnx", example=IMAGES, fuse_batchnorm=True)
    assert len(asked) == 1


class PadsToEven(nn.Module):
    def __init__(self, multiple):
        super().__init__()
        self.conv, self.multiple = nn.Conv2d(3, 4, 3, padding=1), multiple

    def forward(self, x):
        y = self.conv(x)
        if y.shape[-1] % self.multiple:
            y = nn.functional.pad(y, (0, self.multiple - y.shape[-1] % self.multiple))
        return y.mean((2, 3))


@pytest.mark.parametrize("multiple", [2, 32])
def test_a_size_that_is_padded_is_tried(tmp_path, multiple):
    """The example and a size 32 wider need no padding, so the graph has none."""
    given = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ParityError, match="on odd inputs differs"):
        export(PadsToEven(multiple), tmp_path / "m.onnx", example=given, dynamic_size=True)
    assert not list(tmp_path.iterdir())
