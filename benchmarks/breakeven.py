"""From which drop rate skipping takes less than a mask: reckoned and measured, by model, batch, rate, device.

    python -m benchmarks.breakeven --models resnet18,vit_tiny_patch16_224 --batches 2,8 --rates 0.1,0.5
    python -m benchmarks.breakeven --page-only

What `surgeon inspect --measure` does, cell by cell: rows are appended to ``docs/breakeven.jsonl`` as they
come, and what is there is not measured again. ``docs/breakeven.md`` is written from them.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import timm
import torch
from timm.models import get_pretrained_cfg

import surgeon
from benchmarks.step import _append, _device, _known, _read, keep_memory
from surgeon._measure import measure
from surgeon._text import count

ROWS, PAGE = Path("docs/breakeven.jsonl"), Path("docs/breakeven.md")
_HEAD = """# Mask or skip: where they break even

Written by `python -m benchmarks.breakeven`, from the rows in `breakeven.jsonl`.

A training step (forward and backward) with gates over that of the plain network, medians over {rounds} rounds
in which each way takes one step in an order drawn anew. `unit="sample"`, linear schedule to the final drop
rate r, random images. *Reckoned* is what `surgeon inspect --measure` predicts from other steps (plain,
masked, all branches dropped, half of the rows everywhere) and the arithmetic; *off* is that over the step as
it was. *From r* is the final drop rate from which skipping is reckoned to take less than a mask; *takes less*
says which of the two did at this r. On one thread of a CPU the clock counts processor time; the machine was
shared (load average {load}), as the quartiles of skipping show.

"""


@click.command()
@click.option("--models", default="resnet18,vit_tiny_patch16_224,tf_efficientnet_lite0", show_default=True)
@click.option("--batches", default="2,8", show_default=True)
@click.option("--rates", default="0.1,0.5", show_default=True)
@click.option("--size", default=112, show_default=True, help="Side of the images.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rows", "log", default=ROWS, type=click.Path(path_type=Path), show_default=True)
@click.option("--page-only", is_flag=True)
def main(
    *,
    models: str,
    batches: str,
    rates: str,
    size: int,
    rounds: int,
    device: str,
    threads: int,
    log: Path,
    page_only: bool,
) -> None:
    """Measures what is not yet among the rows, and writes the page."""
    torch.set_num_threads(threads)
    about = {"size": size, "threads": threads, "device": _device(device), "torch": torch.__version__}
    cells = itertools.product(models.split(","), map(int, batches.split(",")), map(float, rates.split(",")))
    for name, batch, rate in () if page_only else cells:
        cell = {"model": name, "batch": batch, "rate": rate, **about}
        if _known(log, cell):
            continue
        cfg = get_pretrained_cfg(name)
        sized = {"img_size": size} if cfg is not None and cfg.fixed_input_size else {}
        model = timm.create_model(name, **sized).to(device)
        example = torch.zeros(2, 3, size, size, device=device)
        settings = surgeon.plan(model, drop_rate=rate, example=example).settings
        found = measure(model, settings, batch=batch, rounds=rounds).to_dict()
        _append(log, [{**found, **cell, "rounds": rounds, "load": os.getloadavg()[0]}])
        click.echo(f"{cell}: {found}")
    if log == ROWS:
        PAGE.write_text(page(_read(log)))


def page(rows: list[dict[str, Any]]) -> str:
    """The page of these rows."""
    loads, rounds = [row["load"] for row in rows] or [0.0], [row["rounds"] for row in rows] or [0]
    head = _HEAD.format(rounds=min(rounds), load=f"{min(loads):.1f} to {max(loads):.1f}")
    return head + "\n".join(_lines(rows)) + "\n"


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = ("model", "side", "batch", "r", "device", "plain, ms", "mask", "skip", "quartiles")
    yield f"| {' | '.join((*names, 'reckoned', 'off', 'from r', 'takes less'))} |"
    yield "|" + "---|" * (len(names) + 4)
    for row in sorted(rows, key=lambda r: (r["device"], r["model"], r["size"], r["batch"], r["rate"])):
        even, (low, high) = row["break_even"], row["quartiles"]
        least = "never" if even is None else "any" if even <= 0 else f"{even:.2g}"
        cells = (
            *(row["model"], row["size"], row["batch"], row["rate"]),
            f"{row['device']}, {count(row['threads'], 'thread')}",
            *(f"{row['plain']:.4g}", f"{row['masked']:.3f}", f"{row['skipped']:.3f}"),
            f"{low:.3f} to {high:.3f}",
            *(f"{row['predicted']:.3f}", f"{row['predicted'] / row['skipped'] - 1:+.1%}", least),
            "skip" if row["skipped"] < row["masked"] else "mask",
        )
        yield f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    keep_memory("benchmarks.breakeven")
    main()
