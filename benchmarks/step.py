"""Seconds per training step and memory, with and without stochastic depth, taken in turns.

    python -m benchmarks.step --models resnet50,vit_small --rates 0.5 --batch 16
    python -m benchmarks.step --small 150
    python -m benchmarks.step --compiled 7
    python -m benchmarks.step --page-only
    python -m benchmarks.step --device cuda --quick

Every variant of a network takes one step per round, in an order drawn anew each round, so that what else the
machine does falls on all of them alike. There is the median over the rounds of a variant's step over the
plain model's *of the same round*, with its quartiles; and, as a neighbour's load only ever makes a step
slower, the ratio of the fastest steps. A coin for a whole batch makes steps of very different length, so the
rounds share a few draws, of nearly the FLOPs that are drawn in the mean; beside each ratio stand the bound
that the arithmetic sets (`surgeon.status(model).expected_flops`) and the share of the FLOPs really drawn.

Rows are appended as they come to ``docs/performance.jsonl``; what is there already is not measured again.
From them ``docs/performance.md`` and ``docs/performance.png`` are written. With ``--device cuda`` it runs on
that. ``--small`` measures the network of small kernels (`benchmarks/_step_small.py`) and nothing else,
``--compiled`` three networks under `torch.compile` (`benchmarks/_step_compiled.py`), some ten minutes;
``--quick`` takes a look at it and at two other networks, prints and keeps nothing.
"""

import itertools
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import _step_compiled, _step_small
from benchmarks._step_measure import Bench, bound, row
from benchmarks._step_models import HAND, NETS, VARIANTS, Net
from benchmarks._step_page import page, plot, table

# glibc gives large blocks back to the system after every operator and takes them anew, which costs more than
# many an operator. Every variant runs with memory that stays, as with jemalloc or on a GPU.
KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def keep_memory(module: str) -> None:
    """Starts the program anew with `KEEPS_MEMORY`, which is read when a process starts."""
    if not KEEPS_MEMORY.items() <= os.environ.items():
        os.execve(  # noqa: S606
            sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | KEEPS_MEMORY
        )


@click.command()
@click.option("--models", default=",".join(NETS), show_default=True)
@click.option("--variants", "only", default=",".join(VARIANTS), show_default=True)
@click.option("--rates", default="0.1,0.2,0.5", show_default=True, help="Final drop rates, by comma.")
@click.option("--batch", "batches", default="16", show_default=True, help="Batch sizes, by comma.")
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--still", default=0, show_default=True, help="Rounds of evaluation and of rate 0; 0: none.")
@click.option("--small", default=0, show_default=True, help="Rounds of the network of small kernels, alone.")
@click.option("--compiled", default=0, show_default=True, help="Rounds of compiled steps, alone.")
@click.option("--quick", is_flag=True, help="A first look, in minutes: prints, and keeps nothing.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--rows", "log", default="docs/performance.jsonl", type=click.Path(path_type=Path))
@click.option("--page", "out", default="docs/performance.md", type=click.Path(path_type=Path))
@click.option("--page-only", is_flag=True, help="Measures nothing.")
def main(  # noqa: PLR0913 - a command line
    *,
    models: str,
    only: str,
    rates: str,
    batches: str,
    threads: int,
    rounds: int,
    still: int,
    small: int,
    compiled: int,
    quick: bool,
    device: str,
    log: Path,
    out: Path,
    page_only: bool,
) -> None:
    """Measures what is not yet in --rows, and writes the page from all rows there are."""
    torch.set_num_threads(threads)
    variants = tuple(v for v in VARIANTS if v == "plain" or v in only.split(","))
    for name in models.split(","):
        if name not in NETS:
            raise click.UsageError(f"{name!r} is not among {', '.join(NETS)}")
    if quick:
        _look(device, threads)
        return
    about = {"threads": threads, "device": _device(device), "torch": torch.__version__}
    if small and not page_only:
        _small(log, about, device, small)
    elif compiled and not page_only:
        _compiled(log, about, device, compiled, int(batches.split(",", maxsplit=1)[0]))
    elif not page_only:
        for batch, name in itertools.product(map(int, batches.split(",")), models.split(",")):
            bench = Bench(NETS[name], batch, torch.device(device), threads)
            cell = {"model": name, "batch": batch, **about}
            if still and not _known(log, cell, kind="still"):
                _append(log, _still(bench, cell, still))
            _rates(log, bench, cell, [float(rate) for rate in rates.split(",")], variants, rounds)
    rows = _read(log)
    out.write_text(page(rows))
    plot(rows, out.with_suffix(".png"))


def _rates(
    log: Path, bench: Bench, cell: dict[str, Any], rates: list[float], variants: tuple[str, ...], rounds: int
) -> None:
    wanted = tuple(v for v in variants if _possible(bench.net, v))
    for rate in rates:
        key = {**cell, "rate": rate}
        new = [v for v in wanted if not _known(log, key, kind="step", variant=v)]
        if new:
            _append(log, [r for r in _steps(bench, key, wanted, rounds) if r["variant"] in new])


def _look(device: str, threads: int) -> None:
    """Small kernels, and two networks at a batch that suits the device."""
    for batch in _step_small.ROWS:
        found = _step_small.rows(batch, 40, torch.device(device), threads)
        click.echo(_step_small.table([{"batch": batch} | row for row in found]))
    for name in ("resnet110", "vit_small"):
        bench = Bench(NETS[name], 2 if device == "cpu" else 64, torch.device(device), threads)
        key = {"model": name, "batch": bench.batch, "rate": 0.5}
        wanted = [v for v in VARIANTS if _possible(NETS[name], v)]
        _steps(bench, key, tuple(wanted), 3 if device == "cpu" else 30)


def _small(log: Path, about: dict[str, Any], device: str, rounds: int) -> None:
    for batch in _step_small.ROWS:
        cell = {"kind": "small", "batch": batch, **about, "rounds": rounds, "load": os.getloadavg()[0]}
        if not _known(log, {"kind": "small", "batch": batch, **about}):
            found = [
                cell | row for row in _step_small.rows(batch, rounds, torch.device(device), about["threads"])
            ]
            _append(log, found)
            click.echo(_step_small.table(found))


def _compiled(log: Path, about: dict[str, Any], device: str, rounds: int, batch: int) -> None:
    for name in _step_compiled.MODELS:
        cell = {"kind": "compiled", "model": name, "batch": batch, **about}
        if not _known(log, cell):
            found = _step_compiled.rows(name, batch, rounds, torch.device(device), about["threads"])
            more = {"rounds": rounds, "load": os.getloadavg()[0]}
            _append(log, [cell | more | row for row in found])
            click.echo(_step_compiled.table([cell | row for row in found]))


def _possible(net: Net, which: str) -> bool:
    """Whether a network can be trained in that way."""
    return net.by_hand if which in HAND.values() else which != "library" or net.own


def _steps(bench: Bench, key: dict[str, Any], wanted: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    taken = bench.steps(key["rate"], wanted, rounds)
    rows = [
        {"kind": "step", **key, "variant": v, "rounds": rounds, "load": os.getloadavg()[0]}
        | row(taken[v], taken["plain"], taken.get(HAND.get(v, "")), bound(bench.net, v, key["rate"]))
        for v in taken
    ]
    click.echo(table(rows))
    return rows


def _still(bench: Bench, key: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    return [
        {"kind": "still", **key, "variant": name, "rounds": rounds}
        | {"ratios": [g / p for p, g in zip(*taken, strict=True)], "fastest": min(taken[1]) / min(taken[0])}
        for name, taken in bench.still(rounds).items()
    ]


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _known(log: Path, cell: dict[str, Any], **more: Any) -> bool:
    return any(all(r.get(k) == v for k, v in (cell | more).items()) for r in _read(log))


def _append(log: Path, rows: list[dict[str, Any]]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)


def _device(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    keep_memory("benchmarks.step")
    main()
