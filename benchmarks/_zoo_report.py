"""Writes the coverage table from the rows of a sweep."""

import csv
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from surgeon._residual import REASONS

_COLUMNS = (
    *("library", "model", "parameters", "gates", "identity", "projection", "refused", "own", "own_live"),
    *("own_never_called", "recalled", "missed", "beyond", "restored", "find_s", "apply_s"),
    *("size", "eval_equal", "live", "carried", "train_ok", "trains_plain"),
    *("fold_dtype", "fold_error", "round_trip", "left", "onnx", "onnx_rel", "onnx_left", "onnx_cause"),
    *("peak_mb", "unexplained", "note", "skipped", "error"),
)

Row = dict[str, Any]


def read(rows: Path) -> list[Row]:
    """The rows of a sweep so far; the last one of a model and stage counts."""
    if not rows.exists():
        return []
    parsed = (json.loads(line) for line in rows.read_text().splitlines())
    return list({(row["library"], row["model"], row["stage"]): row for row in parsed}.values())


def merged(rows: list[Row]) -> list[Row]:
    """One row a model from those of its stages; what the stages share is collected."""
    models: dict[tuple[str, str], Row] = {}
    for row in rows:
        whole = models.setdefault((row["library"], row["model"]), {})
        stage, peak = row["stage"], max(row.get("peak_mb", 0), whole.get("peak_mb", 0))
        said = {
            key: "; ".join(filter(None, (whole.get(key), row.get(key) and f"{stage}: {row[key]}")))
            for key in ("error", "skipped")
        }
        whole |= row | said | {"peak_mb": peak}
    return sorted(models.values(), key=lambda row: (row["library"], row["model"]))


def write(rows: list[Row], output: Path) -> None:
    """Writes ``output`` (CSV, a line per model) and the page beside it (Markdown, figures and lists)."""
    models = merged(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in row.items()} for row in models)
    output.with_suffix(".md").write_text(_page(models, output.name))


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{key}:{count}" for key, count in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _page(rows: list[Row], table: str) -> str:
    lines = [
        "# Coverage",
        "",
        (
            f"Written by `python -m benchmarks.zoo` with torch {torch.__version__.partition('+')[0]}, "
            f"timm {timm.__version__} and torchvision {torchvision.__version__.partition('+')[0]}, "
            f"never by hand. One line per model is in [{table}]({table})."
        ),
        "",
        "| library | models | gated | no residual add | failed | gates | own live gates recalled | missed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for library in ("timm", "torchvision"):
        mine = [row for row in rows if row["library"] == library]
        if mine:
            lines.append(_library(library, mine))
    lines += ["", "## Speed", "", *_speed(rows), "", "## Numbers checked", "", *_numbers(rows)]
    lines += ["", "## Additions left alone", "", "| additions | code | reason |", "|---|---|---|"]
    reasons = Counter[str]()
    for row in rows:
        reasons.update(row.get("refused", {}))
    lines += [f"| {count} | `{code}` | {REASONS.get(code, code)} |" for code, count in reasons.most_common()]
    lines += ["", "## Own gates that surgeon does not stand in for", "", *_missed(rows)]
    lines += ["", "## Failures", "", *_failures(rows), ""]
    return "\n".join(lines)


def _library(library: str, rows: list[Row]) -> str:
    gated = sum(bool(row.get("gates")) for row in rows)
    failed = sum(bool(row.get("error")) for row in rows)
    live, hit = (sum(row.get(key) or 0 for row in rows) for key in ("own_live", "recalled"))
    gates, missed = (
        sum(row.get("gates") or 0 for row in rows),
        sum(len(row.get("missed") or ()) for row in rows),
    )
    none = sum(not row.get("error") and not row.get("gates") for row in rows)
    return f"| {library} | {len(rows)} | {gated} | {none} | {failed} | {gates} | {hit} of {live} | {missed} |"


def _speed(rows: list[Row]) -> list[str]:
    lines = []
    for key, what in (("find_s", "find"), ("apply_s", "apply")):
        seconds = sorted(row[key] for row in rows if row.get(key) is not None)
        if seconds:
            p95 = seconds[int(0.95 * (len(seconds) - 1))]
            lines.append(
                f"- `{what}`: median {statistics.median(seconds):.2f} s, 95 % under {p95:.2f} s, "
                f"longest {seconds[-1]:.1f} s (one thread, {len(seconds)} models)"
            )
    return lines


def _numbers(rows: list[Row]) -> list[str]:
    deep = [row for row in rows if "eval_equal" in row]
    if not deep:
        return ["No numerical sweep in these rows; run with `--deep`."]
    return [
        f"- models run on real tensors: {len(deep)}",
        f"- evaluation bit for bit as before `apply`: {sum(row['eval_equal'] for row in deep)}",
        (
            "- training step finite, every parameter that has a gradient ungated has one gated: "
            f"{sum(bool(row.get('train_ok')) for row in deep)}"
        ),
        (
            f"- gates whose drop changes the output: {sum(row['live'] for row in deep)} of "
            f"{sum(row['gates'] for row in deep)}"
        ),
    ]


def _missed(rows: list[Row]) -> list[str]:
    lines = [
        f"- {row['library']}:{row['model']}: {', '.join(row['missed'])}" for row in rows if row.get("missed")
    ]
    return lines or ["None."]


def _failures(rows: list[Row]) -> list[str]:
    lines = [f"- {row['library']}:{row['model']}: {row['error']}" for row in rows if row.get("error")]
    lines += [
        f"- {row['library']}:{row['model']}: {text}" for row in rows for text in row.get("unexplained") or ()
    ]
    return lines or ["None."]
