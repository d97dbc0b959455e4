"""What an ONNX file says of itself, and the checks of what is to be said."""

import json
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from surgeon._checkpoint import strings
from surgeon._needs import installed
from surgeon._onnx.signature import Signature
from surgeon._version import __version__
from surgeon.errors import UsageError


def check_told(labels: Sequence[str] | None, metadata: Mapping[str, object] | None) -> None:
    """Checks what a user wants to be said.

    Raises:
        UsageError: The labels are no sequence of strings, or a value cannot be written as JSON.
    """
    listed = labels is None or (isinstance(labels, Sequence) and not isinstance(labels, str))
    if not listed or any(not isinstance(one, str) for one in labels or ()):
        raise UsageError(f"labels is {labels!r}; give the names of the classes, one string for each")
    for key, value in (metadata or {}).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise UsageError(
                f"metadata[{key!r}] is a {kind}, which has no JSON; give a number, a string or a list"
            ) from error


def describe(
    model: nn.Module,
    called: Signature,
    graph: ir.Model,
    labels: Sequence[str] | None,
    more: Mapping[str, object],
) -> dict[str, str]:
    """What is known of a model, for the properties of its file; ``more`` wins over what is found.

    Raises:
        UsageError: There are more or fewer labels than classes.
    """
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    classes = _classes(graph)
    if labels is not None and classes is not None and len(labels) != classes:
        raise UsageError(f"there are {len(labels)} labels for the {classes} classes of the model")
    found: dict[str, object] = {
        "model": config.get("architecture") or type(model).__name__,
        "input_size": list(called.tensors[0].shape[1:]),
        "mean": config.get("mean"),
        "std": config.get("std"),
        "num_classes": classes,
        "labels": list(labels) if labels is not None else None,
        **more,
        "surgeon": __version__,
        "torch": torch.__version__,
        "timm": installed("timm"),
        "onnx": onnx.__version__,
        "onnxscript": installed("onnxscript"),
        "onnxruntime": onnxruntime.__version__,
    }
    return strings(found)


def _classes(graph: ir.Model) -> int | None:
    shape = graph.graph.outputs[0].shape
    last = shape[-1] if shape is not None and len(shape) == 2 else None
    return last if isinstance(last, int) else None
