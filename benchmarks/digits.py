"""The demonstration, `surgeon finetune digits`, over several seeds: with gates and without.

    python -m benchmarks.digits                  # five seeds; those that are there already are not run again
    python -m benchmarks.digits --page           # writes the page alone

A row per seed is kept in ``docs/digits.jsonl``, and the page is written from all of them after each. Both
trainings of a seed start from the same network and see the same images in the same order.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from surgeon import _recipes

ROWS, PAGE = Path("docs/digits.jsonl"), Path("docs/digits.md")
TEXT = """\
# The demonstration over several seeds

Written by `python -m benchmarks.digits`: `surgeon finetune digits`, each time with another seed; top-1 in
percent on the {samples} held-out images, of which one is {image:.2f} points. {gates} gates, the last dropped
half the time; both trainings of a seed start from the same network and see the same images in the same
order. PyTorch {torch}.

{table}
"""
LIGHT = ["deliver.onnx=false", "deliver.plot=false", "deliver.timing_steps=0"]


def run(seed: int) -> dict[str, Any]:
    """One seed: accuracies in percent on the 450 held-out images, and what the fold changed."""
    recipe = _recipes.load("finetune")
    with tempfile.TemporaryDirectory() as folder:
        report = recipe.main("digits", [f"seed={seed}", f"output={folder}/run", *LIGHT], quiet=True)
    kept = {name: report[name] for name in ("before", "after", "ungated", "samples", "gates")}
    return {"seed": seed, **kept, "disagree": report["stock"]["disagree"], "torch": torch.__version__}


def rows() -> list[dict[str, Any]]:
    """What has been run, by seed."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda row: int(row["seed"]))


def page(found: list[dict[str, Any]]) -> str:
    """The table, and what it is of."""
    table = ["| seed | new head | with gates | without | difference | answers that the fold changed |"]
    table += ["|---|---|---|---|---|---|"]
    gated, plain = ([row[name] for row in found] for name in ("after", "ungated"))
    gaps = [one - other for one, other in zip(gated, plain, strict=True)]
    for row, gap in zip(found, gaps, strict=True):
        numbers = f"{row['before']:.2f} | {row['after']:.2f} | {row['ungated']:.2f} | {gap:+.2f}"
        table.append(f"| {row['seed']} | {numbers} | {row['disagree']} |")
    if len(found) > 1:
        spread = " | ".join(f"{mean(values):.2f} ± {stdev(values):.2f}" for values in (gated, plain))
        table.append(f"| mean ± s | | {spread} | {mean(gaps):+.2f} ± {stdev(gaps):.2f} | |")
    first = found[0]
    return TEXT.format(
        samples=first["samples"],
        image=100 / first["samples"],
        gates=first["gates"],
        torch=first["torch"],
        table="\n".join(table),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    asked = parser.parse_args()
    done = {row["seed"] for row in rows()}
    for seed in range(0 if asked.page else asked.seeds):
        if seed in done:
            continue
        row = run(seed)
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        PAGE.write_text(page(rows()), encoding="utf-8")
    if asked.page:
        PAGE.write_text(page(rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
