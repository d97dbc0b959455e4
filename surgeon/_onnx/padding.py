"""Keeps the zeros in front of a max pool from being taken for the pool's own padding.

ONNX Runtime's optimiser takes a `Pad` with zeros into the `MaxPool` behind it (its PadFusion, from
microsoft/onnxruntime#18136 to 1.31; 1.32 no longer does). But a pool pads with -inf: where a window at the
border holds nothing but negative numbers, zeros win and -inf does not. It looks for the bits of +0, so -0
stays in the graph, and a comparison takes the two for equal. A file outlives the runtime beside which it was
written, so it is written so that older ones read it right, too.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from surgeon._onnx.constants import constant, initializer

_VALUE = 2  # the input of a Pad that says with what


def keep_zeros(model: ir.Model) -> int:
    """Pads with -0 what a max pool reads padded with 0, in place; returns how many nodes that were."""
    pads = [node for node in model.graph if node.op_type == "Pad" and _with_zeros(node)]
    pooled = [pad for pad in pads if any(reader.op_type == "MaxPool" for reader in _readers(pad))]
    for pad in pooled:
        kind = pad.inputs[0].dtype if pad.inputs[0] is not None else None
        zero = np.array(-0.0, (kind or ir.DataType.FLOAT).numpy())
        pad.resize_inputs(max(len(pad.inputs), _VALUE + 1))
        pad.replace_input_with(_VALUE, initializer(model.graph, f"{pad.name}_value", zero))
    if pooled:
        RemoveUnusedNodesPass()(model)  # and with them the constants that were +0
    return len(pooled)


def _with_zeros(pad: ir.Node) -> bool:
    if pad.attributes.get_string("mode", "constant") != "constant":
        return False
    if len(pad.inputs) <= _VALUE or pad.inputs[_VALUE] is None:
        return True
    value = constant(pad.inputs[_VALUE])
    return value is not None and value.dtype.kind == "f" and not value.any()


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    """Who reads what a node gives, also behind a change of type, which ONNX Runtime looks through."""
    for use in node.outputs[0].uses():
        yield from _readers(use.node) if use.node.op_type == "Cast" else (use.node,)
