"""The table of `benchmarks.evidence`: one line of JSON a run, appended when it is done."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._evidence_plan import Run
from benchmarks._evidence_sources import SHA256
from surgeon.errors import UsageError

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        UsageError: A line is no whole row, or two rows are of different versions of PyTorch or of one run.
    """
    rows: list[Row] = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key(row), row["torch"], row["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number} of {len(lines)} is no whole row ({error}), as where a run was "
                "stopped while it wrote; take the line out, and its run is done again"
            ) from error
        if rows and row["torch"] != rows[0]["torch"]:
            raise UsageError(
                f"{path}: line {number} was made with torch {row['torch']}, line 1 with {rows[0]['torch']}; "
                "their differences would not be the gates'; give one of them a file of its own (--rows)"
            )
        if key(row) in map(key, rows):
            raise UsageError(f"{path}, line {number} is a second row of {' '.join(map(str, key(row)))}")
        rows.append(row)
    return rows


def key(row: Row) -> tuple[str, str, str, int]:
    """As `Run.key`."""
    return row["kind"], row["part"], row["arm"], row["seed"]


def missing(plan: Sequence[Run], rows: Sequence[Row], path: Path) -> list[Run]:
    """The runs that have no row yet.

    Raises:
        UsageError: A row is there that was made otherwise: with other settings, or another PyTorch.
    """
    if rows and rows[0]["torch"] != torch.__version__:
        raise UsageError(
            f"{path} was made with torch {rows[0]['torch']} and this is {torch.__version__}; their "
            "differences would not be the gates': continue with that version or with another file (--rows)"
        )
    there = {key(row): row for row in rows}
    for run in plan:
        row = there.get(run.key)
        if row is not None and row["settings"] != run.setting.hash:
            raise UsageError(
                f"{path} has a row of {run} with other settings ({row['settings']}, now {run.setting.hash}); "
                "take it out, or write to another file (--rows)"
            )
    return [run for run in plan if run.key not in there]


def head(run: Run) -> Row:
    """What every row begins with."""
    kind, part, arm, seed = run.key
    used = ["weights"] * (run.setting.net == "lite0") + [
        name
        for name in SHA256
        if name.startswith("emoji" if run.setting.data == "emoji" else ("train-", "t10k-"))
    ]
    return {
        "kind": kind,
        "part": part,
        "arm": arm,
        "seed": seed,
        "settings": run.setting.hash,
        "sources": {name: SHA256[name][:12] for name in used},
        "torch": torch.__version__,
    }


def append(path: Path, row: Row) -> None:
    """Adds a row as one write, so that a run which is stopped leaves at most this line half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")
