"""surgeon: stochastic depth into, and out of, networks that already exist.

surgeon.apply(model, schedule="linear")     # gates on every residual add, in place
...                                         # train as ever
surgeon.export(model, "model.onnx")         # folded, checked, plain ONNX
"""

import importlib
from typing import TYPE_CHECKING, Any

from surgeon._version import __version__
from surgeon.errors import SurgeonError

if TYPE_CHECKING:
    from surgeon._checkpoint import save_checkpoint
    from surgeon._column import column
    from surgeon._compile import compile  # noqa: A004 - as torch has it
    from surgeon._load import load
    from surgeon._meter import DepthMeter
    from surgeon._onnx.export import export
    from surgeon._onnx.latency import latency
    from surgeon._onnx.verify import verify
    from surgeon._plan import plan
    from surgeon._probe import Probe
    from surgeon._pruning.lesion import lesion
    from surgeon._pruning.paths import path_gradients
    from surgeon._pruning.prune import prune
    from surgeon._ramp import Ramp
    from surgeon._removal import fold, remove
    from surgeon._retrace import retrace
    from surgeon._sample import calibration, sample
    from surgeon._source import load_model
    from surgeon._surgery import apply, find, set_drop_rate, status

__all__ = [
    "DepthMeter",
    "Probe",
    "Ramp",
    "SurgeonError",
    "__version__",
    "apply",
    "calibration",
    "column",
    "compile",
    "export",
    "find",
    "fold",
    "latency",
    "lesion",
    "load",
    "load_model",
    "path_gradients",
    "plan",
    "prune",
    "remove",
    "retrace",
    "sample",
    "save_checkpoint",
    "set_drop_rate",
    "status",
    "verify",
]

_HOMES = {
    "DepthMeter": "_meter",
    "Probe": "_probe",
    "Ramp": "_ramp",
    "apply": "_surgery",
    "calibration": "_sample",
    "column": "_column",
    "compile": "_compile",
    "export": "_onnx.export",
    "find": "_surgery",
    "fold": "_removal",
    "latency": "_onnx.latency",
    "lesion": "_pruning.lesion",
    "load": "_load",
    "load_model": "_source",
    "path_gradients": "_pruning.paths",
    "plan": "_plan",
    "prune": "_pruning.prune",
    "remove": "_removal",
    "retrace": "_retrace",
    "sample": "_sample",
    "save_checkpoint": "_checkpoint",
    "set_drop_rate": "_surgery",
    "status": "_surgery",
    "verify": "_onnx.verify",
}


def __getattr__(name: str) -> Any:
    """Loads a function's room when it is first asked for: the command line answers before torch loads."""
    if name not in _HOMES:
        raise AttributeError(f"module 'surgeon' has no attribute {name!r}")
    if name in ("export", "latency", "verify"):
        from surgeon._needs import EXPORTS, RUNS_ONNX, need

        need(f"surgeon.{name}", *(RUNS_ONNX if name == "verify" else EXPORTS))
    found = getattr(importlib.import_module(f"surgeon.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
