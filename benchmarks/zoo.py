"""Every model of timm and torchvision, gated and checked: one row each, appended as it goes.

    python -m benchmarks.zoo --library timm --match 'resnet*' --jobs 2 --resume
    python -m benchmarks.zoo --deep --match 'test_*'      # also the numerical columns

Each model runs in a process of its own, forked after the libraries are loaded, so that a crash or a memory
peak costs one row. ``docs/coverage.csv`` and ``docs/coverage.md`` are written from the rows.
"""

import csv
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import surgeon
from benchmarks import _zoo_checks, _zoo_report
from benchmarks._zoo_models import Entry, build, entries, example
from surgeon.errors import NoResidualsError

DEFAULT = Path("docs/coverage.csv")


def structure(entry: Entry) -> dict[str, Any]:
    """The structural columns of one model, on tensors without memory."""
    model = build(entry, device="meta")
    given = example(entry, model, "meta")
    if given is not None and "detection" in type(model).__module__:  # shapes that depend on values
        model = build(entry, device="cpu")
        given = example(entry, model, "cpu")
    start = time.perf_counter()
    findings = surgeon.find(model, given)
    found = time.perf_counter()
    row = {"parameters": sum(p.numel() for p in model.parameters()), **_zoo_checks.census(findings)}
    row |= _zoo_checks.recall(model, given, findings)
    row["find_s"] = round(found - start, 2)
    start = time.perf_counter()
    try:
        surgeon.apply(model, example=given)
        row["apply_s"] = round(time.perf_counter() - start, 2)
        row["restored"] = _zoo_checks.restores(model)
    except NoResidualsError as error:
        row["note"] = str(error)
    return row


def numbers(entry: Entry) -> dict[str, Any]:
    """The numerical columns of one model, on real tensors."""
    torch.manual_seed(0)
    model = build(entry, device="cpu")
    return _zoo_checks.numbers(model, example(entry, model, "cpu"))


def measure(entry: Entry, deep: bool) -> dict[str, Any]:
    """One row; what goes wrong is in its ``error`` column."""
    row: dict[str, Any] = {"library": entry.library, "model": entry.name}
    try:
        row |= structure(entry)
        if deep and row["gates"]:
            row |= numbers(entry)
    except Exception as error:  # noqa: BLE001 - whatever a model does is a row of the table
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _child(entry: Entry, deep: bool, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        pipe.send(measure(entry, deep))


def _run(todo: list[Entry], output: Path, jobs: int, deep: bool, limit_s: float) -> None:
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Entry, Any, float]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("models", total=len(todo))
        while todo or running:
            while todo and len(running) < jobs:
                entry = todo.pop(0)
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(entry, deep, send))
                process.start()
                send.close()
                running[process] = entry, receive, time.monotonic()
            for process, (entry, receive, started) in list(running.items()):
                over = time.monotonic() - started > limit_s
                if not (receive.poll(0.02) or over or not process.is_alive()):
                    continue
                row = {"library": entry.library, "model": entry.name}
                try:
                    row = (
                        receive.recv() if receive.poll() else row | {"error": f"no answer in {limit_s:.0f} s"}
                    )
                except EOFError:
                    row["error"] = f"the process ended with exit code {process.exitcode}"
                process.kill() if over else process.join()
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                del running[process]
                progress.update(bar, advance=1, description=str(entry)[:40])


@click.command()
@click.option("--library", type=click.Choice(["timm", "torchvision"]), help="One library; default both.")
@click.option("--match", multiple=True, default=["*"], help="Glob pattern on model names; may be repeated.")
@click.option("--resume", is_flag=True, help="Keep the rows that are there and measure the others.")
@click.option("--jobs", default=2, show_default=True, help="Models at a time.")
@click.option("--deep", is_flag=True, help="Also run the numerical checks.")
@click.option("--limit", default=900.0, show_default=True, help="Seconds a model may take.")
@click.option("--rows", type=click.Path(path_type=Path), default=Path("runs/zoo.jsonl"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=DEFAULT, show_default=True)
def main(
    library: str | None,
    match: tuple[str, ...],
    resume: bool,
    jobs: int,
    deep: bool,
    limit: float,
    rows: Path,
    output: Path,
) -> None:
    """Measure every model and write the coverage table."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        rows.unlink(missing_ok=True)
    done = {(r["library"], r["model"]) for r in _zoo_report.read(rows) if not r.get("error")}
    todo = [e for e in entries(library, match) if (e.library, e.name) not in done]
    _run(todo, rows, jobs, deep, limit)
    _zoo_report.write(_zoo_report.read(rows), output)
    sys.exit(1 if any(r.get("error") for r in _zoo_report.read(rows)) else 0)


if __name__ == "__main__":
    csv.field_size_limit(1 << 24)
    main()
