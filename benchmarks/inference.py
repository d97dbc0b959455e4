"""Latency in ONNX Runtime of a folded export against the ungated and the naive one, taken in turns.

    python -m benchmarks.inference --models resnet50,vit_small_patch16_224 --rounds 60 --resume

Three files of each model: the ungated export; the export of the gated model (``scaling="paper"``), folded;
and the naive one, in which every gate has left its multiplication. They run on the same random image on one
thread, one run each per round in an order drawn anew each round, so that what else the machine does falls on
all alike. A ratio is the median over the rounds of a file's run over the ungated one's run *of the same
round*; the spread is between the quartiles. The clock is the processor time of the thread, on which waiting
for a busy machine does not count. ``again`` is a second session on the ungated file: what it shows is noise.

Rows are appended to ``--rows``, one per model; ``--page`` is written from all of them.
"""

import copy
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime
import timm
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import surgeon
from benchmarks._zoo_checks import randomise
from surgeon._onnx.exporter import to_onnx
from surgeon._onnx.hygiene import node_counts
from surgeon._onnx.signature import signature

MODELS = "resnet50,vit_small_patch16_224,convnext_tiny,efficientnet_b0"
ROWS, PAGE = Path("runs/inference.jsonl"), Path("docs/inference.md")
_WARM_UP = 3
_HEAD = """# Latency of exported files

Written by `python -m benchmarks.inference` with onnxruntime {version}, never by hand. One thread, random
weights. *folded* is the export of the gated model (`scaling="paper"`), *naive* the one in which each gate
left its multiplication, *again* the ungated file once more in a session of its own: as far as that is from
1, the rest is noise. A ratio is the median of a run over the ungated run of the same round, with the
quartiles in brackets.

| model | batch | nodes ungated / folded / naive | ungated | folded | naive | again |
|---|---|---|---|---|---|---|"""


def files(model: nn.Module, size: int, folder: Path) -> dict[str, Path]:
    """The three ONNX files of a model, by variant."""
    example = torch.zeros(2, 3, size, size)
    gated = copy.deepcopy(model)
    surgeon.apply(gated, scaling="paper", unit="batch", example=example)
    made = {name: folder / f"{name}.onnx" for name in ("ungated", "folded", "naive")}
    surgeon.export(model, made["ungated"], example=example)
    surgeon.export(gated, made["folded"], example=example)
    gated.eval()
    ir.save(to_onnx(gated, signature(gated, example), opset=None, dynamic_batch=True), made["naive"])
    return made


def runner(path: Path, image: np.ndarray[Any, Any]) -> Callable[[], float]:
    """Something that runs a file on an image, on this thread, and says how many seconds of it that took."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image}

    def run() -> float:
        start = time.thread_time()
        session.run(None, feed)
        return time.thread_time() - start

    return run


def measure(name: str, rounds: int, batch: int) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    randomise(model)
    size = model.pretrained_cfg["input_size"][-1]
    image = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        made = files(model, size, Path(folder))
        runs = {variant: runner(path, image) for variant, path in made.items()}
        runs["again"] = runner(made["ungated"], image)
        nodes = {variant: sum(node_counts(ir.load(path)).values()) for variant, path in made.items()}
        took: dict[str, list[float]] = {variant: [] for variant in runs}
        for index in track(range(rounds + _WARM_UP), name, console=Console(stderr=True)):
            for variant in random.sample(list(runs), len(runs)):
                seconds = runs[variant]()
                if index >= _WARM_UP:
                    took[variant].append(seconds)
    row: dict[str, Any] = {"model": name, "size": size, "batch": batch, "rounds": rounds, "nodes": nodes}
    row |= {"cpu": platform.processor() or platform.machine(), "onnxruntime": onnxruntime.__version__}
    row["ms"] = {variant: 1e3 * statistics.median(seconds) for variant, seconds in took.items()}
    base = took.pop("ungated")
    row["ratio"] = {
        variant: statistics.quantiles([mine / theirs for mine, theirs in zip(seconds, base, strict=True)])
        for variant, seconds in took.items()
    }
    return row


def page(rows: list[dict[str, Any]]) -> str:
    """The page with all rows as a table."""
    lines = [_HEAD.format(version=onnxruntime.__version__)]
    for row in rows:
        nodes = " / ".join(str(row["nodes"][variant]) for variant in ("ungated", "folded", "naive"))
        ratios = " | ".join(_ratio(row["ratio"][variant]) for variant in ("folded", "naive", "again"))
        batch = f"{row['batch']} x {row['size']} px, {row['rounds']} rounds"
        lines.append(f"| {row['model']} | {batch} | {nodes} | {row['ms']['ungated']:.1f} ms | {ratios} |")
    return "\n".join(lines) + "\n"


def _ratio(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def read(rows: Path) -> list[dict[str, Any]]:
    """The rows so far; the last one of a model and batch counts."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    parsed = [json.loads(line) for line in lines]
    return list({(row["model"], row["batch"]): row for row in parsed}.values())


@click.command()
@click.option("--models", default=MODELS, show_default=True, help="Names in timm, with commas.")
@click.option("--rounds", default=100, show_default=True, help="Runs of each file.")
@click.option("--batch", default=1, show_default=True, help="Images at a time.")
@click.option("--resume", is_flag=True, help="Keep the rows that are there and measure the others.")
@click.option("--rows", type=click.Path(path_type=Path), default=ROWS, show_default=True)
@click.option("--page", "written", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def main(models: str, rounds: int, batch: int, resume: bool, rows: Path, written: Path) -> None:
    """Measure and write the page."""
    torch.set_num_threads(1)
    rows.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["model"], row["batch"]) for row in read(rows)} if resume else set()
    for name in models.split(","):
        if (name, batch) not in done:
            row = measure(name, rounds, batch)
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            written.write_text(page(read(rows)))
    click.echo(page(read(rows)))


if __name__ == "__main__":
    main()
