"""Foreign ONNX files: damaged, hostile and merely odd ones end in an error, never in a crash or a hang."""

import contextlib
import signal

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from surgeon._onnx import file as _onnx_file
from surgeon._onnx.file import open_onnx
from surgeon.errors import OnnxFileError

TENSOR = helper.make_tensor_value_info


def write(path, nodes, weights=(), opset=20, shape=(2,)):
    inputs, outputs = [TENSOR("x", TensorProto.FLOAT, shape)], [TENSOR("y", TensorProto.FLOAT, ["n"])]
    graph = helper.make_graph(nodes, "made", inputs, outputs, initializer=list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def relu(path, **how):
    return write(path, [helper.make_node("Relu", ["x"], ["y"])], **how)


def opened(path):
    with open_onnx(path) as file:
        return file.runtime.inputs, file.runtime.outputs


def test_a_good_file_opens(tmp_path):
    assert opened(relu(tmp_path / "m.onnx")) == (("x",), ("y",))


def test_the_process_ends_with_the_file(tmp_path):
    with open_onnx(relu(tmp_path / "m.onnx")) as file:
        process = file.runtime._process
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize("opset", [99, 1000])
def test_opset_of_the_future(tmp_path, opset):
    with pytest.raises(OnnxFileError, match=rf"m.onnx is written in opset {opset}; the installed onnx"):
        opened(relu(tmp_path / "m.onnx", opset=opset))


@pytest.mark.parametrize("kept", [1, 10, 40, 80])
def test_truncated(tmp_path, kept):
    path = relu(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) * kept // 100])
    with pytest.raises(OnnxFileError, match=r"m\.onnx is no valid ONNX model|m\.onnx: the file is empty"):
        opened(path)


def test_noise_in_the_bytes_never_crashes(tmp_path):
    path, generator = relu(tmp_path / "m.onnx"), np.random.default_rng(0)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(3):
        noisy = data.copy()
        noisy[generator.integers(0, len(data), 3)] = generator.integers(0, 256, 3)
        path.write_bytes(noisy.tobytes())
        with contextlib.suppress(OnnxFileError):  # Noise in a name does no harm.
            assert opened(path) == (("x",), ("y",))


def external(path, location):
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], np.zeros(2, np.float32).tobytes(), raw=True)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    return write(path, [helper.make_node("Add", ["x", "w"], ["y"])], [weight])


def test_external_data_outside_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "inner").mkdir()
    for location in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(OnnxFileError, match="no valid ONNX model"):
            opened(external(tmp_path / "inner" / "m.onnx", location))


def test_external_data_that_is_missing(tmp_path):
    with pytest.raises(OnnxFileError, match="or without its external data"):
        opened(external(tmp_path / "m.onnx", "gone.data"))


def test_more_memory_than_there_is(tmp_path):
    size = helper.make_tensor("size", TensorProto.INT64, [2], [1 << 20, 1 << 30])
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, [size])
    with pytest.raises(OnnxFileError, match=r"ONNX Runtime (cannot load|failed)"), open_onnx(path) as file:
        file.runtime.run([torch.zeros(2)])


def test_a_crash_is_an_error(tmp_path, monkeypatch):
    program = tmp_path / "crash.py"
    program.write_text(
        "import os, signal, sys\n"
        "print('a word', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setattr(_onnx_file, "_PROGRAM", program)
    message = rf"was ended by signal {signal.SIGSEGV:d}; the file may be damaged or hostile: a word"
    with pytest.raises(OnnxFileError, match=message):
        opened(relu(tmp_path / "m.onnx"))


def test_a_file_that_never_ends_is_stopped(tmp_path, monkeypatch):
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["again"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [TENSOR("i", TensorProto.INT64, []), TENSOR("c", TensorProto.BOOL, []), TENSOR("v", 1, [2])],
        [TENSOR("again", TensorProto.BOOL, []), TENSOR("w", TensorProto.FLOAT, [2])],
    )
    loop = helper.make_node("Loop", ["", "flag", "x"], ["y"], body=body)
    path = write(tmp_path / "m.onnx", [loop], [flag])
    with open_onnx(path) as file:
        monkeypatch.setattr(_onnx_file, "TIME_LIMIT_S", 0.5)
        with pytest.raises(OnnxFileError, match=r"ONNX Runtime failed on x \(2,\): no answer in 0.5 s"):
            file.runtime.run([torch.zeros(2)])


def test_checker_sees_what_the_runtime_would_take(tmp_path):
    path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["nowhere"], ["y"])])
    with pytest.raises(OnnxFileError, match=r"no valid ONNX model.*nowhere"):
        opened(path)
    assert onnx.load(path).graph.node[0].input == ["nowhere"]
