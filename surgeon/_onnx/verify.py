"""Compares an ONNX file with a PyTorch model: the same inputs, random and extreme ones, in each runtime."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from surgeon._meant import says_the_call
from surgeon._onnx.divergence import first_divergence
from surgeon._onnx.file import OnnxFile, open_onnx
from surgeon._onnx.hygiene import graph_findings
from surgeon._onnx.parity import Array, ParityReport, ParityRow, compare
from surgeon._onnx.signature import LARGER, ODD, Signature, evaluating_copy, signature, tensors_by_name
from surgeon._plain import check_plain
from surgeon._text import first_line
from surgeon._tracing.example import default_input
from surgeon.errors import OnnxFileError, UsageError

# Largest relative error that counts as agreement, by the precision of the file's arithmetic.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2}


@says_the_call
def verify(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Any = None,
    batch_sizes: Sequence[int] = (1, 3),
    tolerance: float | None = None,
    seed: int = 0,
) -> ParityReport:
    """Compares an ONNX file with a PyTorch model and returns the report; the model is only read.

    Both run in evaluation mode on the CPU, on the same inputs: random ones at each batch size, and at the
    last one also large, constant and zero ones. Gates in the model stay, with their evaluation scale. The
    report is returned whether or not the two agree: see `ParityReport.ok`, and `ParityReport.require`, which
    raises. Where they do not, it names the node at which they part.

    The file may come from anywhere: it is read and run in a process of its own.

    Args:
        model: The model that the file should match.
        path: The ONNX file.
        example: A tensor, a tuple of arguments or a dict of keyword arguments; only types and shapes matter.
            Without it, the shape comes from the file where the file fixes it, else from the model.
        batch_sizes: Sizes to compare at. A file with a fixed batch is compared at that size alone.
        tolerance: Largest relative error, ``max|d| / max|y|`` per output, that counts as agreement; by
            default 1e-4, and 1e-2 for a file with weights in float16.
        seed: Seed of the random inputs.

    Raises:
        OnnxFileError: The file is missing, empty, truncated, not ONNX, or ONNX Runtime cannot run it.
        UsageError: The inputs or outputs of file and model do not match, or an argument is out of range.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> _ = surgeon.export(model, "plain.onnx", overwrite=True)
        >>> surgeon.verify(model, "plain.onnx").ok
        True
        >>> other = timm.create_model("test_resnet", num_classes=10)
        >>> surgeon.verify(other, "plain.onnx").ok
        False
    """
    check_plain(model)
    check_comparison(batch_sizes, TOLERANCES["float32"] if tolerance is None else tolerance)
    with open_onnx(path) as file:
        tolerance = _tolerance(file) if tolerance is None else tolerance
        plain = evaluating_copy(model)
        called = signature(plain, example if example is not None else _example_like(file, plain))
        _check_inputs(file, called)
        found = compare_runs(plain, called, file, batch_sizes, tolerance, seed)
        return explained(str(path), (plain, plain), called, file, found, tolerance, seed)


def _tolerance(file: OnnxFile) -> float:
    types = {value.dtype for value in file.model.graph.initializers.values()}
    return TOLERANCES["float16" if ir.DataType.FLOAT16 in types else "float32"]


def check_comparison(batch_sizes: Sequence[int], tolerance: float) -> None:
    """Checks the arguments of a comparison.

    Raises:
        UsageError: There is no batch size, one is not positive, or the tolerance is not a positive number.
    """
    if not batch_sizes or any(not isinstance(size, int) or size < 1 for size in batch_sizes):
        raise UsageError(f"batch_sizes is {batch_sizes!r}; give at least one size, each 1 or more")
    if not 0 < tolerance < float("inf"):
        raise UsageError(f"tolerance is {tolerance!r}; give a positive number, such as 1e-4")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Outputs of a model and of a file side by side.

    Attributes:
        rows: One per output and input.
        notable: The inputs on which the two differ most; None where that is hardly more than rounding.
    """

    rows: tuple[ParityRow, ...]
    notable: tuple[Tensor, ...] | None

    @property
    def failed(self) -> bool:
        """Whether an output differs by more than the tolerance."""
        return not all(row.ok for row in self.rows)


def compare_runs(
    model: nn.Module,
    called: Signature,
    file: OnnxFile,
    batch_sizes: Sequence[int],
    tolerance: float,
    seed: int,
) -> Comparison:
    """Runs an evaluating model and an ONNX file on the same inputs.

    Raises:
        OnnxFileError: ONNX Runtime fails on the inputs.
        UsageError: The model fails on the inputs, or returns another number of outputs.
    """
    rows: list[ParityRow] = []
    # Arithmetic in half precision differs by far more than the model's own rounding, as it should.
    most, notable = (False, tolerance / 10 if _tolerance(file) == TOLERANCES["float32"] else tolerance), None
    for kind, tensors in _inputs(called, file, batch_sizes, seed):
        try:
            reference = evaluate(model, called, tensors)
        except UsageError:
            if kind in ("larger", "odd"):  # A file may leave open what its model does not.
                continue
            raise
        other = file.runtime.run(tensors)
        if len(other) != len(reference):
            theirs = ", ".join(file.runtime.outputs)
            raise UsageError(
                f"{file.path} has {len(other)} outputs ({theirs}), {type(model).__name__} has "
                f"{len(reference)} ({', '.join(reference)})"
            )
        by_name = dict(zip(file.runtime.outputs, other, strict=True))
        if by_name.keys() == reference.keys():  # else another exporter has named them, and places count
            other = [by_name[name] for name in reference]
        found = compare(reference, other, batch=len(tensors[0]), tolerance=tolerance, inputs=kind)
        rows += found
        differing = max((not row.ok, row.relative) for row in found)
        if differing > most:
            most, notable = differing, tensors
    return Comparison(tuple(rows), notable)


def _inputs(
    called: Signature, file: OnnxFile, batch_sizes: Sequence[int], seed: int
) -> list[tuple[str, tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = _possible_sizes(file, batch_sizes)
    given = [("random", called.draw(size, generator)) for size in sizes]
    given.append(("extreme", called.extremes(sizes[-1], generator)))
    if _takes_other_sizes(file, called):
        given.append(("larger", called.draw(sizes[-1], generator, LARGER)))
        given.append(("odd", called.draw(sizes[-1], generator, ODD)))  # where a graph pads for one size
    return given


def explained(
    path: str,
    models: tuple[nn.Module, nn.Module],
    called: Signature,
    file: OnnxFile,
    found: Comparison,
    tolerance: float,
    seed: int,
) -> ParityReport:
    """The report of a comparison, with what may have caused a difference.

    Args:
        path: The file's name for the report.
        models: The model that was compared, and the one that the file was made of: the same, but folded.
        called: How both are called.
        file: The file; it is left open in another way where the two differ.
        found: The comparison.
        tolerance: Largest relative error that counts as agreement.
        seed: Seed of the inputs.
    """
    findings, notable = graph_findings(file.model), found.notable
    if notable is None:
        return ParityReport(path, found.rows, findings, tolerance, seed)
    model, made_of = models
    unoptimised = _unoptimised(model, called, file, notable)
    parting = first_divergence(made_of, called, file, notable, tolerance) if found.failed else None
    noise = rounding(model, called, notable)
    return ParityReport(path, found.rows, findings, tolerance, seed, parting, noise, unoptimised)


def _unoptimised(
    model: nn.Module, called: Signature, file: OnnxFile, tensors: Sequence[Tensor]
) -> float | None:
    """How far a file is from a model, relative, when ONNX Runtime runs it as it is written."""
    try:
        file.runtime.open(level="none")
        other = file.runtime.run(tensors)
    except OnnxFileError:
        return None
    return _worst(evaluate(model, called, tensors), other)


def rounding(model: nn.Module, called: Signature, tensors: Sequence[Tensor]) -> float | None:
    """How far a model's outputs are from those of itself in float64, relative; None if it cannot run so."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    try:
        exact = evaluate(copy.deepcopy(model).double(), called, wide)
        return _worst(exact, list(evaluate(model, called, tensors).values()))
    except UsageError:
        return None


def _worst(reference: Mapping[str, Array], other: Sequence[Array]) -> float | None:
    rows = compare(reference, other, batch=0, tolerance=math.inf)
    return max((row.relative for row in rows if not math.isnan(row.relative)), default=None)


def evaluate(model: nn.Module, called: Signature, tensors: Sequence[Tensor]) -> dict[str, Array]:
    """The model's outputs for these inputs, by name.

    Raises:
        UsageError: The model fails on them.
    """
    try:
        with torch.no_grad():
            result = called.call(model, tensors)
    except Exception as error:  # Whatever the user's forward raises.
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(called.names, tensors, strict=True))
        raise UsageError(f"{type(model).__name__} cannot run on {shapes}: {first_line(error)}") from error
    return {name: tensor.detach().numpy() for name, tensor in tensors_by_name(result)}


def _fixed_batch(file: OnnxFile) -> int | None:
    shapes = [given.shape for given in file.model.graph.inputs]
    first = shapes[0][0] if shapes and shapes[0] is not None and len(shapes[0]) else None
    return first if isinstance(first, int) else None


def _possible_sizes(file: OnnxFile, batch_sizes: Sequence[int]) -> Sequence[int]:
    fixed = _fixed_batch(file)
    return batch_sizes if fixed is None else (fixed,)


def _takes_other_sizes(file: OnnxFile, called: Signature) -> bool:
    """Whether the file leaves height and width of its images open."""
    given = zip(file.model.graph.inputs, called.images(), strict=True)
    shapes = [one.shape for one, image in given if image and one.shape is not None]
    return bool(shapes) and not any(isinstance(size, int) for shape in shapes for size in shape[2:])


def _example_like(file: OnnxFile, model: nn.Module) -> Tensor | None:
    """The model's default example in the size that the file's only input fixes; None where it cannot be."""
    inputs = file.model.graph.inputs
    own = default_input(model)
    if len(inputs) != 1 or inputs[0].shape is None or len(inputs[0].shape) != own.ndim:
        return None
    sizes = [
        size if isinstance(size, int) else fallback
        for size, fallback in zip(inputs[0].shape, own.shape, strict=True)
    ]
    return own.new_zeros(sizes)


def _check_inputs(file: OnnxFile, called: Signature) -> None:
    inputs = file.model.graph.inputs
    mine = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(called.names, called.tensors, strict=True))
    theirs = ", ".join(f"{given.name} {given.shape}" for given in inputs)
    if len(inputs) != len(called.tensors):
        raise UsageError(
            f"{file.path} takes {len(inputs)} inputs ({theirs}), the model {len(called.tensors)} ({mine})"
        )
    for given, tensor in zip(inputs, called.tensors, strict=True):
        if given.shape is not None and not _fits(given.shape, tensor):
            raise UsageError(
                f"the inputs of {file.path} ({theirs}) do not fit the example's ({mine}); pass example="
            )


def _fits(shape: Any, tensor: Tensor) -> bool:
    if len(shape) != tensor.ndim:
        return False
    pairs = zip(list(shape)[1:], tensor.shape[1:], strict=True)
    return all(not isinstance(size, int) or size == own for size, own in pairs)
