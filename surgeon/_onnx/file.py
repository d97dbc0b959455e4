"""An ONNX file opened for a look and for running: checked by onnx, run by ONNX Runtime on the CPU.

Both happen in a process of their own (`surgeon._onnx.child`), so that a file which makes them crash, hang or
take all memory ends in an `OnnxFileError`.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from surgeon._onnx.parity import Array
from surgeon.errors import OnnxFileError

_ERRORS = "stderr"
_PROGRAM = Path(__file__).with_name("child.py")
# No answer to one request in this many seconds, and the file is taken for one that never ends.
TIME_LIMIT_S = 1800.0


class _NoAnswerError(Exception):
    """The other process answered with an error, or not at all."""


class Runtime:
    """The process in which onnx and ONNX Runtime work on one file; see `runtime`."""

    def __init__(self, path: Path, folder: Path, process: subprocess.Popen[str], reader: Executor) -> None:
        self.path = path
        self.inputs: tuple[str, ...] = ()
        self.outputs: tuple[str, ...] = ()
        self._folder = folder
        self._process = process
        self._reader = reader
        self._count = itertools.count()

    def check(self) -> None:
        """Checks that the file is a valid model.

        Raises:
            OnnxFileError: It is not.
        """
        try:
            self._ask(do="check", path=str(self.path))
        except _NoAnswerError as error:
            raise OnnxFileError(
                f"{self.path} is no valid ONNX model; it may be truncated, of another kind, or without its "
                f"external data: {error}"
            ) from error

    def open(self, **how: Any) -> None:
        """Opens the model in ONNX Runtime with as many threads as PyTorch uses.

        Args:
            how: ``level``, ``expose``, ``optimized`` and ``data`` of `surgeon._onnx.child.Child.open`.

        Raises:
            OnnxFileError: ONNX Runtime cannot load it, with its reason.
        """
        try:
            found = self._ask(do="open", path=str(self.path), threads=torch.get_num_threads(), **how)
        except _NoAnswerError as error:
            raise OnnxFileError(f"ONNX Runtime cannot load {self.path}: {error}") from error
        self.inputs, self.outputs = tuple(found["inputs"]), tuple(found["outputs"])

    def halve(self, into: Path, data: str | None) -> None:
        """Writes a file whose arithmetic is in float16, inputs and outputs as they were.

        Raises:
            OnnxFileError: ONNX Runtime's converter fails, with its reason.
        """
        try:
            self._ask(do="halve", path=str(self.path), into=str(into), data=data)
        except _NoAnswerError as error:
            raise OnnxFileError(f"ONNX Runtime cannot convert {self.path} to float16: {error}") from error

    def run(self, tensors: Sequence[torch.Tensor], wanted: Sequence[str] | None = None) -> list[Array]:
        """The open model's outputs for these inputs, in order; only the wanted ones if they are named.

        Raises:
            OnnxFileError: ONNX Runtime refuses the inputs or fails, with its reason.
        """
        number = next(self._count)
        given, into = (self._folder / f"{number}.{what}.npz" for what in ("in", "out"))
        feed: dict[str, Any] = {str(index): tensor.numpy() for index, tensor in enumerate(tensors)}
        try:
            np.savez(given, **feed)
        except OSError as error:
            raise OnnxFileError(f"cannot hand inputs to ONNX Runtime by {self._folder}: {error}") from error
        try:
            chosen = None if wanted is None else list(wanted)
            self._ask(do="run", given=str(given), into=str(into), names=self.inputs, wanted=chosen)
        except _NoAnswerError as error:
            shapes = ", ".join(
                f"{name} {array.shape}" for name, array in zip(self.inputs, feed.values(), strict=True)
            )
            raise OnnxFileError(f"ONNX Runtime failed on {shapes}: {error}") from error
        with np.load(into, allow_pickle=False) as made:
            outputs = [made[key] for key in made.files]
        given.unlink()
        into.unlink()
        return outputs

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # Its end is found below.
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._answer())
        if "error" in answer:
            raise _NoAnswerError(answer["error"])
        return answer

    def _answer(self) -> str:
        assert self._process.stdout is not None
        reading = self._reader.submit(self._process.stdout.readline)
        try:
            line = reading.result(TIME_LIMIT_S)
        except TimeoutError as error:
            self._process.kill()
            raise _NoAnswerError(f"no answer in {TIME_LIMIT_S:g} s, so it was stopped") from error
        if line:
            return line
        raise _NoAnswerError(_ending(self._process.wait(), self._folder / _ERRORS))


def _ending(code: int, errors: Path) -> str:
    said = [line.strip() for line in errors.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((f": {line[:200]}" for line in reversed(said) if line), "")
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the process that tried it {how}; the file may be damaged or hostile{last}"


@contextlib.contextmanager
def runtime(path: Path) -> Iterator[Runtime]:
    """A process for one file, ended at the end."""
    # Waiting with a limit needs a thread: pipes cannot be waited for on every system.
    with ThreadPoolExecutor(1) as reader, tempfile.TemporaryDirectory(prefix="surgeon.") as folder:
        with (Path(folder) / _ERRORS).open("w", encoding="utf-8") as written:
            process = subprocess.Popen(  # noqa: S603 - this interpreter on surgeon's own program
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                encoding="utf-8",
            )
        with process:
            try:
                yield Runtime(path, Path(folder), process, reader)
            finally:
                process.kill()


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A valid ONNX model on disk.

    Attributes:
        path: Where it is.
        model: Its graph, for reading.
        runtime: The process that it is open in.
    """

    path: Path
    model: ir.Model
    runtime: Runtime

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return self.model.opset_imports.get("", 0)


@contextlib.contextmanager
def open_onnx(path: str | os.PathLike[str]) -> Iterator[OnnxFile]:
    """Checks an ONNX file, reads it and opens it in ONNX Runtime, until the end of the context.

    Raises:
        OnnxFileError: There is no such file, it is empty, truncated, of another kind or not valid, or ONNX
            Runtime cannot load it.
    """
    place = Path(path)
    if not place.is_file():
        raise OnnxFileError(
            f"cannot read {path}: it {'is a directory' if place.is_dir() else 'does not exist'}"
        )
    if place.stat().st_size == 0:
        raise OnnxFileError(f"cannot read {path}: the file is empty")
    with runtime(place) as process:
        process.check()
        model = ir.load(place)
        _check_opset(path, model)
        process.open()
        yield OnnxFile(place, model, process)


def _check_opset(path: str | os.PathLike[str], model: ir.Model) -> None:
    opset, latest = model.opset_imports.get("", 0), onnx.defs.onnx_opset_version()
    if opset > latest:
        raise OnnxFileError(
            f"{path} is written in opset {opset}; the installed onnx {onnx.__version__} knows those up to "
            f"{latest}"
        )
