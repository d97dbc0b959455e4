"""A quarter of the branches deleted from models of timm and torchvision: a row each, appended as it comes.

    python -m benchmarks.prune_zoo --resume                      # one model of every family
    python -m benchmarks.prune_zoo --match 'timm.models.res*' --onnx

The pruned model must give what the full one gives with these branches multiplied by zero (by gates whose
evaluation scale is set to 0), have as many residual adds fewer, hold fewer weights under the same names,
and, with ``--onnx``, export to a file that agrees. Refusals are rows too, with their words.
"""

import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.utils import _pytree as pytree

import surgeon
from benchmarks._zoo_checks import randomise
from benchmarks._zoo_models import Entry, small
from benchmarks.onnx_zoo import families
from benchmarks.zoo import ROWS as ZOO
from surgeon._gating.gated import placed_gates
from surgeon.errors import PruneError, SurgeonError

ROWS = Path(__file__).parents[1] / "docs" / "pruning.jsonl"


def row(entry: Entry, *, onnx: bool) -> dict[str, Any]:
    """The columns of one model."""
    torch.manual_seed(0)
    model, given, size = small(entry)
    randomise(model)
    model.eval()
    started = time.process_time()
    try:
        names = [r.name for r in surgeon.find(model, given) if r.kind in ("identity", "projection")]
        if not (drop := names[::4]):
            return {"result": "no residual add"}
        pruned = surgeon.prune(model, drop, example=given)
    except PruneError as error:
        return {"result": "refused", "cause": str(error)}
    seconds = time.process_time() - started
    args, kwargs = (given, {}) if isinstance(given, tuple) else ((given,), {})
    with torch.no_grad():
        got, full = _leaves(pruned(*args, **kwargs)), _leaves(model(*args, **kwargs))
        expected = _leaves(_zeroed(model, drop, given)(*args, **kwargs))
    scale = max(float(t.abs().max()) for t in expected)
    left = len(surgeon.find(pruned, given))
    found: dict[str, Any] = {
        "result": "passed",
        "size": size,
        "gates": len(names),
        "deleted": len(drop),
        "left": left,
        "difference": max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) / scale,
        "moved": max(float((a - b).abs().max()) for a, b in zip(full, expected, strict=True)) / scale,
        "weights": sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
    }
    fewer = left == len(surgeon.find(model, given)) - len(drop)
    if found["difference"] > 1e-5 or not fewer or not set(pruned.state_dict()) < set(model.state_dict()):
        found["result"] = "failed"
    if onnx:
        with tempfile.TemporaryDirectory() as folder:
            report = surgeon.export(pruned, Path(folder) / "m.onnx", example=given)
        found["onnx"] = max(one.relative for one in report.parity.rows)
    return found


def _zeroed(model: nn.Module, drop: list[str], given: Any) -> nn.Module:
    """The full model with these branches multiplied by zero."""
    gated = surgeon.apply(copy.deepcopy(model), scaling="paper", example=given).eval()
    for placed in placed_gates(gated):
        placed.gate.scale = 0.0 if placed.name in drop else 1.0
    return gated


def _leaves(output: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


@click.command()
@click.option("--match", multiple=True, help="Glob patterns on families, as timm.models.resnet.")
@click.option("--resume", is_flag=True, help="Leave out models that have a row.")
@click.option("--onnx", is_flag=True, help="Export the pruned model, too.")
@click.option("--rows", type=click.Path(path_type=Path), default=ROWS, show_default=True)
def main(match: tuple[str, ...], resume: bool, onnx: bool, rows: Path) -> None:
    """Deletes a quarter of the branches of one model of every family."""
    lines = rows.read_text().splitlines() if resume and rows.exists() else []
    done = {json.loads(line)["model"] for line in lines}
    if not resume:
        rows.unlink(missing_ok=True)
    for entry in families(match or ("*",), ZOO):
        if str(entry) in done:
            continue
        try:
            found = row(entry, onnx=onnx)
        except SurgeonError as error:
            found = {"result": "failed", "cause": f"{type(error).__name__}: {error}"}
        except Exception as error:  # noqa: BLE001 - a sweep goes on
            found = {"result": "failed", "cause": f"unexpected {type(error).__name__}: {error}"}
        with rows.open("a") as file:
            file.write(json.dumps({"model": str(entry), "torch": torch.__version__, **found}) + "\n")
        click.echo(f"{entry}: {found}")


if __name__ == "__main__":
    main()
