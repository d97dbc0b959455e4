"""Whether two forms of a model agree: their outputs compared, one row per output and batch size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon._onnx.hygiene import GraphFinding
from surgeon._text import Listed, Part, count
from surgeon.errors import OutputsDifferError

Array = NDArray[Any]

# Two sound implementations differ by a few times the rounding of either; their ratio is seldom above ten.
_ROUNDING = 10
_DOUBTFUL = 30


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One output at one batch size.

    Attributes:
        output: The output's name.
        batch: Size of the batch.
        shape: The output's shape in PyTorch.
        absolute: Largest absolute difference.
        relative: ``absolute`` over the largest absolute value in PyTorch.
        top1: Share of rows, 0 to 1, with the largest value at the same place; None unless rows are scores.
        note: What makes the numbers say little: other shapes, values that are not finite, nothing but zeros;
            else empty.
        ok: Whether the row is within the tolerance.
        inputs: ``"random"``, or ``"extreme"``: large, constant and zero.
    """

    output: str
    batch: int
    shape: tuple[int, ...]
    absolute: float
    relative: float
    top1: float | None
    note: str
    ok: bool
    inputs: str = "random"

    def __str__(self) -> str:
        extreme = "" if self.inputs == "random" else f" on {self.inputs} inputs"
        where = f"output {self.output!r} at batch {self.batch}{extreme}"
        if self.note:
            return f"{where}: {self.note}"
        agree = "" if self.top1 is None else f", top-1 agrees on {self.top1:.0%} of the rows"
        return f"{where} differs by {self.absolute:.3g} (relative {self.relative:.3g}{agree})"


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first node of a graph whose result is not PyTorch's, though its inputs are.

    Attributes:
        node: The node's name.
        op_type: Its operator.
        module: The module that it belongs to; empty if that is not known.
        operator: PyTorch's operator whose result is nearest to the node's; empty if none is comparable.
        absolute: Largest absolute difference between the two.
        relative: ``absolute`` over the largest absolute value in PyTorch.
        note: What is wrong with a weight of the node, if one is; else empty.
    """

    node: str
    op_type: str
    module: str
    operator: str
    absolute: float
    relative: float
    note: str

    def __str__(self) -> str:
        where = f" of {self.module}" if self.module else ""
        by = "" if math.isnan(self.relative) else f" by {self.absolute:.3g} (relative {self.relative:.3g})"
        from_ = f" from PyTorch's {self.operator}" if self.operator else ""
        note = f"; {self.note}" if self.note else ""
        return f"the two part at node {self.node} ({self.op_type}){where}, which differs{from_}{by}{note}"


@dataclass(frozen=True, slots=True)
class ParityReport(Listed[ParityRow]):
    """How an ONNX file compares with a PyTorch model.

    Attributes:
        path: The ONNX file.
        rows: One per output and batch size.
        findings: Nodes that do not belong in an evaluating graph.
        tolerance: Largest relative error that counts as agreement.
        seed: Seed of the random inputs.
        divergence: Where the graph departs from the model; None if it does not, or where that cannot be said.
        rounding: How far PyTorch itself is from its own float64, relative, where the two differ most; None if
            they hardly do, or if the model does not run in float64.
        unoptimised: How far the file is from the model there when ONNX Runtime optimises nothing, relative;
            None if the two hardly differ.
    """

    path: str
    rows: tuple[ParityRow, ...]
    findings: tuple[GraphFinding, ...]
    tolerance: float
    seed: int
    divergence: Divergence | None = None
    rounding: float | None = None
    unoptimised: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every output agrees and the graph holds nothing that it must not hold."""
        return not self.findings and all(row.ok for row in self.rows)

    @property
    def worst(self) -> ParityRow:
        """The row that is furthest from agreement."""
        return max(self.rows, key=lambda row: (not row.ok, math.isnan(row.relative), row.relative))

    def require(self) -> "ParityReport":
        """Returns the report itself if it is ok.

        Raises:
            ParityError: It is not; the message names the worst output with its numbers, or the first finding.
        """
        if self.ok:
            return self
        raise OutputsDifferError(f"{self.path} does not match the PyTorch model: {self.fault}", self)

    @property
    def fault(self) -> str:
        """What is wrong in one sentence; empty if nothing is."""
        failed = sum(not row.ok for row in self.rows)
        if failed:
            count = f"{failed} of {len(self.rows)} comparisons failed"
            said = "".join(f"; {one}" for one in (*self.remarks, self.divergence) if one)
            return f"{self.worst}; the tolerance is {self.tolerance:g} relative, {count}{said}"
        if self.findings:
            first, more = self.findings[0], len(self.findings) - 1
            others = f"; {more} more such nodes" if more else ""
            return f"node {first.node} ({first.op_type}) does not belong in the graph: {first.reason}{others}"
        return ""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the numbers say of the cause of a difference; they never decide whether the report is ok."""
        largest = max((row.relative for row in self.rows if not math.isnan(row.relative)), default=0.0)
        failed = not all(row.ok for row in self.rows)
        if failed and math.isnan(self.worst.relative):
            return ()
        said, rounding = [], self.rounding
        if rounding is not None:
            own = f"PyTorch itself is {rounding:.1g} from its own float64 there"
            if largest < (_ROUNDING if failed else _DOUBTFUL) * rounding:
                excuse = f"{own}, so this may be nothing but rounding, which a larger tolerance allows"
                return (excuse,) if failed else ()
            if not failed:
                said.append(f"{largest:.1g} is within the tolerance, but more than rounding: {own}")
        if self.unoptimised is not None and self.unoptimised < min(largest / _ROUNDING, self.tolerance):
            alone = f"with ONNX Runtime's optimisations off the two differ by {self.unoptimised:.1g} only"
            said.append(f"{alone}, so one of its optimisations is at fault and not the file")
        return tuple(said)

    def _entries(self) -> Sequence[ParityRow]:
        return self.rows

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON; numbers that are not finite become None."""
        rows = [
            {**asdict(row), "absolute": _json(row.absolute), "relative": _json(row.relative)}
            for row in self.rows
        ]
        found = None
        if self.divergence is not None:
            numbers = {name: _json(getattr(self.divergence, name)) for name in ("absolute", "relative")}
            found = asdict(self.divergence) | numbers
        return {**asdict(self), "rows": rows, "divergence": found, "ok": self.ok}

    def parts(self) -> Sequence[Part]:
        """The comparison as a table, what it says, and the findings in the graph."""
        said = "agrees" if self.ok else "does not match"
        title = f"{self.path}: {said} (tolerance {self.tolerance:g})"
        told = tuple(map(str, filter(None, (self.divergence, *self.remarks))))
        shown = [Part(title, _COLUMNS, tuple(map(_cells, self.rows)), frozenset(_COLUMNS[2:6]))]
        shown += [Part(lines=told)] if told else []
        if self.findings:
            nodes = tuple((one.node, one.op_type, one.reason) for one in self.findings)
            title = f"in the graph: {count(len(nodes), 'node')} that should not be there"
            shown.append(Part(title, ("node", "operator", "reason"), nodes))
        return shown


_COLUMNS = ("output", "inputs", "batch", "max |d|", "relative", "top-1", "verdict")


def _cells(row: ParityRow) -> tuple[str, ...]:
    top1 = "" if row.top1 is None else f"{row.top1:.0%}"
    absent = math.isnan(row.relative)
    numbers = ("", "") if absent else (f"{row.absolute:.2g}", f"{row.relative:.2g}")
    verdict = (f"ok, but {row.note}" if row.note else "ok") if row.ok else row.note or "FAIL"
    return (row.output, row.inputs, str(row.batch), *numbers, top1, verdict)


def compare(
    reference: Mapping[str, Array],
    other: Sequence[Array],
    *,
    batch: int,
    tolerance: float,
    inputs: str = "random",
) -> list[ParityRow]:
    """Compares outputs one by one; the reference is PyTorch's, by name."""
    pairs = zip(reference.items(), other, strict=True)
    rows = [_row(name, mine, theirs, batch, tolerance) for (name, mine), theirs in pairs]
    if inputs == "random":
        return rows
    marked = [replace(row, inputs=inputs) for row in rows]
    return [_excused(row, mine) for row, mine in zip(marked, reference.values(), strict=True)]


def _row(name: str, reference: Array, other: Array, batch: int, tolerance: float) -> ParityRow:
    note = _incomparable(reference, other)
    if note:
        return ParityRow(name, batch, reference.shape, math.nan, math.nan, None, note, ok=False)
    absolute, relative = _distance(reference, other)
    note = "" if reference.any() or not relative <= tolerance else "PyTorch computes nothing but zeros"
    top1, ok = _top1(reference, other), relative <= tolerance
    return ParityRow(name, batch, reference.shape, absolute, relative, top1, note, ok=ok)


def _excused(row: ParityRow, reference: Array) -> ParityRow:
    """A row that proves nothing either way: inputs that the model itself cannot digest."""
    return row if np.isfinite(reference).all() else replace(row, ok=True)


def _incomparable(reference: Array, other: Array) -> str:
    if reference.shape != other.shape:
        return f"the shape is {reference.shape} in PyTorch and {other.shape} in ONNX Runtime"
    for where, values in (("PyTorch", reference), ("ONNX Runtime", other)):
        wrong = int(np.size(values) - np.isfinite(values).sum())
        if wrong:
            first = np.asarray(values).ravel()[~np.isfinite(values).ravel()][0]
            return f"{wrong} of {np.size(values)} values are not finite in {where} (the first is {first})"
    return ""


def _distance(reference: Array, other: Array) -> tuple[float, float]:
    if reference.size == 0:
        return 0.0, 0.0
    wide = reference.astype(np.float64)
    absolute = float(np.abs(wide - other.astype(np.float64)).max())
    largest = float(np.abs(wide).max())
    return absolute, absolute / largest if largest else absolute


def _top1(reference: Array, other: Array) -> float | None:
    if reference.ndim != 2 or reference.shape[1] < 2 or reference.dtype.kind != "f" or not len(reference):
        return None
    return float((reference.argmax(1) == other.argmax(1)).mean())


def _json(number: float) -> float | None:
    return number if math.isfinite(number) else None
