"""What an evaluating graph must not hold: chance, training mode, control flow, anything of surgeon's own.

Each finding is a node and a reason. A graph without findings gives the same outputs for the same inputs.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_BRANCHING = frozenset({"If", "Loop", "Scan"})
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class GraphFinding:
    """One node that does not belong in an evaluating graph.

    Attributes:
        node: The node's name; its operator and position where it has none.
        op_type: The operator, with its domain where that is not ONNX's own.
        code: ``"random"``, ``"training"``, ``"branching"`` or ``"gate"``.
        reason: The same as a sentence.
    """

    node: str
    op_type: str
    code: str
    reason: str


def graph_findings(model: ir.Model) -> tuple[GraphFinding, ...]:
    """The findings of a model, its subgraphs and its functions; the model is only read."""
    found = []
    for index, node in enumerate(all_nodes(model)):
        fault = _fault(node)
        if fault is not None:
            found.append(GraphFinding(node.name or f"{node.op_type}[{index}]", _op(node), *fault))
    return tuple(found)


def node_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator a model holds, most frequent first."""
    counts = Counter(_op(node) for node in all_nodes(model))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the graph, of the subgraphs in it and of the functions beside it."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def _op(node: ir.Node) -> str:
    return node.op_type if node.domain in _STANDARD else f"{node.domain}::{node.op_type}"


def _fault(node: ir.Node) -> tuple[str, str] | None:
    if node.domain not in _STANDARD:
        ours = node.domain.split(".")[0] == "surgeon"
        return ("gate", "a gate of surgeon was left in the graph") if ours else None
    if node.op_type in _RANDOM:
        return "random", "it draws random numbers, so outputs differ from run to run"
    if node.op_type in _BRANCHING:
        return "branching", "control flow was left in the graph"
    if node.op_type == "BatchNormalization" and _normalises_by_batch(node):
        return "training", "it normalises by the statistics of the batch"
    if node.op_type == "Dropout" and _drops(node):
        return "training", "it drops values at random"
    return None


def _normalises_by_batch(node: ir.Node) -> bool:
    mode = node.attributes.get("training_mode")
    return (mode is not None and mode.as_int() == 1) or len([out for out in node.outputs if out.uses()]) > 1


def _drops(node: ir.Node) -> bool:
    # Since opset 12 training_mode is the third input; absent means evaluation, computed could mean anything.
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    constant = ir.convenience.get_const_tensor(node.inputs[2])
    return constant is None or bool(constant.numpy().item())
