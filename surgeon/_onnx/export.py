"""From a model, gated or not, to one plain ONNX file, compared with the model before it is put in place."""

import copy
import functools
import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from surgeon._checkpoint import non_finite
from surgeon._files import beside, destination
from surgeon._gating.gated import is_gated, placed_gates, recorded_inputs
from surgeon._meant import says_the_call
from surgeon._onnx.batchnorm import fuse_batchnorm as take_batchnorms
from surgeon._onnx.export_file import move, write
from surgeon._onnx.export_metadata import check_told, describe
from surgeon._onnx.export_report import ExportReport
from surgeon._onnx.exporter import to_onnx
from surgeon._onnx.file import open_onnx
from surgeon._onnx.hygiene import graph_findings, node_counts
from surgeon._onnx.parity import ParityReport, compare
from surgeon._onnx.signature import LARGER, Signature, evaluating_copy, signature
from surgeon._onnx.verify import TOLERANCES, check_comparison, compare_runs, evaluate, explained
from surgeon._plain import check_filled, check_plain
from surgeon._removal import fold, remove
from surgeon._surgery import status
from surgeon._torch import check_exporter, pytree
from surgeon.errors import ExportError, OnnxFileError, OutputsDifferError, UsageError

_SEED = 0
LEVELS = ("basic", "extended", "all")


@says_the_call
def export(  # noqa: PLR0913 - each a decision of its own, by keyword only
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Any = None,
    opset: int | None = None,
    overwrite: bool = False,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    dtype: str = "float32",
    fuse_batchnorm: bool = False,
    optimize: str | None = None,
    check_nodes: bool = False,
    metadata: Mapping[str, object] | None = None,
    labels: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 3),
    tolerance: float | None = None,
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
            Without it: what `apply` was shown; of a model without gates one image of the size in timm's
            ``pretrained_cfg``, else 3 x 224 x 224.
        opset: Version of ONNX's operators; None is the default of PyTorch's exporter.
        overwrite: Whether an existing file may be replaced.
        dynamic_batch: Whether the graph takes any batch size. A fixed one is the example's, or 1.
        dynamic_size: Whether the graph takes images of any height and width.
        dtype: ``"float32"``, or ``"float16"`` for weights and arithmetic in half precision; inputs and
            outputs stay float32.
        fuse_batchnorm: Whether to take batch norms that the exporter leaves into the convolution or linear
            layer behind them; most are in the one before them anyway.
        optimize: How far ONNX Runtime optimises the graph before it is written: None leaves that to the
            session; ``"basic"`` removes nodes, ``"extended"`` fuses them into ONNX Runtime's own operators,
            ``"all"`` also chooses layouts for this machine's processor.
        check_nodes: Whether to export the ungated model too and check that its nodes are the same, but for
            one multiplication for each gate that could not be folded. It takes as long again.
        metadata: More to write into the file, as ``{"dataset": "digits"}``; wins over what is found.
        labels: Names of the classes, in order.
        batch_sizes: Sizes to compare at.
        tolerance: Largest relative error that counts as agreement; by default 1e-4, in float16 1e-2.

    Raises:
        UnsupportedTorchError: The exporter of this version of PyTorch will not do.
        WrappedModelError: The model is wrapped (DDP, torch.compile, ...); give the plain one.
        UsageError: The path cannot be written, or an argument does not fit; found before any work.
        ExportError: The exporter failed, weights are not finite, or the graph holds what it must not.
        ParityError: The graph computes something else; the message names the worst output.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5, scaling="paper")
        >>> report = surgeon.export(model, "model.onnx", overwrite=True)
        >>> report.parity.ok, report.parity.worst.relative < 1e-4
        (True, True)
    """
    started = time.perf_counter()
    check_exporter("surgeon.export")
    place = destination(path, overwrite=overwrite)
    check_plain(model)
    _check_choices(opset, dtype, optimize)
    check_told(labels, metadata)
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    check_comparison(batch_sizes, tolerance)
    _check_weights(model)
    reference = evaluating_copy(model)
    shown = _recorded(reference) if example is None else example
    plain, gates = _without_gates(reference, shown)
    called = signature(plain, shown)
    if not dynamic_batch and example is None and len(called.tensors) == 1:
        called = signature(plain, called.tensors[0][:1])
    if dynamic_size:
        _check_sizes(plain, called)
    convert = functools.partial(
        to_onnx, called=called, opset=opset, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size
    )
    graph = convert(plain)
    _check_graph(graph, type(model).__name__)
    if dtype == "float16":
        _check_range(graph)
    if check_nodes and plain is not reference:
        _check_nodes(graph, convert(_ungated(reference)), len(gates.kept))
    if fuse_batchnorm:
        take_batchnorms(graph)
    more = dict(gates.settings) | {"dtype": dtype} | dict(metadata or {})
    graph.metadata_props.update(describe(model, called, graph, labels, more))
    with beside(place) as folder:
        made = folder / place.name
        try:
            data = write(graph, folder, place, dtype=dtype, optimize=optimize)
            parity, final = _compare((reference, plain), called, made, path, batch_sizes, tolerance)
        except OnnxFileError as error:
            told = str(error).replace(str(made), str(path))
            raise ExportError(f"{told}. Nothing was written to {path}") from error
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error}; nothing was left behind") from error
        size = made.stat().st_size + (made.with_name(data).stat().st_size if data else 0)
        move(made, data, place)
    return ExportReport(
        path=str(path),
        data=str(place.parent / data) if data else None,
        bytes=size,
        opset=final.opset_imports.get("", 0),
        inputs={str(given.name): _dimensions(given) for given in final.graph.inputs},
        nodes=node_counts(final),
        folded=gates.folded,
        kept=gates.kept,
        parity=parity,
        metadata=dict(final.metadata_props),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Gates:
    folded: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, object], ...] = ()


def _recorded(model: nn.Module) -> Any:
    """The example that `apply` recorded; None without gates, or where it mixes both kinds of arguments."""
    gates = placed_gates(model)
    if not gates:
        return None
    args, kwargs = recorded_inputs(model, gates[0].gate.decided)
    return None if args and kwargs else args or kwargs


def _without_gates(model: nn.Module, example: Any) -> tuple[nn.Module, _Gates]:
    """A folded copy of a gated model; a plain model itself."""
    if not is_gated(model):
        return model, _Gates()
    before = status(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns of gates that keep a factor; the report lists them.
        here = pytree.tree_map_only(Tensor, Tensor.cpu, example)
        plain = fold(model, example=here)
    left = status(plain).gates if is_gated(plain) else ()
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


def _ungated(model: nn.Module) -> nn.Module:
    return remove(copy.deepcopy(model))


def _check_choices(opset: int | None, dtype: str, optimize: str | None) -> None:
    for name, value, known in (("dtype", dtype, tuple(TOLERANCES)), ("optimize", optimize, (None, *LEVELS))):
        if value not in known:
            raise UsageError(f"{name} is {value!r}; give one of {', '.join(map(repr, known))}")
    if dtype == "float16" and optimize is not None:
        raise UsageError(
            f"optimize={optimize!r} would undo dtype='float16': where a CPU has no arithmetic in half "
            "precision, ONNX Runtime writes float32; give one of the two"
        )
    latest = onnx.defs.onnx_opset_version()
    if opset is not None and not (isinstance(opset, int) and 7 <= opset <= latest):
        raise UsageError(f"opset is {opset!r}; the installed onnx {onnx.__version__} knows 7 to {latest}")


def _check_sizes(model: nn.Module, called: Signature) -> None:
    """Checks that there are images, and that the model takes larger ones than the example's.

    Raises:
        UsageError: There are none, or it does not; with its reason.
    """
    if not any(called.images()):
        raise UsageError(
            f"dynamic_size is for images, and none of {', '.join(called.names)} is B x C x H x W"
        )
    try:
        evaluate(model, called, called.draw(1, torch.Generator().manual_seed(_SEED), LARGER))
    except UsageError as error:
        advice = "Some models take any size if they are made so, timm's often with dynamic_img_size=True"
        raise UsageError(f"no dynamic size is possible: {error}. {advice}") from error


def _check_weights(model: nn.Module) -> None:
    check_filled(model)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name, value in state.items():
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"{type(model).__name__} holds {value.dtype} in {name}, too coarse for the comparison; "
                "export model.float()"
            )
    bad = non_finite(model, state)
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


def _check_range(graph: ir.Model) -> None:
    """Checks that every weight fits into float16, which ends at 65504."""
    for value in graph.graph.initializers.values():
        if value.const_value is not None and value.dtype is ir.DataType.FLOAT:
            largest = np.abs(value.const_value.numpy()).max(initial=0.0)
            if np.isfinite(largest) and largest > np.finfo(np.float16).max:
                raise ExportError(
                    f"{value.name} holds {largest:g} and float16 ends at 65504; export in float32"
                )


def _check_nodes(graph: ir.Model, ungated: ir.Model, kept: int) -> None:
    """Checks that a graph has the nodes of the ungated model's, and a multiplication for each gate kept."""
    extra = Counter(node_counts(graph))
    extra.subtract(node_counts(ungated))
    extra["Mul"] -= kept
    unexpected = ", ".join(f"{count:+d} {op}" for op, count in sorted(extra.items()) if count)
    if unexpected:
        raise ExportError(
            f"the graph has other nodes than the ungated model's export: {unexpected}. Nothing was written"
        )


def _compare(
    models: tuple[nn.Module, nn.Module],
    called: Signature,
    made: Path,
    path: str | os.PathLike[str],
    batch_sizes: Sequence[int],
    tolerance: float,
) -> tuple[ParityReport, ir.Model]:
    """Compares the file with the first of two models, gates and all; the second is the folded one."""
    with open_onnx(made) as file:
        found = compare_runs(models[0], called, file, batch_sizes, tolerance, _SEED)
        blame = _blame(*models, called, found.notable, tolerance) if found.failed and found.notable else ""
        report = explained(str(path), models, called, file, found, tolerance, _SEED)
        final = file.model
    if not report.ok:
        what = f"the ONNX graph of {type(models[0]).__name__} computes something else{blame}"
        raise OutputsDifferError(f"{what}: {report.fault}. No file was written to {path}", report)
    return report, final


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
