"""Constants of a graph, read and made."""

import numpy as np
import onnx_ir as ir

from surgeon._onnx.parity import Array


def constant(value: ir.Value | None) -> Array | None:
    """The numbers of a value that no input can change; None if it is computed, or absent."""
    held = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return None if held is None else held.numpy()


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new constant of the graph."""
    tensor = ir.tensor(np.asarray(array), name=name)
    made = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
    )
    graph.register_initializer(made)
    return made
