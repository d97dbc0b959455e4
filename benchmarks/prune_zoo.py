"""A quarter of the branches deleted from models of timm and torchvision: a row each, appended as it comes.

    python -m benchmarks.prune_zoo --resume                      # one model of every family
    python -m benchmarks.prune_zoo --resume --every              # then all others, small ones first
    python -m benchmarks.prune_zoo --match 'timm.models.res*'

The pruned model must give what the full one gives with these branches multiplied by zero (by gates whose
evaluation scale is set to 0), have as many residual adds fewer, hold none but weights of the full one, and
export to an ONNX file that agrees with it. Refusals are rows too, with their words. ``docs/prune_zoo.md`` is
written from the rows.
"""

import copy
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import surgeon
from benchmarks import zoo
from benchmarks._zoo_checks import outputs, randomise
from benchmarks._zoo_models import Entry, small
from benchmarks._zoo_report import read
from benchmarks.onnx_zoo import _GB, _calm, _cause, families, read_operators_once
from surgeon._gating.gated import placed_gates
from surgeon._tracing.example import inputs
from surgeon.errors import ExportError, PruneError

ROWS = Path(__file__).parents[1] / "docs" / "pruning.jsonl"
_HEAD = """# Branches deleted from the models of timm and torchvision

Written by `python -m benchmarks.prune_zoo`, from the rows in `pruning.jsonl`.

Every fourth branch is deleted. A model has *passed* if without them it gives what the full one gives with
these branches multiplied by zero, has as many residual adds fewer, holds none but weights of the full one,
and its ONNX file agrees with it in ONNX Runtime. Weights are random, images small.

Models so far, the smallest of each family first: {results}.
"""
_NUMBERS = """
Of the {branches} branches of the {count} that passed {deleted} were deleted, and {weights:.1%} of the weights
are left on average; as many as before in {same}, where the layers of the branch also make what stays (ReXNet:
channels beside those of the sum). The largest difference to the network with zeros is {difference:.1e} of the
largest output; that of ONNX Runtime to PyTorch {onnx:.1e}.
"""


def prune(entry: Entry) -> dict[str, Any]:
    """The columns of one model."""
    torch.manual_seed(0)
    model, given, size = small(entry)
    randomise(model)
    _calm(model, given)
    model.eval()
    before = surgeon.find(model, given)
    drop = [r.name for r in before if r.kind in ("identity", "projection")][::4]
    row: dict[str, Any] = {"size": size, "gates": len(before), "deleted": len(drop)}
    if not drop:
        return row | {"result": "no branch"}
    try:
        pruned = surgeon.prune(model, drop, example=given)
    except PruneError as error:
        return row | {"result": "refused", "cause": str(error)}
    row |= _compared(model, pruned, drop, given)
    wrong = [name for name, holds in _claims(model, pruned, row).items() if not holds]
    if wrong:
        return row | {"result": "failed", "cause": f"not so: {', '.join(wrong)}"}
    return row | _exported(model, pruned, given)


def _compared(model: nn.Module, pruned: nn.Module, drop: list[str], given: Any) -> dict[str, Any]:
    """The pruned model beside the full one with these branches multiplied by zero."""
    args, kwargs = inputs(model, given)
    zeroed = surgeon.apply(copy.deepcopy(model), scaling="paper", example=given).eval()
    for placed in placed_gates(zeroed):
        placed.gate.scale = 0.0 if placed.name in drop else 1.0
    full, expected, got = (outputs(one, args, kwargs) for one in (model, zeroed, pruned))
    scale = max(float(t.abs().max()) for t in expected if t.numel())
    return {
        "left": len(surgeon.find(pruned, given)),
        "difference": _apart(got, expected) / scale,
        "moved": _apart(full, expected) / scale,
        "weights": sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters()),
    }


def _claims(model: nn.Module, pruned: nn.Module, row: dict[str, Any]) -> dict[str, bool]:
    return {
        "it gives what the full model gives without these branches": row["difference"] <= 1e-5,
        "the branches count": row["moved"] > 1e-5,
        "as many residual adds are gone": row["left"] == row["gates"] - row["deleted"],
        "it holds no other weights": set(pruned.state_dict()) <= set(model.state_dict()),
    }


def _exported(model: nn.Module, pruned: nn.Module, given: Any) -> dict[str, Any]:
    """The file of the pruned model beside it; where it does not export, whether the full model does."""
    try:
        return {"result": "passed", **_onnx(pruned, given)}
    except ExportError as error:
        cause = _cause(error)
    try:
        _onnx(model, given)
    except ExportError as error:
        return {"result": "not exported", "cause": f"as the full model: {_cause(error)}"}
    return {"result": "failed", "cause": cause}


def _onnx(model: nn.Module, given: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = surgeon.export(model, Path(folder) / "m.onnx", example=given)
        except ExportError:
            report = surgeon.export(model, Path(folder) / "m.onnx", example=given, dynamic_batch=False)
    return {"onnx": max(one.relative for one in report.parity.rows), "nodes": sum(report.nodes.values())}


def _apart(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    if [t.shape for t in some] != [t.shape for t in others]:
        return float("inf")
    return max(
        float((a.double() - b.double()).abs().max()) for a, b in zip(some, others, strict=True) if a.numel()
    )


def page(rows: list[dict[str, Any]]) -> str:
    """What came of how many models, and those that did not pass, with their words."""
    results = Counter(_result(row) for row in rows)
    ran = [row for row in rows if _result(row) == "passed"]
    said = _HEAD.format(results=", ".join(f"{count} {result}" for result, count in results.most_common()))
    if ran:
        said += _NUMBERS.format(
            count=len(ran),
            branches=sum(row["gates"] for row in ran),
            deleted=sum(row["deleted"] for row in ran),
            weights=statistics.mean(row["weights"] for row in ran),
            same=sum(row["weights"] == 1 for row in ran),
            difference=max(row["difference"] for row in ran),
            onnx=max(row["onnx"] for row in ran),
        )
    return said + "".join(_lines([row for row in rows if _result(row) != "passed"]))


def _result(row: dict[str, Any]) -> str:
    return str(row.get("result", "failed"))


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    if rows:
        yield "\n| model | result | said |\n|---|---|---|\n"
    for row in rows:
        said = str(row.get("cause") or row.get("error") or "").replace("|", "\\|").replace("\n", " ")
        yield f"| {row['library']}:{row['model']} | {_result(row)} | {said} |\n"


def _gated(families: list[Entry]) -> list[Entry]:
    """Every other model of the zoo that takes gates, small ones first."""
    known = [row for row in read(zoo.ROWS) if row["stage"] == "structure" and row.get("gates")]
    every = [Entry(row["library"], row["model"]) for row in sorted(known, key=lambda r: int(r["parameters"]))]
    return [entry for entry in every if entry not in families]


@click.command()
@click.option(
    "--match", multiple=True, default=["*"], help="Glob patterns on families, as timm.models.resnet."
)
@click.option("--every", is_flag=True, help="Then every other model of the zoo that takes gates.")
@click.option("--resume", is_flag=True, help="Measure what has no row yet or failed, and nothing again.")
@click.option("--limit", default=1200.0, show_default=True, help="Seconds a model may take.")
@click.option("--rows", type=click.Path(path_type=Path), default=ROWS, show_default=True)
@click.option("--page-only", is_flag=True, help="Measure nothing.")
def main(
    match: tuple[str, ...], every: bool, resume: bool, limit: float, rows: Path, page_only: bool
) -> None:
    """Deletes a quarter of the branches of one model of every family."""
    if not page_only:
        if not resume:
            rows.unlink(missing_ok=True)
        done = {(r["library"], r["model"]) for r in read(rows) if _result(r) != "failed"}
        chosen = families(match, zoo.ROWS)
        chosen += _gated(chosen) if every else []
        read_operators_once()
        zoo.STAGES["prune"] = prune
        todo = [zoo.Job(e, "prune", _GB) for e in chosen if (e.library, e.name) not in done]
        zoo._run(todo, rows, 1, limit, _GB)
    found = read(rows)
    rows.with_name("prune_zoo.md").write_text(page(found))
    sys.exit(any(_result(row) == "failed" for row in found))


if __name__ == "__main__":
    main()
