"""One call into PyTorch's ONNX exporter, kept quiet and helped where it stumbles.

Three things make it succeed, and its graphs smaller, on models where it otherwise fails:

* timm's fused attention is off while it runs. Below opset 23 the fused operator is decomposed into more nodes
  than timm's own plain arithmetic (85 against 67 nodes in a ViT of two blocks), and with a float bias (BEiT,
  relative positions) its decomposition fails;
* any other ``scaled_dot_product_attention`` takes PyTorch's plain mathematical path, which decomposes well;
* the example has a batch of two at least, because a size of one is taken for a constant.

Of what it makes, constants that it lost are put back (`_adopt`), and one pattern that ONNX Runtime gets wrong
is written otherwise (`_onnx.padding`).
"""

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgeon._onnx.padding import keep_zeros
from surgeon._onnx.signature import Signature, TensorModule, drop_caches, tensors_by_name
from surgeon._text import first_line
from surgeon._torch import EXPORT_LOGS
from surgeon.errors import ExportError

# The first opset with an Attention operator of its own.
_NATIVE_ATTENTION = 23
_LOUD = (*EXPORT_LOGS, "onnxscript", "onnx_ir")
MODULE = "surgeon.module"
"""What a node says of the module that it comes from."""


def to_onnx(
    model: nn.Module,
    called: Signature,
    *,
    opset: int | None,
    dynamic_batch: bool,
    dynamic_size: bool = False,
) -> ir.Model:
    """Converts an evaluating model to an ONNX graph; the model is as before afterwards.

    Every node keeps the name of the module that it comes from (``surgeon.module``) and nothing else of the
    exporter's notes, which hold source lines and paths of this machine. Weights have the model's own names.

    Args:
        model: The model, in evaluation mode.
        called: How it is called; the shapes of its tensors are those of the graph.
        opset: Version of ONNX's operators; None is the exporter's default.
        dynamic_batch: Whether the first dimension may vary.
        dynamic_size: Whether height and width of images may vary.

    Raises:
        ExportError: The exporter failed, or batch, size or opset are not as asked; with the cause.
    """
    tensors = called.tensors
    if dynamic_batch and tensors[0].shape[0] < 2:
        tensors = called.draw(2, torch.Generator().manual_seed(0))
    axes = _axes(called, batch=dynamic_batch, size=dynamic_size)
    flat = TensorModule(model, called).eval()
    try:
        with _quiet(), _plain_attention(model, opset), torch.no_grad():
            outputs = [name for name, _ in tensors_by_name(called.call(model, tensors))]
            drop_caches(model)
            program = torch.onnx.export(
                flat,
                tensors,
                dynamo=True,
                dynamic_shapes={"tensors": axes},
                input_names=list(called.names),
                output_names=outputs,
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # The exporter and the user's forward raise whatever they like.
        raise ExportError(_failure(model, error, {name for one in axes for name in one.values()})) from error
    finally:
        drop_caches(model)
    made = cast("torch.onnx.ONNXProgram", program)  # It is None for the old exporter only.
    graph = made.model
    _check_opset(graph, model, opset)
    _check_axes(graph, model, axes)
    _check_ranges(made.exported_program, model, axes)
    _adopt(graph)
    _tidy(graph)
    keep_zeros(graph)
    return graph


def _axes(called: Signature, *, batch: bool, size: bool) -> tuple[dict[int, str], ...]:
    """For each input the dimensions that may vary, with their names."""
    return tuple(
        ({0: "batch"} if batch and batched else {}) | ({2: "height", 3: "width"} if size and image else {})
        for batched, image in zip(called.batched(), called.images(), strict=True)
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's logs, warnings and prints, and puts every setting back."""
    known = [logging.getLogger(name) for name in (*_LOUD, *logging.root.manager.loggerDict)]
    loud = [found for found in known if found.name.startswith(_LOUD)]
    levels = [found.level for found in loud]
    try:
        for found in loud:
            found.setLevel(logging.CRITICAL + 1)
        nowhere = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for found, level in zip(loud, levels, strict=True):
            found.setLevel(level)


@contextlib.contextmanager
def _plain_attention(model: nn.Module, opset: int | None) -> Iterator[None]:
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    if opset is not None and opset >= _NATIVE_ATTENTION:
        fused = []
    try:
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


_WITHOUT = {
    "batch": "dynamic_batch=False (--static-batch)",
    "height": "dynamic_size=False (no --dynamic-size)",
    "width": "dynamic_size=False (no --dynamic-size)",
}


def _failure(model: nn.Module, error: BaseException, dynamic: Collection[str]) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    how = f"with a dynamic {', '.join(sorted(dynamic))}" if dynamic else "with a fixed batch"
    without = " and ".join(sorted({_WITHOUT[axis] for axis in dynamic}))
    advice = f" If the model's arithmetic needs fixed ones, pass {without}." if dynamic else ""
    return (
        f"PyTorch's exporter could not convert {type(model).__name__} {how}: "
        f"{type(cause).__name__}: {first_line(cause)}.{advice}"
    )


def _check_opset(graph: ir.Model, model: nn.Module, opset: int | None) -> None:
    made = graph.opset_imports.get("", 0)
    if opset is not None and made != opset:
        raise ExportError(
            f"{type(model).__name__} cannot be written in opset {opset}: the exporter made opset {made} and "
            f"could not convert it. Leave opset out, or ask for {made}"
        )


def _check_axes(graph: ir.Model, model: nn.Module, axes: Sequence[Mapping[int, str]]) -> None:
    kind = type(model).__name__
    for given, names in zip(graph.graph.inputs, axes, strict=True):
        for axis, name in names.items():
            if given.shape is not None and isinstance(given.shape[axis], int):
                why = "its own arithmetic" if name == "batch" else "tables or windows of that size"
                raise ExportError(
                    f"{kind} fixes its {name} to {given.shape[axis]} in {why}, so no dynamic {name} is "
                    f"possible; pass {_WITHOUT[name]} to export for that one"
                )


def _check_ranges(
    program: ExportedProgram | None, model: nn.Module, axes: Sequence[Mapping[int, str]]
) -> None:
    """Checks that no branch on a size in the model's Python holds for sizes up to some limit alone.

    The graph has the side that the example took, for any size. A limit from below need not be one: tracing
    makes some up. At batch 1 and at a size of its own the comparison sees what it is worth.
    """
    if program is None:
        return
    given = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    for node, names in zip(given, axes, strict=True):
        for axis, name in names.items():
            size = node.meta["val"].shape[axis]
            found = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
            if found is not None and found.upper.is_Integer:
                raise ExportError(
                    f"the forward of {type(model).__name__} fails or does something else where {name} is "
                    f"above {found.upper}; pass {_WITHOUT[name]} to export for the example's {name} alone"
                )


def _adopt(model: ir.Model) -> None:
    """Makes initializers of constants that nodes read and no graph holds.

    The exporter's rewriter names the bounds of a clip after the clipped value. Several clips of one value (as
    before the three projections of an attention) give as many constants one name, and it keeps the last.
    """
    held = model.graph.initializers
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if not (value.is_initializer() or value.is_graph_input()):
                while value.name is None or value.name in held:
                    value.name = f"{value.name}_"
                model.graph.register_initializer(value)


def _tidy(model: ir.Model) -> None:
    for value in list(model.graph.initializers.values()):
        if value.name is not None and value.name.startswith("model."):
            _rename(model.graph, value, value.name.removeprefix("model."))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        scope = _scope(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
        node.metadata_props.clear()
        if scope:
            node.metadata_props[MODULE] = scope
    for value in _values(model.graph):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if name not in graph.initializers:
        value.name = name


def _scope(noted: str | None) -> str:
    """The innermost module in the exporter's note, ``"['', 'model', 'model.conv1', 'conv2d']"``."""
    scopes: list[Any] = ast.literal_eval(noted) if noted else []
    inside = [scope for scope in scopes[:-1] if isinstance(scope, str) and scope.startswith("model.")]
    return inside[-1].removeprefix("model.") if inside else ""


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
