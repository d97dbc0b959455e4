"""Where an ONNX graph departs from a PyTorch model: the first node whose result PyTorch does not have.

Names are no help with a file of unknown origin, numbers are. The model runs once with an eye on every
operator, the graph with every value as an output, and a value of the graph is *known* if PyTorch computed the
same numbers, in any layout. Exporters split operators and fuse them, so a value that is not known may still
be right; it is right if something computed from it is known. What is left are the values that are wrong, and
the first node among them whose inputs are all right is where the two part. Among the few nodes there, one
whose weight is the model's but for some values is named before the others.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from surgeon._folding.evaluation import evaluating, noting
from surgeon._onnx.exporter import MODULE
from surgeon._onnx.file import OnnxFile
from surgeon._onnx.parity import Array, Divergence
from surgeon._onnx.signature import Signature, tensors_by_name
from surgeon._torch import TorchDispatchMode, pytree
from surgeon.errors import OnnxFileError

_PARTS = {"Gather", "GatherElements", "GatherND", "Slice", "Split"}
_AT_ONCE = 64  # values of the graph that are held at a time
_NEAR = 12  # nodes behind the first wrong one that are searched for a weight that is off


def first_divergence(
    model: nn.Module, called: Signature, file: OnnxFile, tensors: Sequence[Tensor], tolerance: float
) -> Divergence | None:
    """Where a file departs from an evaluating model on these inputs; the model is only read.

    Args:
        model: The model.
        called: How it is called.
        file: The file; it may come from anywhere. It is left open with every value as an output.
        tensors: Inputs on which the two differ.
        tolerance: Largest relative error that counts as agreement. Values inside are compared ten times
            as strictly, since differences grow on their way to the output.

    Returns:
        None if every value of the graph is known, or if it cannot be run with all of them as outputs.
    """
    seen, results = _watch(model, called, tensors)
    returned = _comparable(file, results)
    try:
        file.runtime.open(expose=True)
        known = _known(file, tensors, seen, tolerance / 10)
        values = file.runtime.run(tensors, list(returned)) if returned else []
        for name, value in zip(returned, values, strict=True):
            same_form = value.shape == returned[name].values.shape
            known[name] = same_form and returned[name].distance(value)[1] <= tolerance
    except OnnxFileError:
        return None
    wrong = _wrong(file.model.graph, known)
    if not wrong:
        return None
    node, note = _with_a_bad_weight(wrong, dict(model.state_dict())) or (wrong[0], "")
    name = node.outputs[0].name or ""
    label = node.metadata_props.get(MODULE, "")
    value = file.runtime.run(tensors, [name])[0]
    near = returned.get(name) or _nearest(value, seen, label)
    near = near if near and near.values.size == value.size else None
    absolute, relative = near.distance(value) if near else (float("nan"), float("nan"))
    return Divergence(
        node=node.name or name,
        op_type=node.op_type,
        module=label or (near.module if near else ""),
        operator=near.operator if near else "",
        absolute=absolute,
        relative=relative,
        note=note,
    )


@dataclass(slots=True)
class _Seen:
    """One value that PyTorch computed."""

    module: str
    operator: str
    values: Array
    low: float = field(init=False)
    high: float = field(init=False)
    mean: float = field(init=False)
    _ordered: Array | None = None

    def __post_init__(self) -> None:
        self.low, self.high = float(self.values.min()), float(self.values.max())
        self.mean = float(self.values.mean(dtype=np.float64))

    def same(self, values: Array, close: float) -> bool:
        """Whether these are the same numbers, in any layout."""
        within = close * max(abs(self.low), abs(self.high))
        mean = values.mean(dtype=np.float64)
        apart = (values.min() - self.low, values.max() - self.high, mean - self.mean)
        if not all(abs(difference) <= within for difference in apart):
            return False
        flat = values.ravel()
        if np.abs(flat - self.values.ravel()).max() <= within:
            return True
        if self._ordered is None:
            self._ordered = np.sort(self.values, axis=None)
        return bool(np.abs(np.sort(flat) - self._ordered).max() <= within)

    def unlikeness(self, values: Array) -> float:
        """How far apart most numbers are, relative to the largest; a few outliers do not count."""
        return float(np.median(np.abs(values.ravel() - self.values.ravel()))) / max(
            abs(self.low), abs(self.high)
        )

    def distance(self, values: Array) -> tuple[float, float]:
        """The largest absolute difference in this layout, and the same relative to the largest value."""
        absolute = float(np.abs(values.ravel() - self.values.ravel()).max())
        largest = max(abs(self.low), abs(self.high))
        return absolute, absolute / largest if largest else absolute


class _Watch(TorchDispatchMode):
    """Keeps the result of every operator, with the module that was running."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: list[str] = []
        self.seen: list[_Seen] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            # The same numbers in another layout are known; a part of them (one of q, k and v) is not.
            if isinstance(leaf, Tensor) and not (func.is_view and leaf.numel() == args[0].numel()):
                self._keep(func.__name__, leaf)
        if func is torch.ops.aten.addmm.default:  # ONNX has a product here, and then a sum.
            self._keep("mm.default", result - args[0])
        return result

    def _keep(self, operator: str, tensor: Tensor) -> None:
        values = tensor.detach().cpu()
        if values.is_floating_point() and _says_something(array := values.numpy()):
            module = next((name for name in reversed(self.running) if name), "")
            self.seen.append(_Seen(module, f"aten.{operator}", array.copy()))


def _says_something(array: Array) -> bool:
    """Whether an array has numbers by which it can be known again: several, finite, not all alike."""
    return array.dtype.kind == "f" and array.size > 1 and bool(np.isfinite(array).all() and np.ptp(array) > 0)


def _watch(
    model: nn.Module, called: Signature, tensors: Sequence[Tensor]
) -> tuple[dict[int, list[_Seen]], dict[str, Array]]:
    """What PyTorch computes, by size, and what it returns."""
    watch = _Watch()
    with evaluating(model), noting(model, watch.running), watch:
        results = {n: one.detach().numpy() for n, one in tensors_by_name(called.call(model, tensors))}
    found = defaultdict(list)
    for one in watch.seen:
        found[one.values.size].append(one)
    return found, results


def _known(
    file: OnnxFile, tensors: Sequence[Tensor], seen: Mapping[int, list[_Seen]], close: float
) -> dict[str, bool]:
    """For each value of the graph that can be compared, whether PyTorch computed it too."""
    names = [out.name for node in file.model.graph for out in node.outputs if out.name]
    found: dict[str, bool] = {}
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        for name, value in zip(some, file.runtime.run(tensors, some), strict=True):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                found[name] = False
            elif _says_something(value):
                found[name] = any(one.same(value, close) for one in seen.get(value.size, ()))
    return found


def _comparable(file: OnnxFile, results: Mapping[str, Array]) -> dict[str, _Seen]:
    """What the model returns, by the names of the file's outputs, where it has numbers to compare.

    A value that the model computes, but does not return there, is no output of it: without its bias, say.
    """
    outputs = [(given.name or "", given.shape) for given in file.model.graph.outputs]
    named = results.keys() == {name for name, _ in outputs}
    wanted = [results[name] for name, _ in outputs] if named else list(results.values())
    pairs = zip(outputs, wanted, strict=False)
    fitting = ((name, want) for (name, shape), want in pairs if shape is None or len(shape) == want.ndim)
    return {name: _Seen("", "", want) for name, want in fitting if _says_something(want)}


def _wrong(graph: ir.Graph, known: Mapping[str, bool]) -> list[ir.Node]:
    """The first wrong node and some wrong ones computed from it, in order; empty if none is wrong."""
    nodes = list(graph)
    right, varying = _right(nodes, known), _varying(graph)
    bad = [node for node in nodes if node in varying and _compared(node, known) and node not in right]
    spoiled = set(bad)
    for node in nodes:  # What cannot be compared is as wrong as what it is computed from.
        if node not in right and _reads(node, spoiled):
            spoiled.add(node)
    found = [node for node in bad if not _reads(node, spoiled)][:1]
    for node in bad:
        if len(found) < _NEAR and _reads(node, found):
            found.append(node)
    return found


def _right(nodes: Sequence[ir.Node], known: Mapping[str, bool]) -> set[ir.Node]:
    """The nodes whose result, or something computed from it, is known."""
    right: set[ir.Node] = set()
    for node in reversed(nodes):
        # What takes a part of a result (one of q, k and v) tells nothing of the others.
        later = [use.node for out in node.outputs for use in out.uses() if use.node.op_type not in _PARTS]
        if any(known.get(out.name or "") for out in node.outputs) or any(
            after in right and _compared(after, known) for after in later
        ):
            right.add(node)
    return right


def _reads(node: ir.Node, others: Collection[ir.Node]) -> bool:
    return any(given.producer() in others for given in node.inputs if given is not None)


def _compared(node: ir.Node, known: Mapping[str, bool]) -> bool:
    return any(out.name in known for out in node.outputs)


def _varying(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that depend on an input of the graph."""
    values = {given for given in graph.inputs if given.name not in graph.initializers}
    nodes = set()
    for node in graph:
        if any(given in values for given in node.inputs):
            nodes.add(node)
            values.update(node.outputs)
    return nodes


def _with_a_bad_weight(nodes: Sequence[ir.Node], state: Mapping[str, Any]) -> tuple[ir.Node, str] | None:
    """The first of some nodes of one module that has a weight of the model's with some values changed."""
    label = nodes[0].metadata_props.get(MODULE, "")
    for node in nodes:
        if node.metadata_props.get(MODULE, "") != label:
            continue
        for given in node.inputs:
            constant = None if given is None else ir.convenience.get_const_tensor(given)
            note = "" if constant is None else _changed(constant.numpy(), state)
            if note:
                return node, note
    return None


def _changed(weight: Array, state: Mapping[str, Any]) -> str:
    """What is off in a weight, if it is one of the model's with most values as they were."""
    best: tuple[int, str, float] | None = None
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.numel() != weight.size or weight.size < 2:
            continue
        mine = tensor.detach().cpu().numpy()
        for layout in (mine, mine.T):
            differ = layout.ravel() != weight.ravel()
            count = int(differ.sum())
            if count == 0:
                return ""
            if best is None or count < best[0]:
                best = count, name, float(np.abs(layout.ravel() - weight.ravel()).max())
    if best is None or best[0] > weight.size / 2:
        return ""
    return f"{best[1]} differs in {best[0]} of {weight.size} values, by up to {best[2]:.3g}"


def _nearest(value: Array, seen: Mapping[int, list[_Seen]], label: str) -> _Seen | None:
    """PyTorch's counterpart of a wrong value: the closest of its size, of the same module if there is one."""
    candidates = seen.get(value.size, [])
    inside = [one for one in candidates if one.module == label] if label else []
    return min(inside or candidates, key=lambda one: one.unlikeness(value), default=None)
