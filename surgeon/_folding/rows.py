"""A flat model in which values and parameters that are only read in parts stand as their parts.

``bn(x)[:, :c]`` is ``bn(x[:, :c])`` with the first ``c`` entries of weight, bias and statistics. Moving
such slices up, towards the parameters, leaves every number as it is and gives each part of a value an
exponent of its own: a gate on the first channels of a dual path, or on one row of a table of gammas, can
then scale the rows that belong to it. A value that anything reads as a whole stays whole.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from surgeon._folding.flat import Flat, Source
from surgeon._folding.recorder import OpCall, Value
from surgeon._mark import MARK
from surgeon._tracing.aten import Family, answers, family_of, named, spatial

Span = tuple[int, int]
Owners = Mapping[str, int]
"""Arguments of a call whose rows make rows of its output, each with the dimension they lie along."""


@dataclass(frozen=True, slots=True)
class _Want:
    """One reading of some rows of a value."""

    dim: int
    span: Span
    made: Value
    """The value that holds these rows."""
    call: OpCall
    """The call that made it."""


def by_rows(flat: Flat) -> Flat:
    """The same computation with slices moved up as far as they go; the argument is not changed."""
    return _Splitter(flat).run()


@dataclass(slots=True)
class _Splitter:
    """One walk from the outputs to the sources."""

    flat: Flat
    whole: set[Value] = field(default_factory=set)
    wants: dict[Value, list[_Want]] = field(default_factory=dict)
    backwards: list[OpCall] = field(default_factory=list)
    count: int = 0

    def run(self) -> Flat:
        """The rewritten model."""
        flat = self.flat
        values = [*flat.parameters, *flat.buffers, *(v for c in flat.calls for v in (*c.inputs, *c.outputs))]
        self.count = 1 + max((value.number for value in values), default=0)
        self.whole |= flat.outputs
        for call in reversed(flat.calls):
            self._visit(call)
        parameters: dict[Value, Source] = {}
        for value, source in flat.parameters.items():
            parameters |= self._source(value, source)
        for value in [value for value in self.wants if value not in flat.parameters]:
            self._emit_readers(value)
        return replace(flat, calls=tuple(reversed(self.backwards)), parameters=parameters)

    def _visit(self, call: OpCall) -> None:
        """Emit a call, as it is or in parts; a call that only reads rows waits for what it reads."""
        if not call.outputs:
            self._emit(call)
            return
        out, *others = call.outputs
        if not any(map(self._needed, call.outputs)):
            return
        parts = None if any(map(self._needed, others)) else self._parts(out)
        owners = _owners(call, self.wants[out][0].dim) if parts else None
        if parts and owners:
            self._split(call, owners, parts)
            return
        if (pieces := _pieces(call)) is not None:
            self._join(call, *pieces)
            return
        for value in call.outputs:
            self._emit_readers(value)
        if (read := _spans(call)) is not None:
            source, dim, spans = read
            for span, output in zip(spans, call.outputs, strict=True):
                self._want(source, _Want(dim, span, output, call))
        else:
            self._emit(call)

    def _needed(self, value: Value) -> bool:
        return value in self.whole or value in self.wants

    def _want(self, value: Value, want: _Want) -> None:
        self.wants.setdefault(value, []).append(want)

    def _emit(self, call: OpCall) -> None:
        self.backwards.append(call)
        self.whole.update(call.inputs)

    def _join(self, call: OpCall, dim: int, pieces: Sequence["_Piece"]) -> None:
        """Make what is read of joined pieces from those it touches, and the whole only where it is read."""
        out = call.outputs[0]
        if any(want.dim != dim for want in self.wants.get(out, [])):
            self._emit_readers(out)
        wants = self.wants.pop(out, [])
        if out in self.whole:
            wants.append(_Want(dim, (0, out.shape[dim]), out, call))
        for want in wants:
            touched = [self._touched(piece, dim, want.span, call) for piece in pieces]
            joined = tuple(value for value in touched if value is not None)
            module = want.call.module
            self._emit(OpCall("aten.cat", {"tensors": joined, "dim": dim}, joined, (want.made,), module))

    def _touched(self, piece: "_Piece", dim: int, span: Span, call: OpCall) -> Value | None:
        """The rows of one piece that lie in a span of the joined value."""
        start, end = max(span[0], piece.span[0]), min(span[1], piece.span[1])
        if start >= end:
            return None
        rows = start - piece.shift, end - piece.shift
        return (
            piece.value
            if rows == (0, piece.value.shape[dim])
            else self._rows_of(piece.value, dim, rows, call)
        )

    def _parts(self, value: Value) -> list[Span] | None:
        """The smallest spans its readers tell apart; None if the value must stay whole."""
        wants = self.wants.get(value, [])
        if value in self.whole or not wants or len({want.dim for want in wants}) > 1:
            return None
        edges = sorted({edge for want in wants for edge in want.span})
        spans = [
            (start, end)
            for start, end in pairwise(edges)
            if any(want.span[0] <= start and end <= want.span[1] for want in wants)
        ]
        return None if spans == [(0, value.shape[wants[0].dim])] else spans

    def _split(self, call: OpCall, owners: Owners, parts: list[Span]) -> None:
        """One call per part, on the rows of its arguments that belong to it."""
        out = call.outputs[0]
        pieces = [self._like(out, self.wants[out][0].dim, part) for part in parts]
        self._join_readers(out, parts, pieces)
        for part, piece in zip(parts, pieces, strict=True):
            arguments = dict(call.arguments)
            for name, dim in owners.items():
                arguments[name] = self._rows_of(arguments[name], dim, part, call)
            inputs = tuple(_values_in(arguments.values()))
            self.backwards.append(replace(call, arguments=arguments, inputs=inputs, outputs=(piece,)))
            self.whole.update(_values_in(arguments[name] for name in arguments.keys() - owners.keys()))

    def _rows_of(self, argument: Value, dim: int, part: Span, call: OpCall) -> Value:
        """Rows of an argument as a value of their own."""
        rows = self._like(argument, dim, part)
        cut = OpCall("aten.slice", {"self": argument}, (argument,), (rows,), call.module)
        self._want(argument, _Want(dim, part, rows, cut))
        return rows

    def _like(self, value: Value, dim: int, span: Span) -> Value:
        shape = (*value.shape[:dim], span[1] - span[0], *value.shape[dim + 1 :])
        self.count += 1
        return Value(self.count, shape, value.scalable)

    def _join_readers(self, value: Value, parts: Sequence[Span], pieces: Sequence[Value]) -> None:
        """Make what was read from the pieces that cover it."""
        for want in self.wants.pop(value):
            covered = tuple(
                piece
                for (start, end), piece in zip(parts, pieces, strict=True)
                if want.span[0] <= start and end <= want.span[1]
            )
            arguments = {"tensors": covered}
            self.backwards.append(OpCall("aten.cat", arguments, covered, (want.made,), want.call.module))

    def _emit_readers(self, value: Value) -> None:
        """Read rows from the whole value after all."""
        for want in self.wants.pop(value, []):
            self.backwards.append(
                OpCall("aten.slice", {"self": value}, (value,), (want.made,), want.call.module)
            )
            self.whole.add(value)

    def _source(self, value: Value, source: Source) -> dict[Value, Source]:
        """A parameter, or its parts."""
        parts = self._parts(value)
        if not parts:
            self._emit_readers(value)
            return {value: source}
        dim = self.wants[value][0].dim
        pieces = [self._like(value, dim, part) for part in parts]
        self._join_readers(value, parts, pieces)
        return {piece: replace(source, rows=part, dim=dim) for part, piece in zip(parts, pieces, strict=True)}


def _values_in(arguments: Iterable[Any]) -> Iterable[Value]:
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _values_in(argument)


# Calls that read rows.


def _spans(call: OpCall) -> tuple[Value, int, list[Span]] | None:
    """What a call reads rows of, along which dimension, and which rows each output holds."""
    args = call.arguments
    source = args.get("self")
    read = _READERS.get(named(call.name))
    if not isinstance(source, Value) or read is None:
        return None
    dim = args["dim"] % len(source.shape)
    spans = read(args, source.shape[dim])
    return (source, dim, spans) if spans else None


def _sliced(args: Mapping[str, Any], size: int) -> list[Span] | None:
    start, end, step = slice(args["start"], args["end"], args["step"]).indices(size)
    return [(start, end)] if step == 1 and start < end else None


def _selected(args: Mapping[str, Any], size: int) -> list[Span]:
    index = args["index"] % size
    return [(index, index + 1)]


def _separated(_: Mapping[str, Any], size: int) -> list[Span]:
    return [(index, index + 1) for index in range(size)]


def _divided(args: Mapping[str, Any], size: int) -> list[Span] | None:
    sizes = args.get("split_sizes") or [args["split_size"]] * size
    if 0 in sizes:
        return None
    edges = [0]
    for length in sizes:
        edges.append(min(edges[-1] + length, size))
    return [span for span in pairwise(edges) if span[0] < span[1]]


_READERS: dict[str, Callable[[Mapping[str, Any], int], list[Span] | None]] = {
    "slice": _sliced,
    "select": _selected,
    "unbind": _separated,
    "split": _divided,
    "split_with_sizes": _divided,
    "unsafe_split": _divided,
    "unsafe_split_with_sizes": _divided,
}


# Calls that put rows together.


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``span`` of a joined value are rows ``span - shift`` of ``value``."""

    span: Span
    value: Value
    shift: int


def _pieces(call: OpCall) -> tuple[int, list[_Piece]] | None:
    """What a call puts together along which dimension; None for other calls."""
    args, out = call.arguments, call.outputs[0]
    if family_of(call.name) is Family.CATS and all(
        len(tensor.shape) == len(out.shape) for tensor in args["tensors"]
    ):
        dim, pieces, at = args["dim"] % len(out.shape), [], 0
        for tensor in args["tensors"]:
            pieces.append(_Piece((at, at + tensor.shape[dim]), tensor, at))
            at += tensor.shape[dim]
        return dim, pieces
    if named(call.name) == "slice_scatter" and args["step"] == 1:
        dim, old, size = args["dim"] % len(out.shape), args["self"], out.shape[args["dim"]]
        start, end, _ = slice(args["start"], args["end"]).indices(size)
        return dim, [
            _Piece((0, start), old, 0),
            _Piece((start, end), args["src"], start),
            _Piece((end, size), old, 0),
        ]
    return None


# Calls whose rows are made of rows.


def _owners(call: OpCall, dim: int) -> Owners | None:
    """Which arguments' rows make the rows of the output along ``dim``; None where that is not so simple."""
    kind = family_of(call.name)
    rule = _each_entry if call.name == MARK else _OWNERS.get(kind) if kind else None
    owners = rule(call, dim) if rule else None
    return owners and {name: at for name, at in owners.items() if isinstance(call.arguments.get(name), Value)}


def _each_entry(call: OpCall, dim: int) -> Owners | None:
    """Entry by entry, with broadcasting."""
    out, owners = call.outputs[0], {}
    for name in ("self", "other", "branch"):
        value = call.arguments.get(name)
        if isinstance(value, Value):
            at = dim - len(out.shape) + len(value.shape)
            if at >= 0 and value.shape[at] != 1:
                owners[name] = at
    return owners


def _each_channel(call: OpCall, dim: int) -> Owners | None:
    """Pooling over the last dimensions: every channel by itself; a tensor without a batch has it first."""
    return {"self": dim} if dim == len(call.outputs[0].shape) - 1 - spatial(call.name) else None


def _of_norm(_: OpCall, dim: int) -> Owners | None:
    names = {"input": 1, "weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
    return names if dim == 1 else None


def _of_convolution(call: OpCall, dim: int) -> Owners | None:
    args = call.arguments
    if dim != 1 or args["groups"] != 1:
        return None
    return {"weight": 1 if args["transposed"] else 0, "bias": 0}


def _of_matmul(call: OpCall, dim: int) -> Owners | None:
    """A product of matrices, and a bias that may stand for all rows or columns."""
    if "mat2" not in call.arguments:
        return None
    bias = call.arguments["self"].shape
    own = {"self": len(bias) - 1} if bias[-1:] == call.outputs[0].shape[-1:] else {}
    return {"mat2": 1, **own} if dim == 1 else None


def _of_mm(call: OpCall, dim: int) -> Owners | None:
    if len(call.outputs[0].shape) != 2:
        return None
    return {"mat2": 1} if dim == 1 else {"self": 0}


def _permuted(call: OpCall, dim: int) -> Owners | None:
    rank = len(call.outputs[0].shape)
    if named(call.name) == "t":
        return {"self": 1 - dim} if rank == 2 else None
    order = call.arguments.get("dims")
    return {"self": order[dim] % rank} if order else None


def _reshaped(call: OpCall, dim: int) -> Owners | None:
    """A view that leaves a dimension alone: as long as before, and as much in front of it."""
    old, new = call.arguments["self"].shape, call.outputs[0].shape
    before = math.prod(new[:dim])
    same = [at for at in range(len(old)) if math.prod(old[:at]) == before and old[at] == new[dim]]
    return {"self": same[0]} if same else None


def _of_layer_norm(call: OpCall, dim: int) -> Owners | None:
    """Rows that are normalised one by one."""
    args = call.arguments
    return {"input": dim} if dim < len(args["input"].shape) - len(args["normalized_shape"]) else None


_OWNERS: dict[Family, Callable[[OpCall, int], Owners | None]] = answers(
    (_each_entry, "RELUS LEAKY CLAMPS SQUASHES SMOOTH PRODUCTS SUMS DIFFERENCES QUOTIENTS COPIES"),
    (_each_channel, "MEAN_POOLS ADAPTIVE_POOLS MAX_POOLS"),
    (_of_norm, "BATCH_NORMS"),
    (_of_layer_norm, "LAYER_NORMS"),
    (_of_convolution, "CONVOLUTIONS"),
    (_of_matmul, "AFFINE"),
    (_of_mm, "MATMULS"),
    (_permuted, "AXES"),
    (_reshaped, "FORMS"),
)
