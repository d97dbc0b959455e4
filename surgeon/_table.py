"""What people see of results: tables of rich, made of the same dataclasses that go out as JSON."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from surgeon._finding.findings import Findings, Refusal

_SHOWN_GROUPS = 12


def gate_rows(status: Any, findings: Findings) -> list[dict[str, Any]]:
    """One dict per gate for JSON: its status and what its shortcut and branch run."""
    found = {residual.name: residual for residual in findings.residuals}
    rows = []
    for gate in status.gates:
        residual = found.get(gate.name)
        more = {} if residual is None else {"shortcut": residual.shortcut, "branch": residual.branch}
        rows.append({**asdict(gate), **more})
    return rows


def inspection(model: str, status: Any, findings: Findings, *, every: bool) -> Sequence[RenderableType]:
    """The gates of a model as a table, what was refused, and the totals."""
    rows = gate_rows(status, findings)
    table = _table()
    for name in ("gate", "block", "kind", "shortcut"):
        table.add_column(name, overflow="fold")
    table.add_column("p_l", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    noted = any(row["note"] for row in rows)
    if noted:
        table.add_column("note", overflow="fold")
    for row in rows:
        cells = (row["name"], row["block_type"], row["kind"], row.get("shortcut", ""))
        numbers = (f"{row['survival']:.3f}", f"{row['flops_share']:.1%}")
        table.add_row(*cells, *numbers, *((row["note"],) if noted else ()))
    title = f"{model}: {_count(len(rows), 'residual add')}"
    return (_titled(title, table), *refusals(findings.refused, every=every), _totals(status))


def folded(
    model: str, read: str, written: str, scales: Mapping[str, float], error: float
) -> Sequence[RenderableType]:
    """What a fold of a checkpoint did, in a few lines."""
    low, high = min(scales.values()), max(scales.values())
    lines = (
        f"{_count(len(scales), 'gate')} folded, scales {low:.4g} to {high:.4g}, relative error {error:.1e}",
        f"{read} -> {written}",
    )
    return (_titled(f"{model}: stock weights", *map(Text, lines)),)


def refusals(refused: Sequence[Refusal], *, every: bool) -> Sequence[RenderableType]:
    """The additions left alone with their reasons: one line per reason and class of block, or every one."""
    if not refused:
        return ()
    title = f"left alone: {_count(len(refused), 'addition')}"
    table = _table()
    if every:
        table.add_column("addition", overflow="fold")
        table.add_column("block", overflow="fold")
    else:
        table.add_column("count", justify="right", no_wrap=True)
        table.add_column("block", overflow="fold")
        table.add_column("for example", overflow="fold")
    table.add_column("reason", overflow="fold")
    if every:
        for refusal in refused:
            table.add_row(refusal.name, refusal.block_type, refusal.reason)
        return (_titled(title, table),)
    groups = _grouped(refused)
    for (block_type, _), (count, first) in groups[:_SHOWN_GROUPS]:
        table.add_row(str(count), block_type, first.name, first.reason)
    rest = groups[_SHOWN_GROUPS:]
    if not rest:
        return (_titled(title, table),)
    more = sum(count for _, (count, _) in rest)
    tail = Text(f"and {more} more of {_count(len(rest), 'other kind')}; -v shows all")
    return (_titled(title, table, tail),)


def parity(report: Any) -> Sequence[RenderableType]:
    """A comparison as a table, and the findings in the graph."""
    title = f"{report.path}: {'agrees' if report.ok else 'does not match'} (tolerance {report.tolerance:g})"
    table = _table()
    table.add_column("output", overflow="fold")
    table.add_column("inputs", no_wrap=True)
    for name in ("batch", "max |d|", "relative", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in report.rows:
        top1 = "" if row.top1 is None else f"{row.top1:.0%}"
        numbers = ("", "") if math.isnan(row.relative) else (f"{row.absolute:.2g}", f"{row.relative:.2g}")
        table.add_row(row.output, row.inputs, str(row.batch), *numbers, top1, _verdict(row))
    said = [str(report.divergence)] if report.divergence else []
    said += report.remarks
    parting = tuple(Text(f"{one}\n") for one in said)
    found = (_findings(report.findings),) if report.findings else ()
    return (_titled(title, table), *parting, *found)


def _verdict(row: Any) -> str:
    if row.ok:
        return f"ok, but {row.note}" if row.note else "ok"
    return row.note or "FAIL"


def exported(model: str, report: Any) -> Sequence[RenderableType]:
    """An export as a few facts and its comparison."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(model, report):
        facts.add_row(name, value)
    return Group(facts, Text()), *parity(report.parity)


def _facts(model: str, report: Any) -> Iterable[tuple[str, str]]:
    yield "model", model
    yield "file", f"{report.path} ({_size(report.bytes)}{', weights beside it' if report.data else ''})"
    for name, shape in report.inputs.items():
        yield "input", f"{name} {' x '.join(map(str, shape))}"
    yield "opset", str(report.opset)
    yield "nodes", f"{sum(report.nodes.values())}: {_nodes(report.nodes)}"
    if report.folded or report.kept:
        kept = f", {len(report.kept)} kept as a multiplication" if report.kept else ""
        yield "gates", f"{len(report.folded)} folded{kept}"
    for name, reason in report.kept:
        yield "", f"{name}: {reason}"
    yield "time", f"{report.seconds:.1f} s"


def _nodes(nodes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in nodes.items())


def _findings(findings: Sequence[Any]) -> Group:
    table = _table()
    for name in ("node", "operator", "reason"):
        table.add_column(name, overflow="fold")
    for found in findings:
        table.add_row(found.node, found.op_type, found.reason)
    return _titled(f"in the graph: {_count(len(findings), 'node')} that should not be there", table)


def _grouped(refused: Sequence[Refusal]) -> list[tuple[tuple[str, str], tuple[int, Refusal]]]:
    counts = Counter((refusal.block_type, refusal.reason) for refusal in refused)
    first: dict[tuple[str, str], Refusal] = {}
    for refusal in refused:
        first.setdefault((refusal.block_type, refusal.reason), refusal)
    return [(key, (count, first[key])) for key, count in counts.most_common()]


def _totals(status: Any) -> Text:
    count = len(status.gates)
    first = status.gates[0]
    saves = "" if any(gate.skips for gate in status.gates) else f": unit {first.unit} masks"
    depth = f"{status.expected_depth:.2f} of {count} branches, {status.expected_depth / count:.0%}"
    return Text(
        f"schedule           {status.schedule}, last drop rate {status.gates[-1].drop_rate:g}, "
        f"unit {first.unit}, scaling {first.scaling}\n"
        f"expected depth     {depth}\n"
        f"expected training  {status.expected_flops:.1%} of the plain network's FLOPs{saves}"
    )


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim")


def _titled(title: str, *shown: RenderableType) -> Group:
    """A block of output with its headline; a title of the table's own would wrap at the table's width."""
    return Group(Text(title, style="bold"), *shown, Text())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"
