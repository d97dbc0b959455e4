"""surgeon: stochastic depth into, and out of, networks that already exist.

    surgeon.apply(model, schedule="linear")     # gates on every residual add, in place
    ...                                         # train as ever
    surgeon.export(model, "model.onnx")         # folded, checked, plain ONNX
"""

from surgeon._surgery import apply, find, fold, remove, set_drop_rate, status
from surgeon._version import __version__
from surgeon.errors import SurgeonError

__all__ = ["SurgeonError", "__version__", "apply", "find", "fold", "remove", "set_drop_rate", "status"]
