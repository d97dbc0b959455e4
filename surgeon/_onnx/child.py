"""The program that runs foreign ONNX files: started by `surgeon._onnx.file`, it imports nothing of surgeon.

ONNX Runtime and onnx's checker are C++, and a file that lies about itself can make them crash or take all
memory. Here that ends this process and no other. Requests come as lines of JSON on stdin, each answered by
one line on stdout: the result, or ``{"error": ...}``. Arrays travel as files of numpy.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FOLDER = "session.model_external_initializers_file_folder_path"


class Child:
    """Answers requests about one file after the other."""

    def __init__(self) -> None:
        self.session: Any = None

    def check(self, path: str) -> dict[str, Any]:
        """Checks a file; by path, which also works beyond 2 GB."""
        onnx.checker.check_model(path, full_check=True)
        return {}

    def open(
        self,
        path: str,
        threads: int,
        *,
        level: str = "all",
        expose: bool = False,
        optimized: str | None = None,
        data: str | None = None,
    ) -> dict[str, Any]:
        """Opens a session.

        Args:
            path: The file.
            threads: How many threads it may use.
            level: How far ONNX Runtime optimises the graph: "none", "basic", "extended" or "all".
            expose: Whether every value of the graph becomes an output.
            optimized: Where to write the optimised graph.
            data: Name of the file beside that one which takes its weights; they are in the graph if None.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.graph_optimization_level = _LEVELS[level]
        source: Any = path
        if expose:
            source = _exposed(path)
            options.add_session_config_entry(_FOLDER, str(Path(path).parent))
        if optimized is not None:
            options.optimized_model_filepath = optimized
        if data is not None:
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return {
            "inputs": [given.name for given in self.session.get_inputs()],
            "outputs": [made.name for made in self.session.get_outputs()],
        }

    def halve(self, path: str, into: str, data: str | None = None) -> dict[str, Any]:
        """Writes a file whose arithmetic is in float16, inputs and outputs as they were."""
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        converted = convert_float_to_float16(path, keep_io_types=True)
        OnnxModel(converted).topological_sort()  # Its casts of the inputs come last.
        onnx.save(converted, into, save_as_external_data=data is not None, location=data)
        return {}

    def run(self, given: str, into: str, names: list[str], wanted: list[str] | None) -> dict[str, Any]:
        """Runs the session on the arrays in one file and writes its outputs to another."""
        with np.load(given, allow_pickle=False) as held:
            feed = {name: held[str(index)] for index, name in enumerate(names)}
        made = self.session.run(wanted, feed)
        arrays: dict[str, Any] = {str(index): np.asarray(array) for index, array in enumerate(made)}
        np.savez(into, **arrays)
        return {}


def _exposed(path: str) -> bytes:
    """The file's graph with every value as an output; the weights stay in their file if they have one."""
    model = onnx.load(path, load_external_data=False)
    known = {value.name for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name and name not in known]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    return bytes(model.SerializeToString())


def _spare_the_others() -> None:
    """Fails at an allocation beyond the machine's memory, and is the one to be killed when memory ends."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        resource.setrlimit(resource.RLIMIT_AS, (total, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    # ONNX Runtime begins with where in its sources it was and ends with what is wrong.
    return line if len(line) <= 300 else f"{line[:80]} ... {line[-200:]}"


def main() -> None:
    """Answers requests until stdin ends."""
    _spare_the_others()
    # What the libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    child = Child()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(child, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - onnx, protobuf and ONNX Runtime share no base class
            answer = {"error": _line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
