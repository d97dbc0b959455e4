"""Every model of timm and torchvision, gated and checked: rows appended as they come, resumable.

    python -m benchmarks.zoo --library timm --match 'resnet*' --jobs 2 --resume
    python -m benchmarks.zoo --stage numbers --stage fold --match 'test_*'

Four stages, one row a model and stage: ``structure`` (what is found and refused, on tensors without memory),
``numbers`` (evaluation, training and gradients on real tensors), ``fold`` (exactness in float64) and
``leftover`` (which gates would keep their multiplication, without memory, for models that were not folded).
Each model runs in a process of its own, forked after the libraries are loaded, so that a crash or a memory
peak costs one row. ``docs/coverage.csv`` and ``docs/coverage.md`` are written from the rows.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from benchmarks import _zoo_checks, _zoo_report, _zoo_structure
from benchmarks._zoo_models import Entry, build, entries, example, small
from surgeon._finding.analysis import analyse
from surgeon._tracing.example import inputs

ROWS, DEFAULT = Path("docs/coverage.jsonl"), Path("docs/coverage.csv")
_BASE_GB = 1.5  # of a process with the libraries loaded and small activations


def structure(entry: Entry) -> dict[str, Any]:
    """The structural columns of one model, at its declared image size, on tensors without memory."""
    model, given = _declared(entry)
    start = time.process_time()
    analysis = analyse(model, *inputs(model, given))
    found = time.process_time() - start
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **_zoo_structure.census(analysis.findings),
        **_zoo_structure.recall(model, analysis),
        "find_s": round(found, 2),
    }


def numbers(entry: Entry) -> dict[str, Any]:
    """The numerical columns of one model, on real tensors."""
    model, given, size = small(entry)
    return {"size": size, **_zoo_checks.numbers(model, given)}


def fold(entry: Entry) -> dict[str, Any]:
    """What folding does to one model in float64, or in float32 where it runs in nothing else."""
    for dtype in (torch.float64, torch.float32):
        model, given, _ = small(entry, dtype)
        for module in model.modules():
            if hasattr(module, "score_thresh"):
                module.score_thresh = 0.0  # random weights detect nothing that is above one
        if _zoo_checks.runs(model, given):
            break
    return {"fold_dtype": str(dtype).removeprefix("torch."), **_zoo_checks.folds(model, given)}


def leftover(entry: Entry) -> dict[str, Any]:
    """Which gates of one model find no weight for their scale, on tensors without memory."""
    return _zoo_checks.leftover(*_declared(entry))


def _declared(entry: Entry) -> tuple[nn.Module, Any]:
    """A model and its example at the declared size, without memory unless shapes depend on values."""
    model = build(entry, device="meta")
    if "detection" in type(model).__module__:
        model = build(entry, device="cpu")
    return model, example(entry, model, next(model.parameters()).device.type)


STAGES: dict[str, Callable[[Entry], dict[str, Any]]] = {
    "structure": structure,
    "numbers": numbers,
    "fold": fold,
    "leftover": leftover,
}


def gigabytes(stage: str, parameters: int) -> float:
    """The memory that one stage takes: weights, and gradients or a second copy."""
    numbers = 9 if parameters <= _zoo_checks.TRAINED else 5
    return (
        _BASE_GB + parameters * {"structure": 0, "numbers": numbers, "fold": 18, "leftover": 0}[stage] / 1e9
    )


@dataclass(frozen=True)
class Job:
    """One stage of one model, and the memory it may take."""

    entry: Entry
    stage: str
    gigabytes: float

    def row(self) -> dict[str, Any]:
        """The row with nothing measured yet."""
        return {"library": self.entry.library, "model": self.entry.name, "stage": self.stage}

    def measure(self) -> dict[str, Any]:
        """The row; what goes wrong is in its ``error`` column."""
        row = self.row()
        torch.manual_seed(0)
        start = time.process_time()
        try:
            row |= STAGES[self.stage](self.entry)
        except Exception as error:  # noqa: BLE001 - whatever a model does is a row of the table
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        row[f"{self.stage}_s"] = round(time.process_time() - start, 1)
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return row


def plan(models: list[Entry], stage: str, rows: list[dict[str, Any]]) -> list[Job]:
    """The models that have no row of a stage yet, small ones first; a fold shows what is left over, too."""
    enough = ("fold", "leftover") if stage == "leftover" else (stage,)
    measured = (r for r in rows if r["stage"] in enough and not (r.get("error") or r.get("skipped")))
    done = {(r["library"], r["model"]) for r in measured}
    structures = {(r["library"], r["model"]): r for r in rows if r["stage"] == "structure"}
    jobs = []
    for entry in (e for e in models if (e.library, e.name) not in done):
        known = structures.get((entry.library, entry.name), {})
        if stage == "structure" or known.get("gates"):
            jobs.append(Job(entry, stage, gigabytes(stage, known.get("parameters", 0))))
    return sorted(jobs, key=lambda job: job.gigabytes)


def _child(job: Job, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        pipe.send(job.measure())


def _start(job: Job) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, send))
    process.start()
    send.close()
    return process, receive


def _finish(job: Job, process: BaseProcess, pipe: Connection, late: str) -> dict[str, Any]:
    """The row of a process that has answered, ended or (``late`` says so) takes too long."""
    try:
        row: dict[str, Any] = pipe.recv() if pipe.poll() else job.row() | {"error": late or "no answer"}
    except EOFError:
        process.join()
        row = job.row() | {"error": f"the process ended with exit code {process.exitcode}"}
    process.kill() if late else process.join()
    return row


def _run(todo: list[Job], rows: Path, jobs: int, limit_s: float, memory_gb: float) -> None:
    """Runs the jobs, no more at a time than fit, and appends a row for each."""
    running: dict[Job, tuple[BaseProcess, Connection, float]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("models", total=len(todo))
        while todo or running:
            used = sum(job.gigabytes for job in running)
            while todo and len(running) < jobs and (not running or used + todo[0].gigabytes <= memory_gb):
                job = todo.pop(0)
                used += job.gigabytes
                running[job] = *_start(job), time.monotonic()
            for job, (process, pipe, started) in list(running.items()):
                late = f"no answer in {limit_s:.0f} s" if time.monotonic() - started > limit_s else ""
                if pipe.poll(0.02) or late or not process.is_alive():
                    row = _finish(job, process, pipe, late)
                    with rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    del running[job]
                    progress.update(bar, advance=1, description=f"{job.stage} {job.entry}"[:40])


@click.command()
@click.option("--library", type=click.Choice(["timm", "torchvision"]), help="One library; default both.")
@click.option("--match", multiple=True, default=["*"], help="Glob pattern on model names; may be repeated.")
@click.option(
    *("--stage", "stages"),
    type=click.Choice(list(STAGES)),
    multiple=True,
    default=["structure"],
    show_default=True,
    help="What to check; may be repeated. The later stages take models that the first one found gates in.",
)
@click.option("--resume", is_flag=True, help="Measure what has no row yet or failed, and nothing again.")
@click.option("--jobs", default=2, show_default=True, help="Models at a time.")
@click.option("--limit", default=900.0, show_default=True, help="Seconds a model may take.")
@click.option("--memory", default=20.0, show_default=True, help="GB that the models at a time may take.")
@click.option("--rows", type=click.Path(path_type=Path), default=ROWS, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=DEFAULT, show_default=True)
def main(
    library: str | None,
    match: tuple[str, ...],
    stages: tuple[str, ...],
    resume: bool,
    jobs: int,
    limit: float,
    memory: float,
    rows: Path,
    output: Path,
) -> None:
    """Measure every model and write the coverage table."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    wanted = entries(library, match)
    if not resume:
        _zoo_report.forget(rows, {(e.library, e.name) for e in wanted}, stages)
    for stage in (name for name in STAGES if name in stages):
        todo = plan(wanted, stage, _zoo_report.read(rows))
        large = [job for job in todo if job.gigabytes > memory]
        for job in large:
            with rows.open("a") as file:
                note = f"needs {job.gigabytes:.0f} GB, more than {memory:.0f}"
                file.write(json.dumps(job.row() | {"skipped": note}) + "\n")
        _run([job for job in todo if job not in large], rows, jobs, limit, memory)
    _zoo_report.write(_zoo_report.read(rows), output)
    sys.exit(1 if any(row.get("error") for row in _zoo_report.read(rows)) else 0)


if __name__ == "__main__":
    main()
