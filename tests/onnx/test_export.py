"""The exported file: its nodes, its numbers, what it says of itself, and what is left when it fails."""

import copy
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import timm
import torch
from blocks import Plain, X
from torch import nn

import surgeon
from surgeon._onnx import export as _export
from surgeon._onnx import export_file as _export_file
from surgeon._onnx import exporter as _exporter
from surgeon._onnx.export import export
from surgeon._onnx.hygiene import node_counts
from surgeon._onnx.signature import signature
from surgeon.errors import ExportError, ParityError, UsageError, WrappedModelError

pytestmark = pytest.mark.usefixtures("one_registry")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


IMAGES = torch.zeros(2, 3, 8, 8)


def made():
    """A net with random statistics and gains: fresh ones are zeros and ones, and hide mistakes."""
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


def run(path, x):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})[0])


@pytest.fixture
def net():
    return made()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    model = made()
    path = tmp_path_factory.mktemp("plain") / "net.onnx"
    return model, path, export(model, path, example=IMAGES)


@pytest.fixture(scope="module")
def graph():
    net = made()
    return _exporter.to_onnx(net.eval(), signature(net, IMAGES), opset=None, dynamic_batch=True)


@pytest.fixture
def quick(graph, monkeypatch):
    """The exporter's answer for the net, taken from the shelf: what comes after it is what is tested."""
    monkeypatch.setattr(_export, "to_onnx", lambda *_, **__: graph.clone())


@pytest.fixture
def no_work(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the exporter was started")

    monkeypatch.setattr(_export, "to_onnx", refuse)
    monkeypatch.setattr(_export, "evaluating_copy", refuse)


def test_numbers(plain):
    model, path, report = plain
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(x)
    assert (run(path, x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert report.parity.ok
    assert [(row.batch, row.inputs) for row in report.parity.rows] == [
        (1, "random"),
        (3, "random"),
        (3, "extreme"),
    ]
    assert all(row.relative < 1e-5 and row.top1 == 1 for row in report.parity.rows)


def test_nodes(plain):
    _, path, report = plain
    assert report.nodes == node_counts(ir.load(path))
    assert report.nodes == {"Conv": 5, "Relu": 4, "Add": 2, "Gemm": 1, "ReduceMean": 1}
    assert report.inputs == {"input": ("batch", 3, 8, 8)}
    assert report.bytes == path.stat().st_size
    assert report.data is None
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]


def test_report_as_json_and_text(plain):
    _, path, report = plain
    assert json.loads(json.dumps(report.to_dict()))["parity"]["ok"] is True
    assert str(report).splitlines()[0].split() == [
        "file",
        str(path),
        f"({path.stat().st_size / 1e3:.1f}",
        "kB)",
    ]
    assert "batch x 3 x 8 x 8" in str(report) and "13: 5 Conv, 4 Relu, 2 Add" in str(report)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.opset = 3


def test_graph_keeps_names_and_no_paths(plain):
    path = plain[1]
    graph = ir.load(path).graph
    assert "fc.weight" in graph.initializers
    assert {"stem.weight", "blocks.0.conv1.weight"} <= set(graph.initializers)
    modules = {node.metadata_props["surgeon.module"] for node in graph if node.op_type == "Conv"}
    assert modules == {"stem", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"}
    data = path.read_bytes()
    assert b"site-packages" not in data
    assert str(Path(__file__).parent).encode() not in data


def test_metadata(net, tmp_path, quick):
    net.pretrained_cfg = {
        "architecture": "net_of_mine",
        "mean": (0.1, 0.2, 0.3),
        "std": (1, 2, 3),
        "input_size": (3, 8, 8),
    }
    labels = ["a", "b", "c", "d", "ß"]
    report = export(net, tmp_path / "m.onnx", labels=labels, metadata={"dataset": "digits", "epoch": 3})
    props = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert props == report.metadata
    expected = {
        "model": "net_of_mine",
        "mean": "[0.1, 0.2, 0.3]",
        "std": "[1, 2, 3]",
        "input_size": "[3, 8, 8]",
    }
    expected |= {"num_classes": "5", "dataset": "digits", "epoch": "3", "torch": torch.__version__}
    expected |= {"surgeon": surgeon.__version__, "timm": timm.__version__}
    assert expected.items() <= props.items()
    assert json.loads(props["labels"]) == labels


def test_model_is_only_read_and_nobody_is_disturbed(net, tmp_path, capfd):
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = [logging.getLogger(name).level for name in names]
    filters = list(warnings.filters)
    net.train()
    net.blocks[0].eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(net, tmp_path / "m.onnx", example=IMAGES)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert flags == [module.training for module in net.modules()]
    assert capfd.readouterr() == ("", "")
    assert levels == [logging.getLogger(name).level for name in names]
    assert filters == warnings.filters


@pytest.mark.parametrize("scaling", [pytest.param("inverted", marks=pytest.mark.slow), "paper"])
def test_folded_export_has_the_nodes_of_the_ungated_one(plain, tmp_path, scaling):
    model, _, ungated = plain
    gated = made().eval()
    surgeon.apply(gated, scaling=scaling, unit="batch", example=IMAGES)
    report = export(gated, tmp_path / "m.onnx", example=IMAGES)
    assert report.nodes == ungated.nodes
    assert report.kept == ()
    assert report.folded == ("blocks.0.add", "blocks.1.add")
    assert report.metadata["scaling"] == scaling
    assert report.metadata["schedule"] == "linear"
    assert report.metadata["drop_rate"] == "0.5"
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected, without = gated.eval()(x), model.eval()(x)
    assert (run(tmp_path / "m.onnx", x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.allclose(expected, without) == (scaling == "inverted")
    assert len(surgeon.status(gated).gates) == 2


@pytest.mark.slow
def test_static_batch_of_the_example(net, tmp_path):
    report = export(net, tmp_path / "a.onnx", example=torch.zeros(4, 3, 8, 8), dynamic_batch=False)
    assert report.inputs == {"input": (4, 3, 8, 8)}
    assert {row.batch for row in report.parity.rows} == {4}


def test_static_batch(net, tmp_path):
    net.pretrained_cfg = {"input_size": (3, 8, 8)}
    assert export(net, tmp_path / "b.onnx", dynamic_batch=False).inputs == {"input": (1, 3, 8, 8)}


def test_opset(net, tmp_path):
    assert export(net, tmp_path / "m.onnx", example=IMAGES, opset=18).opset == 18
    assert ir.load(tmp_path / "m.onnx").opset_imports[""] == 18


def test_large_models_get_a_data_file(net, tmp_path, graph, monkeypatch):
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(_export, "to_onnx", lambda *_, **__: graph.clone())
    monkeypatch.setattr(_export_file, "ONE_FILE_LIMIT", 0)
    report = export(net, path, example=IMAGES)
    assert report.data == f"{path}.data"
    assert report.bytes == path.stat().st_size + (tmp_path / "m.onnx.data").stat().st_size
    again = export(net, path, example=IMAGES, overwrite=True)
    assert again.data == f"{path}.1.data"  # the old graph reads the old weights until it is replaced
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.1.data"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(run(path, x), net.eval()(x).detach(), atol=1e-5)
    monkeypatch.setattr(_export_file, "ONE_FILE_LIMIT", 2**31)
    export(net, path, example=IMAGES, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_weights_beside_a_graph_that_is_not_there_stay(net, tmp_path, graph, monkeypatch):
    """They may be anybody's; only with the graph that reads them are they replaced."""
    (tmp_path / "m.onnx.data").write_text("mine")
    monkeypatch.setattr(_export, "to_onnx", lambda *_, **__: graph.clone())
    export(net, tmp_path / "m.onnx", example=IMAGES)
    assert (tmp_path / "m.onnx.data").read_text() == "mine"
    export(net, tmp_path / "m.onnx", example=IMAGES, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_an_example_may_be_on_any_device(net):
    called = signature(net, IMAGES.to("meta"))
    assert [(t.device.type, t.shape) for t in called.tensors] == [("cpu", IMAGES.shape)]
    assert [t.shape for t in called.draw(3, torch.Generator())] == [(3, *IMAGES.shape[1:])]


def test_paths_are_checked_before_any_work(net, tmp_path, no_work, monkeypatch):
    (tmp_path / "there.onnx").write_text("old")
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path, "is a directory; name a file in it$"),
        (tmp_path / "none" / "m.onnx", "there is no directory .*none; make it first"),
        (tmp_path / "file" / "m.onnx", "there is no directory"),
        (tmp_path / "there.onnx", r"exists; pass overwrite=True \(--overwrite\)"),
        ("/dev/null", "it is not a regular file"),
    ]:
        with pytest.raises(UsageError, match=message):
            export(net, path, example=IMAGES, overwrite=path == "/dev/null")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match=r"the directory .* is not writable"):
        export(net, tmp_path / "m.onnx", example=IMAGES)
    with pytest.raises(UsageError, match="the file is read-only"):
        export(net, tmp_path / "there.onnx", example=IMAGES, overwrite=True)
    assert (tmp_path / "there.onnx").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 99}, "opset is 99; the installed onnx .* knows 7 to"),
        ({"opset": 3}, "opset is 3"),
        ({"batch_sizes": ()}, r"batch_sizes is \(\); give at least one"),
        ({"batch_sizes": (0,)}, "each 1 or more"),
        ({"tolerance": 0}, "tolerance is 0; give a positive number"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
    ],
)
def test_arguments_are_checked_before_any_work(net, tmp_path, no_work, arguments, message):
    with pytest.raises(UsageError, match=message):
        export(net, tmp_path / "m.onnx", example=IMAGES, **arguments)


def test_weights_that_are_not_finite_are_named(net, tmp_path, no_work):
    with torch.no_grad():
        net.fc.weight[1, 2] = float("nan")
        net.blocks[1].bn2.running_var[0] = float("inf")
    message = r"not finite: blocks.1.bn2.running_var \(1 of 4\), fc.weight \(1 of 20\)"
    with pytest.raises(ExportError, match=message):
        export(net, tmp_path / "m.onnx", example=IMAGES)


def test_weights_must_be_there_and_fine_enough(tmp_path, no_work):
    with pytest.raises(
        UsageError, match=r"Net holds torch.bfloat16 in stem.weight, too coarse.*export model.float\(\)"
    ):
        export(Net().bfloat16(), tmp_path / "m.onnx", example=IMAGES)
    with pytest.raises(UsageError, match=r"Net has no weights yet: stem.weight is on the meta device"):
        export(Net().to("meta"), tmp_path / "m.onnx", example=IMAGES)


def test_wrapped_models_are_refused(net, tmp_path, no_work):
    with pytest.raises(WrappedModelError):
        export(nn.DataParallel(net), tmp_path / "m.onnx", example=IMAGES)


def test_labels_must_fit(net, tmp_path, quick):
    with pytest.raises(UsageError, match="there are 2 labels for the 5 classes"):
        export(net, tmp_path / "m.onnx", example=IMAGES, labels=["a", "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "could not convert Net with a dynamic batch: RuntimeError"),
        ({"y": IMAGES}, "does not fit Net.forward"),
        (torch.tensor(3.0), "input, the first tensor of the example, has no dimension"),
        ({"x": None}, "the example for Net holds no tensor"),
    ],
)
def test_examples_that_do_not_fit(net, tmp_path, example, message):
    with pytest.raises(surgeon.SurgeonError, match=message):
        export(net, tmp_path / "m.onnx", example=example)
    assert list(tmp_path.iterdir()) == []


def test_what_onnx_runtime_cannot_load(net, tmp_path, graph, monkeypatch):
    foreign = graph.clone()
    next(node for node in foreign.graph if node.op_type == "Gemm").domain = "somebody"
    monkeypatch.setattr(_export, "to_onnx", lambda *_, **__: foreign)
    with pytest.raises(
        ExportError, match=rf"{tmp_path}/m.onnx.*somebody.*Nothing was written to {tmp_path}/m.onnx"
    ):
        export(net, tmp_path / "m.onnx", example=IMAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wrong_exporter(monkeypatch, graph):
    """An exporter that makes a mistake: one weight is off."""

    def wrong(*_, **__):
        mistaken = graph.clone()
        value = mistaken.graph.initializers["fc.bias"]
        value.const_value = ir.tensor(value.const_value.numpy() + np.float32([0, 0, 3, 0, 0]), name="fc.bias")
        return mistaken

    monkeypatch.setattr(_export, "to_onnx", wrong)


def test_wrong_numbers_leave_no_file(net, tmp_path, wrong_exporter):
    message = (
        r"graph of Net computes something else: output 'output' at batch \d differs by 3 \(relative .*No file"
    )
    with pytest.raises(ParityError, match=message) as caught:
        export(net, tmp_path / "m.onnx", example=IMAGES)
    assert not caught.value.report.ok
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_exporter_is_not_blamed_on_the_fold(net, tmp_path, wrong_exporter):
    surgeon.apply(net, scaling="paper", example=IMAGES)
    message = "computes something else, and it is not the fold: in PyTorch the folded model agrees"
    with pytest.raises(ParityError, match=message) as caught:
        export(net, tmp_path / "m.onnx", example=IMAGES)
    # The graph on the shelf has the weights of the ungated net: the first folded layer differs first.
    assert caught.value.report.divergence.module == "blocks.0.bn2"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_fold_is_blamed(net, tmp_path, quick, monkeypatch):
    surgeon.apply(net, scaling="paper", example=IMAGES)
    monkeypatch.setattr(_export, "fold", lambda model, **_: surgeon.remove(copy.deepcopy(model)))
    message = "and the fold is at fault: in PyTorch the folded model already differs from the gated one"
    with pytest.raises(ParityError, match=message) as caught:
        export(net, tmp_path / "m.onnx", example=IMAGES)
    assert caught.value.report.divergence is None  # from the folded model the graph does not part


def test_wrong_numbers_leave_the_old_file(net, tmp_path, wrong_exporter):
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(ParityError):
        export(net, tmp_path / "m.onnx", example=IMAGES, overwrite=True)
    assert (tmp_path / "m.onnx").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("broken", ["move", "_compare", "write"])
def test_interruption_leaves_nothing(net, tmp_path, quick, monkeypatch, broken):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_export, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(net, tmp_path / "m.onnx", example=IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_full_disk(net, tmp_path, quick, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ExportError, match=r"cannot write .*No space left on device; nothing was left behind"):
        export(net, tmp_path / "m.onnx", example=IMAGES)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, signal, sys, torch
from surgeon._onnx import export as _export
from surgeon._onnx import export_file as _export_file

def killed(made, place):
    print(made.stat().st_size, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
_export_file.settle = killed
_export.export(torch.nn.Conv2d(3, 4, 3), sys.argv[1], example=torch.zeros(2, 3, 8, 8))
"""


@pytest.mark.slow
def test_killed_between_writing_and_renaming(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "m.onnx")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert int(done.stdout) > 0
    assert not (tmp_path / "m.onnx").exists()


class Deciding(nn.Module):
    def forward(self, x):
        return x * 2 if x.mean() > 0 else x.relu()


def test_a_failure_is_said_once(tmp_path, capfd):
    """PyTorch prints the graph it got so far, which helps nobody here."""
    with pytest.raises(ExportError, match="could not convert Deciding"):
        export(Deciding().eval(), tmp_path / "m.onnx", example=torch.randn(2, 4))
    assert capfd.readouterr() == ("", "")


def test_without_an_example_the_file_takes_what_apply_was_shown(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Plain())
    surgeon.apply(model, drop_rate=0.5, scaling="paper", example=X)
    surgeon.export(model, tmp_path / "dynamic.onnx")
    assert surgeon.export(model, tmp_path / "one.onnx", dynamic_batch=False).parity.ok
