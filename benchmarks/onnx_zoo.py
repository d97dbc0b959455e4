"""One model of every family of timm and torchvision, gated, folded, exported and compared: a row each.

    python -m benchmarks.onnx_zoo --resume
    python -m benchmarks.onnx_zoo --match 'timm.models.res*' --match '*swin*'

A family is a module of timm's models, or of torchvision's classification, segmentation and video models; its
smallest model stands for it, with random statistics and at the smallest of a few resolutions that it takes.
Each is exported twice with a dynamic batch, ungated and with gates of ``scaling="paper"`` folded, compared
with PyTorch at two batch sizes and on extreme inputs, and the nodes of both graphs are counted against each
other. A difference within the tolerance that rounding does not explain is a failure here. Rows are appended
as they come; ``python -m benchmarks.zoo`` puts them into ``docs/coverage.md``.
"""

import copy
import functools
import re
import sys
import tempfile
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
import torch
from timm.models import model_entrypoint
from torch import nn
from torch.onnx._internal.exporter import _registration
from torchvision.models import get_model_builder

import surgeon
from benchmarks import zoo
from benchmarks._zoo_checks import randomise, settle
from benchmarks._zoo_models import Entry, build, entries, small
from benchmarks._zoo_report import forget, read
from benchmarks.zoo import ROWS
from surgeon._onnx.export_report import ExportReport
from surgeon.errors import ExportError, NoResidualsError, SurgeonError

_ELSEWHERE = (
    "torchvision.models.detection",
    "torchvision.models.optical_flow",
    "torchvision.models.quantization",
)
_GB = 1.5  # of a process with the libraries and a small model


def onnx(entry: Entry) -> dict[str, Any]:
    """The columns of one model."""
    torch.manual_seed(0)
    model, given, size = small(entry)
    randomise(model)
    _calm(model, given)
    gated = copy.deepcopy(model)
    try:
        surgeon.apply(gated, scaling="paper", unit="batch", example=given)
    except NoResidualsError:
        gated = model
    row: dict[str, Any] = {"size": size, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        return row | {"onnx": "passed", **_both(model, gated, given, dynamic=True)}
    except ExportError as error:
        cause = _cause(error)
    except SurgeonError as error:
        return row | {"onnx": "failed", "onnx_cause": _cause(error)}
    try:
        row |= {"onnx": "static batch", "onnx_cause": cause}
        return row | _both(model, gated, given, dynamic=False)
    except SurgeonError as error:
        return row | {"onnx": "failed", "onnx_cause": f"{cause} With a fixed batch: {_cause(error)}"}


def _cause(error: SurgeonError) -> str:
    """What the error says, without the name of the temporary file that was not written."""
    said = re.sub(r"\S*/[01]\.onnx", "the file", str(error))
    return said.partition(" No file was written to ")[0]


def _calm(model: nn.Module, given: Any) -> None:
    """Brings random scales near to one and shifts near to zero, and lets the norms see what they get."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.ndim <= 1:
                around = 0.0 if name.endswith(("bias", "running_mean")) else 1.0
                tensor.copy_(torch.rand(tensor.shape, generator=generator) / 5 - 0.1 + around)
    settle(model, given)


def _both(model: nn.Module, gated: nn.Module, given: Any, *, dynamic: bool) -> dict[str, Any]:
    reports: list[ExportReport] = []
    with tempfile.TemporaryDirectory() as folder:
        for one in (model, gated) if gated is not model else (model,):
            path = Path(folder) / f"{len(reports)}.onnx"
            reports.append(surgeon.export(one, path, example=given, dynamic_batch=dynamic))
            path.unlink()
    ungated, folded = reports[0], reports[-1]
    row: dict[str, Any] = {
        "onnx_rel": max(row.relative for report in reports for row in report.parity.rows),
        "onnx_rows": [[r.inputs, r.batch, r.relative, r.top1] for r in folded.parity.rows],
        "onnx_left": len(folded.kept),
        "onnx_gates": len(folded.kept) + len(folded.folded),
        "onnx_nodes": sum(folded.nodes.values()),
        "onnx_reasons": sorted({reason for _, reason in folded.kept}),
        "export_s": [round(report.seconds, 1) for report in reports],
    }
    doubts = [one for report in reports for one in report.parity.remarks]
    if doubts:
        row |= {"onnx": "failed", "onnx_cause": "; ".join(doubts)}
    extra = Counter(folded.nodes)
    extra.subtract(ungated.nodes)
    extra["Mul"] -= len(folded.kept)
    unexplained = {op: count for op, count in extra.items() if count}
    if unexplained:
        row |= {"onnx": "failed", "onnx_cause": f"nodes that the ungated export has not: {unexplained}"}
    return row


def families(match: tuple[str, ...], rows: Path) -> list[Entry]:
    """The smallest model of every family, small ones first; those with a row are counted."""
    counted = (row for row in read(rows) if "parameters" in row)
    known = {f"{row['library']}:{row['model']}": int(row["parameters"]) for row in counted}
    members: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries(None, ["*"]):
        family = _family(entry)
        made_for_tests = entry.name.startswith("test_")  # These stand for nobody.
        if family.startswith(_ELSEWHERE) or made_for_tests:
            continue
        if any(fnmatchcase(family, one) for one in match):
            members[family].append(entry)
    for some in members.values():
        known |= {str(entry): _parameters(entry) for entry in some if str(entry) not in known}
    chosen = [min(some, key=lambda entry: known[str(entry)]) for some in members.values()]
    return sorted(chosen, key=lambda entry: known[str(entry)])


def _family(entry: Entry) -> str:
    make = get_model_builder if entry.library == "torchvision" else model_entrypoint
    return str(make(entry.name).__module__)


def _parameters(entry: Entry) -> int:
    return sum(parameter.numel() for parameter in build(entry, device="meta").parameters())


def read_operators_once() -> None:
    """The exporter reads its operators' source anew at each call; forked processes inherit one reading."""
    read_once = functools.cache(_registration.ONNXRegistry.from_torchlib)
    read_once()
    _registration.ONNXRegistry.from_torchlib = staticmethod(read_once)


@click.command()
@click.option(
    "--match", multiple=True, default=["*"], help="Glob pattern on families, as timm.models.resnet."
)
@click.option("--resume", is_flag=True, help="Measure what has no row yet or failed, and nothing again.")
@click.option("--jobs", default=1, show_default=True, help="Models at a time.")
@click.option("--limit", default=1200.0, show_default=True, help="Seconds a model may take.")
@click.option("--rows", type=click.Path(path_type=Path), default=ROWS, show_default=True)
def main(match: tuple[str, ...], resume: bool, jobs: int, limit: float, rows: Path) -> None:
    """Export one model of every family."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    chosen = families(match, rows)
    if not resume:
        forget(rows, {(entry.library, entry.name) for entry in chosen}, {"onnx"})
    done = {(row["library"], row["model"]) for row in read(rows) if row.get("onnx") == "passed"}
    todo = [entry for entry in chosen if (entry.library, entry.name) not in done]
    read_operators_once()
    zoo.STAGES["onnx"] = onnx
    zoo._run([zoo.Job(entry, "onnx", _GB) for entry in todo], rows, jobs, limit, jobs * _GB)
    sys.exit(any(row["stage"] == "onnx" and row.get("onnx") != "passed" for row in read(rows)))


if __name__ == "__main__":
    main()
