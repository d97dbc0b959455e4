"""An ONNX file against a model: agreement, every kind of disagreement, and what is no comparison at all."""

import json
import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import surgeon
from surgeon._onnx.file import Runtime
from surgeon._onnx.hygiene import graph_findings, node_counts
from surgeon._onnx.verify import verify
from surgeon.errors import OnnxFileError, ParityError, UsageError, WrappedModelError


class Model(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x @ self.weight


WEIGHT = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]])
EXAMPLE = torch.zeros(2, 2)


def write(path, nodes, *, inputs=None, outputs=None, weights=(), functions=(), opset=20):
    """A hand-made file; ``nodes`` is a list of nodes over the values that it was given."""
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": opset}, name="made"
    )
    ir.save(ir.Model(graph, ir_version=10, functions=functions), path)
    return path


def value(name, shape, dtype=ir.DataType.FLOAT):
    return ir.val(name, dtype=dtype, shape=shape)


def constant(name, array):
    return ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))


def linear(path, weight=WEIGHT, batch="batch", more=None):
    """``x @ weight``; ``more`` may put a node after it."""
    x, w = value("x", [batch, 2]), constant("w", weight.numpy())
    node = ir.node("MatMul", [x, w], name="matmul")
    node.outputs[0].shape, node.outputs[0].dtype = ir.Shape([batch, 3]), ir.DataType.FLOAT
    last = more(node.outputs[0]) if more else []
    out = last[-1].outputs[0] if last else node.outputs[0]
    out.name, out.shape, out.dtype = "y", ir.Shape([batch, 3]), ir.DataType.FLOAT
    return write(path, [node, *last], inputs=[x], outputs=[out], weights=[w])


@pytest.fixture
def model():
    return Model(WEIGHT.clone())


def test_agreement(model, tmp_path):
    report = verify(model, linear(tmp_path / "m.onnx"), example=EXAMPLE)
    assert report.ok
    assert report.require() is report
    assert report.fault == ""
    assert [(row.output, row.batch, row.shape, row.top1, row.inputs) for row in report.rows] == [
        ("output", 1, (1, 3), 1.0, "random"),
        ("output", 3, (3, 3), 1.0, "random"),
        ("output", 3, (3, 3), 1.0, "extreme"),
    ]
    assert report.worst.relative < 1e-6
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["ok"] is True
    title, head, first, *_ = str(report).splitlines()
    assert title.endswith("agrees (tolerance 0.0001)")
    assert head.split()[-1] == "verdict"
    assert first.split()[:3] == ["output", "random", "1"] and first.split()[-1] == "ok"


def test_the_seed_decides_the_inputs(model, tmp_path):
    path = linear(tmp_path / "m.onnx", WEIGHT + 0.1)
    first, second, other = (verify(model, path, example=EXAMPLE, seed=seed).rows for seed in (0, 0, 1))
    assert first == second != other


def test_disagreement_names_the_worst(model, tmp_path):
    path = linear(tmp_path / "m.onnx", WEIGHT * torch.tensor([1, 1, -1.0]))
    report = verify(model, path, example=EXAMPLE)
    assert not report.ok
    assert report.worst.relative > 1
    with pytest.raises(
        ParityError, match=r"output 'output' at batch \d differs by .*top-1.*3 of 3 comparisons failed"
    ):
        report.require()


def test_tolerance_is_relative_to_the_largest_value(model, tmp_path):
    path = linear(tmp_path / "m.onnx", WEIGHT * 1.001)
    assert verify(model, path, example=EXAMPLE, tolerance=2e-3).ok
    assert not verify(model, path, example=EXAMPLE, tolerance=5e-4).ok


def test_rounding_is_told_from_a_mistake(tmp_path):
    class Cancelling(Model):
        """Loses four of its seven digits."""

        def forward(self, x):
            return (x @ self.weight + 1e4) - 1e4

    report = verify(Cancelling(WEIGHT.clone()), linear(tmp_path / "m.onnx"), example=EXAMPLE, tolerance=1e-6)
    assert not report.ok
    assert 1e-5 < report.rounding < 1e-2
    assert "so this may be nothing but rounding, which a larger tolerance allows" in report.fault
    wrong = verify(Cancelling(WEIGHT.clone()), linear(tmp_path / "n.onnx", WEIGHT * 1.5), example=EXAMPLE)
    assert wrong.rounding is not None and wrong.remarks == ()
    assert verify(Model(WEIGHT.clone()), linear(tmp_path / "o.onnx"), example=EXAMPLE).rounding is None


def test_a_small_mistake_is_told_from_rounding(model, tmp_path):
    report = verify(model, linear(tmp_path / "m.onnx", WEIGHT * (1 + 5e-5)), example=EXAMPLE)
    assert report.ok
    (remark,) = report.remarks
    assert remark.startswith("5e-05 is within the tolerance, but more than rounding: PyTorch itself is ")
    assert remark in str(report) and report.rounding < 1e-6
    tight = verify(model, linear(tmp_path / "n.onnx"), example=EXAMPLE, tolerance=1e-6)
    assert tight.ok and tight.remarks == ()


def test_a_mistake_of_onnx_runtimes_optimiser_is_told_from_one_of_the_file(tmp_path, monkeypatch):
    """Played by another file that it opens; `test_padding.py` has a real mistake of an older one."""
    plain, other = Runtime.open, linear(tmp_path / "other.onnx", 2 * WEIGHT)

    def optimising(runtime, **how):
        path, runtime.path = runtime.path, runtime.path if how else other
        plain(runtime, **how)
        runtime.path = path

    monkeypatch.setattr(Runtime, "open", optimising)
    report = verify(Model(WEIGHT), linear(tmp_path / "m.onnx"), example=EXAMPLE)
    assert not report.ok and report.divergence is None
    assert report.unoptimised < 1e-6
    assert "with ONNX Runtime's optimisations off the two differ by" in report.fault
    wrong = verify(Model(3 * WEIGHT), linear(tmp_path / "n.onnx"), example=EXAMPLE)
    assert wrong.unoptimised > 0.1 and wrong.remarks == ()


def test_other_shape(tmp_path):
    report = verify(Model(WEIGHT[:, :2].clone()), linear(tmp_path / "m.onnx"), example=EXAMPLE)
    assert report.worst.note == "the shape is (1, 2) in PyTorch and (1, 3) in ONNX Runtime"
    assert math.isnan(report.worst.relative)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"][0]["relative"] is None


@pytest.mark.parametrize("where", ["PyTorch", "ONNX Runtime"])
def test_values_that_are_not_finite(where, tmp_path):
    bad = WEIGHT.clone()
    bad[:, 1] = math.inf
    model, file = (Model(bad), WEIGHT) if where == "PyTorch" else (Model(WEIGHT.clone()), bad)
    report = verify(model, linear(tmp_path / "m.onnx", file), example=EXAMPLE, batch_sizes=[2])
    assert not report.ok
    assert f"2 of 6 values are not finite in {where} (the first is" in report.fault


def test_zeros_prove_little_and_say_so(tmp_path):
    report = verify(Model(WEIGHT * 0), linear(tmp_path / "m.onnx", WEIGHT * 0), example=EXAMPLE)
    assert report.ok
    assert report.worst.note == "PyTorch computes nothing but zeros"
    assert not verify(Model(WEIGHT * 0), linear(tmp_path / "m.onnx"), example=EXAMPLE).ok


def test_two_outputs_are_told_apart(tmp_path):
    class Two(nn.Module):
        def forward(self, x):
            return {"double": x * 2, "half": x / 2}

    x, two = value("x", ["batch", 2]), constant("two", np.float32(2))
    first, second = ir.node("Mul", [x, two], name="a"), ir.node("Sub", [x, two], name="b")
    for node, name in ((first, "double"), (second, "half")):
        out = node.outputs[0]
        out.name, out.shape, out.dtype = name, ir.Shape(["batch", 2]), ir.DataType.FLOAT
    outputs = [first.outputs[0], second.outputs[0]]
    path = write(tmp_path / "m.onnx", [first, second], inputs=[x], outputs=outputs, weights=[two])
    report = verify(Two(), path, example=EXAMPLE, batch_sizes=[4])
    assert [row.ok for row in report.rows] == [True, False, True, False]
    assert report.worst.output == "half"
    with pytest.raises(UsageError, match=r"m.onnx has 2 outputs \(double, half\), Model has 1 \(output\)"):
        verify(Model(WEIGHT.clone()), path, example=EXAMPLE)


def test_fixed_batch_is_compared_at_that_size(model, tmp_path):
    path = linear(tmp_path / "m.onnx", batch=4)
    assert {row.batch for row in verify(model, path, example=EXAMPLE).rows} == {4}


def test_gated_models_are_taken_as_they_evaluate(tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return x + self.inner(x).relu()

    model = surgeon.apply(Residual(), [0.25], scaling="paper", unit="batch", example=EXAMPLE).train()

    def file(scale):
        def more(branch):
            return [ir.node("Add", [branch.producer().inputs[0], branch])]

        x = value("x", ["batch", 2])
        w, b = (
            constant(n, t.detach().numpy())
            for n, t in [("w", model.inner.weight.T * scale), ("b", model.inner.bias * scale)]
        )
        nodes = [ir.node("MatMul", [x, w])]
        nodes.append(ir.node("Add", [nodes[0].outputs[0], b]))
        nodes.append(ir.node("Relu", [nodes[1].outputs[0]]))
        nodes.append(ir.node("Add", [x, nodes[2].outputs[0]]))
        out = nodes[-1].outputs[0]
        out.name, out.shape, out.dtype = "y", ir.Shape(["batch", 2]), ir.DataType.FLOAT
        return write(tmp_path / "m.onnx", nodes, inputs=[x], outputs=[out], weights=[w, b])

    assert verify(model, file(0.75), example=EXAMPLE).ok
    assert not verify(model, file(1.0), example=EXAMPLE).ok
    assert model.training
    assert len(surgeon.status(model).gates) == 1


def noise(out):
    random = ir.node("RandomNormalLike", [out], {"scale": 1e-9}, name="noise")
    return [random, ir.node("Add", [out, random.outputs[0]], name="sum")]


def branching(out):
    flag = ir.node("Constant", [], {"value": ir.tensor(np.bool_(True))})
    graphs = []
    for name in ("then", "other"):
        inner = ir.node("Identity", [out])
        inner.outputs[0].name = name
        graphs.append(ir.Graph([], inner.outputs, nodes=[inner], name=name))
    return [
        flag,
        ir.node("If", [flag.outputs[0]], {"then_branch": graphs[0], "else_branch": graphs[1]}, name="if_it"),
    ]


def repeating(op):
    """A loop that runs once; `Loop` has a number and a condition before its value, `Scan` rows behind it."""

    def more(out):
        carried = [ir.Value(name="carried", type=ir.TensorType(ir.DataType.FLOAT))]
        inner = ir.node("Identity", carried)
        inner.outputs[0].name = "through"
        if op == "Scan":
            row = ir.Value(name="row", type=ir.TensorType(ir.DataType.FLOAT))
            body = ir.Graph([*carried, row], inner.outputs, nodes=[inner], name="body")
            rows = ir.node("Constant", [], {"value": ir.tensor(np.zeros((1, 1), np.float32))})
            scan = ir.node(
                "Scan", [out, rows.outputs[0]], {"body": body, "num_scan_inputs": 1}, name="repeat"
            )
            return [rows, scan]
        number = ir.Value(name="number", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        goes_on = ir.Value(name="goes_on", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        same = ir.node("Identity", [goes_on])
        same.outputs[0].name = "still"
        results = [same.outputs[0], inner.outputs[0]]
        body = ir.Graph([number, goes_on, *carried], results, nodes=[same, inner], name="body")
        once = ir.node("Constant", [], {"value": ir.tensor(np.int64(1))})
        flag = ir.node("Constant", [], {"value": ir.tensor(np.bool_(True))})
        given = [once.outputs[0], flag.outputs[0], out]
        return [once, flag, ir.node("Loop", given, {"body": body}, name="repeat")]

    return more


def dropping(training):
    def more(out):
        ratio = ir.node("Constant", [], {"value": ir.tensor(np.float32(0.0))})
        flag = ir.node("Constant", [], {"value": ir.tensor(np.bool_(training))})
        return [ratio, flag, ir.node("Dropout", [out, ratio.outputs[0], flag.outputs[0]], name="drop")]

    return more


@pytest.mark.parametrize(
    ("more", "op", "code"),
    [
        (noise, "RandomNormalLike", "random"),
        (branching, "If", "branching"),
        (repeating("Loop"), "Loop", "branching"),
        (repeating("Scan"), "Scan", "branching"),
        (dropping(True), "Dropout", "training"),
    ],
)
def test_what_does_not_belong_is_found_though_outputs_agree(model, tmp_path, more, op, code):
    report = verify(model, linear(tmp_path / "m.onnx", more=more), example=EXAMPLE)
    assert all(row.ok for row in report.rows)
    assert [(found.op_type, found.code) for found in report.findings] == [(op, code)]
    assert not report.ok
    with pytest.raises(ParityError, match=rf"node \w+ \({op}\) does not belong in the graph: "):
        report.require()
    assert "1 node that should not be there" in str(report)
    assert any(line.split()[:2] == [report.findings[0].node, op] for line in str(report).splitlines())


def test_dropout_that_evaluates_is_fine(model, tmp_path):
    assert verify(model, linear(tmp_path / "m.onnx", more=dropping(False)), example=EXAMPLE).ok


def test_findings_reach_subgraphs_functions_and_training_norms():
    x = value("x", ["batch", 3])
    inner = ir.node("Bernoulli", [x], name="coin")
    body = ir.Graph([], inner.outputs, nodes=[inner])
    norm = ir.node("BatchNormalization", [x] * 5, {"training_mode": 1}, num_outputs=3, name="norm")
    gate = ir.node("mark", [x], domain="surgeon", name="gate")
    own = ir.node("mark", [x], domain="somebody", name="own")
    loop = ir.node("Loop", [None, None], {"body": body}, num_outputs=1, name="loop")
    inside = ir.node("RandomUniform", [], {"shape": [1]}, name="in_function")
    function = ir.Function("somebody", "f", graph=ir.Graph([], inside.outputs, nodes=[inside]), attributes=[])
    graph = ir.Graph([x], [], nodes=[norm, gate, own, loop], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10, functions=[function])
    found = {(finding.node, finding.code) for finding in graph_findings(model)}
    assert found == {
        *(("norm", "training"), ("gate", "gate"), ("coin", "random"), ("in_function", "random")),
        ("loop", "branching"),
    }
    counts = node_counts(model)
    assert counts["surgeon::mark"] == counts["somebody::mark"] == counts["Loop"] == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: None, "it does not exist"),
        (lambda data: b"", "the file is empty"),
        (lambda data: data[: len(data) // 2], "m.onnx is no valid ONNX model; it may be truncated"),
        (lambda data: b"PK\x03\x04 something else", "m.onnx is no valid ONNX model"),
        (lambda data: data.replace(b"MatMul", b"MitMul"), "m.onnx is no valid ONNX model.*MitMul"),
    ],
)
def test_spoiled_files(model, tmp_path, spoil, message):
    path = linear(tmp_path / "m.onnx")
    data = spoil(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(OnnxFileError, match=message):
        verify(model, path, example=EXAMPLE)


def test_directory(model, tmp_path):
    with pytest.raises(OnnxFileError, match="it is a directory"):
        verify(model, tmp_path, example=EXAMPLE)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            torch.zeros(2, 5),
            r"the inputs of .*m.onnx \(x \[batch,2\]\) do not fit the example's \(input \(2, 5\)\)",
        ),
        (torch.zeros(2), "do not fit the example's"),
        ("an image", "example is a str"),
    ],
)
def test_inputs_that_do_not_match(model, tmp_path, example, message):
    with pytest.raises(UsageError, match=message):
        verify(model, linear(tmp_path / "m.onnx"), example=example)


def test_number_of_inputs(tmp_path):
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(
        UsageError, match=r"takes 1 inputs \(x \[batch,2\]\), the model 2 \(x \(2, 2\), y \(2, 2\)\)"
    ):
        verify(Sum(), linear(tmp_path / "m.onnx"), example=(EXAMPLE, EXAMPLE))


def test_model_that_cannot_run(tmp_path):
    with pytest.raises(UsageError, match=r"Model cannot run on input \(1, 2\): .*mat1 and mat2"):
        verify(Model(torch.zeros(7, 3)), linear(tmp_path / "m.onnx"), example=EXAMPLE)


def test_other_type_of_input(model, tmp_path):
    with pytest.raises(OnnxFileError, match=r"ONNX Runtime failed on x \(1, 2\).*"):
        verify(model.double(), linear(tmp_path / "m.onnx"), example=EXAMPLE.double())


def test_size_comes_from_the_file_where_no_example_is_given(tmp_path):
    x = value("x", ["batch", 3, 4, "width"])
    node = ir.node("Relu", [x])
    out = node.outputs[0]
    out.name, out.shape, out.dtype = "y", x.shape, ir.DataType.FLOAT
    path = write(tmp_path / "m.onnx", [node], inputs=[x], outputs=[out])
    assert {row.shape for row in verify(nn.ReLU(), path).rows} == {(1, 3, 4, 224), (3, 3, 4, 224)}


def test_wrapped_model(model, tmp_path):
    with pytest.raises(WrappedModelError):
        verify(nn.DataParallel(model), linear(tmp_path / "m.onnx"), example=EXAMPLE)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.boxes, self.scores = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return {"boxes": self.boxes(x), "scores": self.scores(x)}


@pytest.mark.parametrize("what", ["order", "names"])
def test_outputs_of_the_same_names_are_compared_by_name(tmp_path, what):
    """Whoever runs the file asks for its outputs by name."""
    model, path = Detector().eval(), tmp_path / "m.onnx"
    surgeon.export(model, path, example=torch.zeros(2, 4))
    made = ir.load(path)
    first, second = made.graph.outputs
    if what == "order":
        made.graph.outputs[:] = [second, first]
    else:
        first.name, second.name = "other", "boxes"
        first.name = "scores"
    ir.save(made, path)
    report = verify(model, path, example=torch.zeros(2, 4))
    assert report.ok == (what == "order")
    if what == "names":
        assert report.divergence.op_type == "Gemm"
