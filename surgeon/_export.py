"""From a model, gated or not, to one plain ONNX file, compared with the model before it is put in place."""

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from surgeon._checkpoint import non_finite, strings
from surgeon._divergence import first_divergence
from surgeon._export_report import ExportReport
from surgeon._exporter import to_onnx
from surgeon._files import beside, destination, settle
from surgeon._hygiene import graph_findings, node_counts
from surgeon._onnx_file import OnnxFileError, open_onnx
from surgeon._parity import OutputsDifferError, ParityReport, compare
from surgeon._plain import check_plain
from surgeon._signature import Signature, evaluating_copy, signature
from surgeon._verify import check_comparison, compare_runs, evaluate
from surgeon._version import __version__
from surgeon.errors import ExportError, UsageError

# An ONNX file is one protobuf message, which ends at 2 GB; the graph itself needs some of that.
_ONE_FILE_LIMIT = 2**31 - 2**27
_SEED = 0


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Any = None,
    opset: int | None = None,
    overwrite: bool = False,
    dynamic_batch: bool = True,
    metadata: Mapping[str, object] | None = None,
    labels: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 3),
    tolerance: float = 1e-4,
) -> ExportReport:
    """Writes a model as one plain ONNX file and returns a report; the model is only read.

    A copy is folded if it is gated, converted, checked (valid; nothing random, no gate, no training mode, no
    control flow) and compared with the model as it evaluates, in ONNX Runtime on random inputs. Only then is
    the file renamed into place: whatever goes wrong, nothing partial has its name. A model above 2 GB gets a
    ``.data`` file beside it.

    Args:
        model: The model, gated or plain; it is evaluated on the CPU whatever its mode and device.
        path: The file to write.
        example: A tensor, a tuple of arguments or a dict of keyword arguments whose shapes the graph takes.
            Without it: one image of the size in timm's ``pretrained_cfg``, else 3 x 224 x 224.
        opset: Version of ONNX's operators; None is the default of PyTorch's exporter.
        overwrite: Whether an existing file may be replaced.
        dynamic_batch: Whether the graph takes any batch size. A fixed one is the example's, or 1.
        metadata: More to write into the file, as ``{"dataset": "digits"}``; wins over what is found.
        labels: Names of the classes, in order.
        batch_sizes: Sizes to compare at.
        tolerance: Largest relative error that counts as agreement.

    Raises:
        WrappedModelError: The model is wrapped (DDP, torch.compile, ...); give the plain one.
        UsageError: The path cannot be written, or an argument does not fit; found before any work.
        ExportError: The exporter failed, weights are not finite, or the graph holds what it must not.
        ParityError: The graph computes something else; the message names the worst output.

    Example:
        >>> report = export(model, "model.onnx", overwrite=True)  # doctest: +SKIP
        >>> report.parity.worst.relative < 1e-4  # doctest: +SKIP
        True
    """
    started = time.perf_counter()
    place = destination(path, overwrite=overwrite)
    check_plain(model)
    check_comparison(batch_sizes, tolerance)
    _check_opset(opset)
    _check_weights(model)
    reference = evaluating_copy(model)
    plain, gates = _without_gates(reference)
    called = signature(plain, example)
    if not dynamic_batch and example is None:
        called = signature(plain, called.tensors[0][:1])
    graph = to_onnx(plain, called, opset=opset, dynamic_batch=dynamic_batch)
    _check_graph(graph, type(model).__name__)
    _check_labels(labels, graph)
    noted = _metadata(model, called, graph, gates, labels, metadata)
    graph.metadata_props.update(noted)
    with beside(place) as folder:
        made = folder / place.name
        data = _save(graph, made, place)
        parity = _compare((reference, plain), called, made, path, batch_sizes, tolerance)
        size = sum(file.stat().st_size for file in folder.iterdir())
        _move(made, data, place)
    return ExportReport(
        path=str(path),
        data=str(place.parent / data) if data else None,
        bytes=size,
        opset=graph.opset_imports.get("", 0),
        inputs={str(given.name): _dimensions(given) for given in graph.graph.inputs},
        nodes=node_counts(graph),
        folded=gates.folded,
        kept=gates.kept,
        parity=parity,
        metadata=noted,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Gates:
    folded: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, object], ...] = ()


def _without_gates(model: nn.Module) -> tuple[nn.Module, _Gates]:
    """A folded copy of a gated model; a plain model itself."""
    import surgeon
    from surgeon._surgery import is_gated

    if not is_gated(model):
        return model, _Gates()
    before = surgeon.status(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns of gates that keep a factor; the report lists them.
        plain = surgeon.fold(model)
    left = surgeon.status(plain).gates if is_gated(plain) else ()
    kept = tuple((gate.name, gate.note) for gate in left)
    folded = tuple(gate.name for gate in before.gates if gate.name not in dict(kept))
    first = before.gates[0]
    settings = {
        "schedule": before.schedule,
        "drop_rate": max(gate.drop_rate for gate in before.gates),
        "scaling": first.scaling,
        "unit": first.unit,
    }
    return plain, _Gates(folded, kept, tuple(settings.items()))


def _check_opset(opset: int | None) -> None:
    latest = onnx.defs.onnx_opset_version()
    if opset is not None and not 7 <= opset <= latest:
        raise UsageError(f"opset is {opset}; the installed onnx {onnx.__version__} knows 7 to {latest}")


def _check_weights(model: nn.Module) -> None:
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name, value in state.items():
        if value.is_meta:
            raise UsageError(f"{type(model).__name__} has no weights yet: {name} is on the meta device")
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"{type(model).__name__} holds {value.dtype} in {name}, too coarse for the comparison; "
                "export model.float()"
            )
    bad = non_finite(state)
    if bad:
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise ExportError(
            f"{type(model).__name__} holds values that are not finite: {', '.join(bad[:4])}{more}"
        )


def _check_graph(graph: ir.Model, kind: str) -> None:
    findings = graph_findings(graph)
    if findings:
        listed = "; ".join(f"{found.node} ({found.op_type}): {found.reason}" for found in findings[:3])
        raise ExportError(
            f"the graph of {kind} does not only evaluate, it holds {len(findings)} of what must not be "
            f"there: {listed}. Nothing was written"
        )


def _check_labels(labels: Sequence[str] | None, graph: ir.Model) -> None:
    shape = graph.graph.outputs[0].shape
    classes = shape[-1] if shape is not None and len(shape) == 2 else None
    if labels is not None and isinstance(classes, int) and len(labels) != classes:
        raise UsageError(f"there are {len(labels)} labels for the {classes} classes of the model")


def _metadata(
    model: nn.Module,
    called: Signature,
    graph: ir.Model,
    gates: _Gates,
    labels: Sequence[str] | None,
    more: Mapping[str, object] | None,
) -> dict[str, str]:
    import onnxscript
    import timm

    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    shape = graph.graph.outputs[0].shape
    classes = shape[-1] if shape is not None and len(shape) == 2 else None
    found: dict[str, object] = {
        "model": config.get("architecture") or type(model).__name__,
        "input_size": list(called.tensors[0].shape[1:]),
        "mean": config.get("mean"),
        "std": config.get("std"),
        "num_classes": classes if isinstance(classes, int) else None,
        "labels": list(labels) if labels is not None else None,
        **dict(gates.settings),
        **dict(more or {}),
        "surgeon": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    return strings(found)


def _save(graph: ir.Model, made: Path, place: Path) -> str | None:
    """Writes the graph; returns the name of the data file beside it, if it needs one."""
    weights = sum(
        value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value
    )
    data = None if weights <= _ONE_FILE_LIMIT else _free_name(place)
    try:
        ir.save(graph, made, external_data=data)
    except OSError as error:
        raise ExportError(f"cannot write {place}: {error}; nothing was left behind") from error
    return data


def _free_name(place: Path) -> str:
    """A name for the weights that no file has: the old graph reads the old weights until it is replaced."""
    first = f"{place.name}.data"
    later = (f"{place.name}.{number}.data" for number in range(1, 1000))
    return next(name for name in (first, *later) if not (place.parent / name).exists())


def _move(made: Path, data: str | None, place: Path) -> None:
    stale = [old for old in place.parent.glob(f"{place.name}.*data") if _is_ours(old, place)]
    if data is not None:
        settle(made.with_name(data), place.with_name(data))
    settle(made, place)
    for old in stale:
        old.unlink()


def _is_ours(old: Path, place: Path) -> bool:
    number = old.name.removeprefix(f"{place.name}.").removesuffix("data").removesuffix(".")
    return number == "" or number.isdigit()


def _compare(
    models: tuple[nn.Module, nn.Module],
    called: Signature,
    made: Path,
    path: str | os.PathLike[str],
    batch_sizes: Sequence[int],
    tolerance: float,
) -> ParityReport:
    """Compares the file with the first of two models, gates and all; the second is the folded one."""
    reference, plain = models
    try:
        with open_onnx(made) as file:
            rows, differing = compare_runs(reference, called, file, batch_sizes, tolerance, _SEED)
            blame, parting = "", None
            if differing is not None:
                blame = _blame(reference, plain, called, differing, tolerance)
                parting = first_divergence(plain, called, file, differing, tolerance)
            findings = graph_findings(file.model)
    except OnnxFileError as error:
        told = str(error).replace(str(made), str(path))
        raise ExportError(f"{told}. Nothing was written to {path}") from error
    report = ParityReport(str(path), tuple(rows), findings, tolerance, _SEED, parting)
    if not report.ok:
        what = f"the ONNX graph of {type(reference).__name__} computes something else{blame}"
        raise OutputsDifferError(f"{what}: {report.fault}. No file was written to {path}", report)
    return report


def _blame(
    gated: nn.Module, plain: nn.Module, called: Signature, tensors: Sequence[Tensor], tolerance: float
) -> str:
    """Which step is at fault: the fold, if the folded model already differs in PyTorch, else the exporter."""
    if gated is plain:
        return ""
    before, after = (evaluate(model, called, tensors) for model in (gated, plain))
    rows = compare(before, list(after.values()), batch=len(tensors[0]), tolerance=tolerance)
    if all(row.ok for row in rows):
        return ", and it is not the fold: in PyTorch the folded model agrees with the gated one"
    return ", and the fold is at fault: in PyTorch the folded model already differs from the gated one"


def _dimensions(value: ir.Value) -> tuple[int | str, ...]:
    shape = value.shape if value.shape is not None else ()
    return tuple(size if isinstance(size, int) else str(size) for size in shape)
