"""Takes a batch norm into the convolution or the linear layer behind it.

The exporter itself takes one into the convolution before it. What it leaves are norms that come first, as in
the classifiers of LeViT, RepViT and EfficientViT. In evaluation a norm is ``s x + t`` per channel,

    s = weight / sqrt(running_var + eps)        t = bias - s * running_mean

and the layer behind it is linear in its input, so with ``s`` along the input channels of ``W``

    W (s x + t) + b = (W s) x + (W t + b)

A convolution must not pad: zeros beside ``s x + t`` are not what ``s`` makes of zeros beside ``x``. Nothing
else may read what the norm gives.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from surgeon._onnx.constants import constant, initializer
from surgeon._onnx.parity import Array


def fuse_batchnorm(model: ir.Model) -> int:
    """Takes every norm that can be taken into the layer behind it, in place; returns how many those were."""
    norms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    fused = sum(_fused(model.graph, norm) for norm in norms)
    RemoveUnusedNodesPass()(model)
    return fused


def _fused(graph: ir.Graph, norm: ir.Node) -> bool:
    layer, affine = _only_reader(norm), _affine(norm)
    if layer is None or affine is None or not _linear(layer):
        return False
    constants = [constant(value) for value in layer.inputs[1:]]
    weight, bias = constants[0], constants[1] if len(constants) > 1 else np.zeros((), np.float32)
    if weight is None or bias is None:
        return False
    new_weight, more = _combined(layer, weight, *affine)
    made = {"weight": new_weight, "bias": more + bias}
    layer.resize_inputs(3)
    layer.replace_input_with(0, norm.inputs[0])
    for index, (what, array) in enumerate(made.items(), start=1):
        layer.replace_input_with(
            index, initializer(graph, f"{layer.name}_{what}", array.astype(weight.dtype))
        )
    graph.remove(norm, safe=True)
    return True


def _only_reader(norm: ir.Node) -> ir.Node | None:
    uses = list(norm.outputs[0].uses())
    if len(uses) != 1 or uses[0].idx != 0 or norm.outputs[0].is_graph_output():
        return None
    return uses[0].node


def _linear(layer: ir.Node) -> bool:
    """Whether the layer gives ``W x + b``, the same at every position."""
    if layer.op_type == "Gemm":
        plain = layer.attributes.get_float("alpha", 1.0) == layer.attributes.get_float("beta", 1.0) == 1.0
        return plain and not layer.attributes.get_int("transA", 0)
    padded = any(layer.attributes.get_ints("pads", ()))
    automatic = layer.attributes.get_string("auto_pad", "NOTSET")
    return layer.op_type == "Conv" and not padded and automatic in ("NOTSET", "VALID")


def _affine(norm: ir.Node) -> tuple[Array, Array] | None:
    """``s`` and ``t`` in float64; None where they are not constant, or the statistics are the batch's."""
    constants = [one for one in map(constant, norm.inputs[1:]) if one is not None]
    if len(constants) != len(norm.inputs) - 1 or norm.attributes.get_int("training_mode", False):
        return None
    weight, bias, mean, var = (one.astype(np.float64) for one in constants)
    scale = weight / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
    return scale, bias - scale * mean


def _combined(layer: ir.Node, weight: Array, scale: Array, shift: Array) -> tuple[Array, Array]:
    """``W s`` and ``W t`` in float64."""
    wide = weight.astype(np.float64)
    if layer.op_type == "Gemm":
        along = (1, -1) if layer.attributes.get_int("transB", 0) else (-1, 1)
        scaled, shifted = wide * scale.reshape(along), wide * shift.reshape(along)
        return scaled, shifted.sum(axis=along.index(-1))
    groups = layer.attributes.get_int("group", 1)
    group_of_output = np.repeat(np.arange(groups), len(wide) // groups)
    along = (*wide.shape[:2], *[1] * (wide.ndim - 2))
    scaled, shifted = (
        wide * one.reshape(groups, -1)[group_of_output].reshape(along) for one in (scale, shift)
    )
    return scaled, shifted.sum(axis=tuple(range(1, wide.ndim)))
