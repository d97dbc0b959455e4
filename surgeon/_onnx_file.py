"""An ONNX file opened for a look and for running: checked by onnx, run by ONNX Runtime on the CPU."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from surgeon._parity import Array
from surgeon.errors import SurgeonError


class OnnxFileError(SurgeonError, ValueError):
    """A file is no valid ONNX model, or ONNX Runtime cannot run it, or not on these inputs."""


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A valid ONNX model on disk.

    Attributes:
        path: Where it is.
        model: Its graph, for reading.
    """

    path: Path
    model: ir.Model

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return self.model.opset_imports.get("", 0)

    def session(self) -> onnxruntime.InferenceSession:
        """Opens the model in ONNX Runtime with as many threads as PyTorch uses.

        Raises:
            OnnxFileError: ONNX Runtime cannot load it, with its reason.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class.
            raise OnnxFileError(f"ONNX Runtime cannot load {self.path}: {first_line(error)}") from error


def open_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Reads and checks an ONNX file.

    Raises:
        OnnxFileError: There is no such file, or it is empty, truncated, of another kind or not valid.
    """
    place = Path(path)
    if not place.is_file():
        raise OnnxFileError(
            f"cannot read {path}: it {'is a directory' if place.is_dir() else 'does not exist'}"
        )
    if place.stat().st_size == 0:
        raise OnnxFileError(f"cannot read {path}: the file is empty")
    try:
        onnx.checker.check_model(str(place), full_check=True)  # By path, which also works beyond 2 GB.
        return OnnxFile(place, ir.load(place))
    except Exception as error:  # protobuf, onnx and the operating system each raise their own.
        raise OnnxFileError(
            f"{path} is no valid ONNX model; it may be truncated, of another kind, or without its external "
            f"data: {first_line(error)}"
        ) from error


def run(session: onnxruntime.InferenceSession, tensors: Sequence[torch.Tensor]) -> list[Array]:
    """The session's outputs for these inputs, in order.

    Raises:
        OnnxFileError: ONNX Runtime refuses the inputs or fails, with its reason.
    """
    names = [given.name for given in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    try:
        outputs: list[Any] = session.run(None, feed)
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in feed.items())
        raise OnnxFileError(f"ONNX Runtime failed on {shapes}: {first_line(error)}") from error
    return [np.asarray(output) for output in outputs]


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
