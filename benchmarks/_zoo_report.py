"""Writes the coverage table from the rows of a sweep."""

import csv
import json
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from benchmarks._zoo_checks import TRAINED
from surgeon._finding.findings import REASONS

_COLUMNS = (
    *("library", "model", "parameters", "gates", "identity", "projection", "refused", "own", "own_live"),
    *("own_never_called", "recalled", "missed", "beyond", "find_s"),
    *("size", "apply_s", "eval_equal", "live", "carried", "train_ok", "trains_plain", "restored"),
    *(
        "fold_dtype",
        "fold_error",
        "round_trip",
        "left",
        "silent",
        "onnx",
        "onnx_rel",
        "onnx_left",
        "onnx_cause",
    ),
    *("peak_mb", "unexplained", "note", "skipped", "error"),
)

Row = dict[str, Any]
_MOVED = 1e-9


def read(rows: Path) -> list[Row]:
    """The rows of a sweep so far; the last one of a model and stage counts."""
    if not rows.exists():
        return []
    parsed = (json.loads(line) for line in rows.read_text().splitlines())
    return list({(row["library"], row["model"], row["stage"]): row for row in parsed}.values())


def forget(rows: Path, models: Collection[tuple[str, str]], stages: Collection[str]) -> None:
    """Drops the rows of some stages of some models."""
    kept = [r for r in read(rows) if r["stage"] not in stages or (r["library"], r["model"]) not in models]
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept))


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
        size = {"size": whole["size"]} if "size" in whole else {}  # that of the numbers, not of the export
        whole |= row | said | size | {"peak_mb": peak}
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
    ]
    for title, body in (
        ("Residual adds", _libraries(rows)),
        ("Models without a residual add", _none(rows)),
        ("Additions left alone", _refused(rows)),
        ("Own gates that surgeon does not stand in for", _missed(rows)),
        ("Numbers", _numbers(rows)),
        ("Fold", _folds(rows)),
        ("ONNX", _onnx(rows)),
        ("Speed", _speed(rows)),
        ("Not checked", _listed(rows, "skipped")),
        ("Additions that could not be looked at", _unexplained(rows)),
        ("Failures", _listed(rows, "error")),
    ):
        lines += ["", f"## {title}", "", *(body or ["None."])]
    return "\n".join([*lines, ""])


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *rows)]


def _libraries(rows: list[Row]) -> list[str]:
    head = ("library", "models", "gated", "no residual add", "failed", "gates", "own live gates recalled")
    body = []
    for library in sorted({row["library"] for row in rows}):
        mine = [row for row in rows if row["library"] == library]
        failed = sum("gates" not in row for row in mine)
        gated = sum(bool(row.get("gates")) for row in mine)
        gates, live, hit = (_sum(mine, key) for key in ("gates", "own_live", "recalled"))
        body.append(
            (library, len(mine), gated, len(mine) - gated - failed, failed, gates, f"{hit} of {live}")
        )
    return _table(head, body)


def _none(rows: list[Row]) -> list[str]:
    names = [f"{row['library']}:{row['model']}" for row in rows if row.get("gates") == 0]
    return [", ".join(names)] if names else []


def _refused(rows: list[Row]) -> list[str]:
    reasons = Counter[str]()
    for row in rows:
        reasons.update(row.get("refused", {}))
    listed = ((count, f"`{code}`", REASONS.get(code, code)) for code, count in reasons.most_common())
    return _table(("additions", "code", "reason"), listed)


def _missed(rows: list[Row]) -> list[str]:
    causes: dict[str, list[str]] = {}
    for row in rows:
        for cause, count in Counter((row.get("missed") or {}).values()).items():
            causes.setdefault(cause, []).append(f"{row['model']} {count}")
    counts = ((cause, _total(models), ", ".join(models)) for cause, models in causes.items())
    return _table(("why", "sites", "models"), counts) if causes else []


def _total(models: list[str]) -> int:
    return sum(int(model.rpartition(" ")[2]) for model in models)


def _numbers(rows: list[Row]) -> list[str]:
    deep = [row for row in rows if "eval_equal" in row]
    if not deep:
        return []
    gates = _sum(deep, "gated")
    tried = [row for row in deep if "trains_plain" in row]
    trainable = [row for row in tried if row["trains_plain"]]
    return [
        (
            f"{len(deep)} models on real tensors, with random weights and statistics, on the smallest of "
            "a few image sizes that they run on:"
        ),
        "",
        f"- evaluation bit for bit as before `apply`: {_sum(deep, 'eval_equal')} of {len(deep)}",
        (
            "- training step: finite loss while branches drop, and a gradient for every parameter that has "
            f"one without gates: {_sum(trainable, 'train_ok')} of {len(trainable)} (the other "
            f"{len(tried) - len(trainable)} that were tried need targets or more than a batch of two; "
            f"{len(deep) - len(tried)} have more than {TRAINED / 1e6:.0f} million parameters)"
        ),
        (
            "- gates on which the output depends (derivative by the gate's factor): "
            f"{_sum(deep, 'live')} of {gates}"
        ),
        (
            "- gates with the branch dropped where the block's input still reaches the output (derivative "
            f"by the input): {_sum(deep, 'carried')} of {gates}"
        ),
        f"- every class and attribute as before after `remove`: {_sum(deep, 'restored')} of {len(deep)}",
        *_differing(deep),
        *(f"- {row['library']}:{row['model']}: {', '.join(row['dead'])}" for row in deep if row["dead"]),
        *(f"- {row['library']}:{row['model']}: {', '.join(row['lost'])}" for row in deep if row["lost"]),
    ]


def _differing(rows: list[Row]) -> list[str]:
    """Models with other gates on the small images than at their declared size."""
    return [
        f"- {row['library']}:{row['model']}: {row['gated']} gates here, {row['gates']} at its declared size"
        for row in rows
        if row["gated"] != row["gates"]
    ]


def _leftover(rows: list[Row]) -> list[str]:
    """Gates that fold: shown by a fold, or by its plan alone."""
    lines = []
    for shown, column in (("by folding", "fold_error"), ("by the plan of a fold alone", "planned")):
        mine = [row for row in rows if column in row and (column == "fold_error" or "fold_error" not in row)]
        gates, left = _sum(mine, "gates"), sum(len(row["left"]) for row in mine)
        if mine:
            lines.append(
                f"- gates that fold into weights, {shown}: {gates - left} of {gates} in {len(mine)} models"
            )
    return lines


def _folds(rows: list[Row]) -> list[str]:
    folded = [row for row in rows if "fold_error" in row]
    if not any("left" in row for row in rows):
        return []
    lines = []
    for dtype in sorted({row["fold_dtype"] for row in folded}, reverse=True):
        mine = [row for row in folded if row["fold_dtype"] == dtype and not _sensitive(row)]
        lines.append(
            f"- {dtype}: {len(mine)} models; largest relative difference of the outputs: folded and gated "
            f"{_worst(mine, 'fold_error')}; gated with `keep_eval` and plain {_worst(mine, 'kept_error')}; "
            f"folded again and plain {_worst(mine, 'round_trip')}; of the weights "
            f"{_worst(mine, 'weights_error')}"
        )
    lines += [*_leftover(rows), ""]
    still = [row["model"] for row in folded if row["fold_moved"] < _MOVED]
    lines += [
        f"Models whose gates change evaluation by less than {_MOVED}: {', '.join(still) or 'none'}.",
        "",
    ]
    shown = [row for row in folded if "silent" in row]
    silent = [
        f"{row['model']}: {' '.join(row['silent'])}" for row in shown if row["silent"] and "jumps" not in row
    ]
    what = f"Folded gates whose scale the folded weights do not show ({len(shown)} models asked)"
    lines += [f"{what}: {', '.join(silent) or 'none'}.", ""]
    jumping = [
        f"- {row['library']}:{row['model']}: outputs differ by {row['fold_error']:.1e} after the fold and by "
        f"{row['jumps']:.1e} when the plain model's weights move by one rounding; weights differ by "
        f"{row['weights_error']:.1e}"
        for row in folded
        if _sensitive(row)
    ]
    what = "Models whose own outputs move as far when a weight is rounded, left out above:"
    lines += jumping and [what, "", *jumping, ""]
    causes = Counter[tuple[str, str, str]]()
    for row in (row for row in rows if "left" in row):
        shorter = {re.sub(r"'[^']*'|\d+", "…", text) for text in row["left"].values()}
        for text in shorter:
            count = sum(re.sub(r"'[^']*'|\d+", "…", t) == text for t in row["left"].values())
            causes[row["library"], row["model"], text] += count
    listed = ((count, f"{lib}:{model}", text) for (lib, model, text), count in causes.most_common())
    return lines + (_table(("gates left", "model", "why"), listed) if causes else [])


def _sensitive(row: Row) -> bool:
    """Whether rounding the plain model's weights moves its outputs about as far as folding the gates does."""
    return max(row["fold_error"], row.get("round_trip") or 0.0) < 10 * row.get("jumps", 0.0)


def _worst(rows: list[Row], key: str) -> str:
    known = [row for row in rows if row.get(key) is not None]
    if not known:
        return "unknown"
    worst = max(known, key=lambda row: row[key])
    return f"{worst[key]:.1e} ({worst['model']})"


def _onnx(rows: list[Row]) -> list[str]:
    tried = [row for row in rows if row.get("onnx")]
    if not tried:
        return []
    outcomes = Counter(row["onnx"] for row in tried)
    fine = [row for row in tried if row.get("onnx_rel") is not None]
    lines = [f"- {outcome}: {count}" for outcome, count in outcomes.most_common()]
    lines += [f"- largest relative difference to PyTorch: {_worst(fine, 'onnx_rel')}", ""]
    causes = [row for row in tried if row.get("onnx_cause")]
    listed = ((f"{row['library']}:{row['model']}", row["onnx"], row["onnx_cause"]) for row in causes)
    return lines + (_table(("model", "outcome", "cause"), listed) if causes else [])


def _speed(rows: list[Row]) -> list[str]:
    lines = []
    for key, what in (("find_s", "find"), ("apply_s", "apply")):
        seconds = sorted(row[key] for row in rows if row.get(key) is not None)
        if seconds:
            p95 = seconds[int(0.95 * (len(seconds) - 1))]
            lines.append(
                f"- `{what}`: median {statistics.median(seconds):.2f} s, 95 % under {p95:.2f} s, "
                f"longest {seconds[-1]:.1f} s (CPU seconds of one thread, {len(seconds)} models)"
            )
    return lines


def _listed(rows: list[Row], key: str) -> list[str]:
    return [f"- {row['library']}:{row['model']}: {row[key]}" for row in rows if row.get(key)]


def _unexplained(rows: list[Row]) -> list[str]:
    found = Counter(
        (row["library"], row["model"], text.partition(": ")[2])
        for row in rows
        for text in row.get("unexplained") or ()
    )
    listed = ((count, f"{library}:{model}", text) for (library, model, text), count in found.items())
    return _table(("additions", "model", "why"), listed) if found else []


def _sum(rows: list[Row], key: str) -> int:
    return sum(int(row.get(key) or 0) for row in rows)
