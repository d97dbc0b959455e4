"""The page and the picture of `benchmarks.step`."""

import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks._step_compiled import RATE as COMPILED_RATE
from benchmarks._step_compiled import table as compiled_table
from benchmarks._step_measure import DRAWS
from benchmarks._step_models import COUNTED, NETS, VARIANTS
from benchmarks._step_small import table as small_table

Row = dict[str, Any]

_HEAD = (
    "| model | batch | r | variant | s per step | over plain | quartiles | fastest | FLOPs drawn | bound "
    "| time over FLOPs drawn | saved activations |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def table(rows: list[Row]) -> str:
    """The steps, one line per variant."""
    return "\n".join([_HEAD, *map(_line, sorted(rows, key=_place))])


def _place(row: Row) -> tuple[int, ...]:
    places = (list(NETS).index(row["model"]), -row["batch"], -round(1000 * row["rate"]))
    return (*places, VARIANTS.index(row["variant"]))


def _line(r: Row) -> str:
    counted = r["variant"] in COUNTED
    return (
        f"| {r['model']} | {r['batch']} | {r['rate']} | {r['variant']} "
        f"| {r['seconds']:.3f} | {r['ratio']:.3f} "
        f"| {r['low']:.3f} to {r['high']:.3f} | {r['fastest']:.3f} "
        f"| {_or(r['drawn'], counted)} | {_or(r['bound'], counted)} "
        f"| {_or(r['over_drawn'], counted)} | {r['megabytes']:.0f} MB, {r['memory']:.3f} |"
    )


def _or(value: float | None, shown: bool) -> str:
    return f"{value:.3f}" if shown and value is not None else ""


def page(rows: list[Row]) -> str:
    """The whole page."""
    steps = [r for r in rows if r["kind"] == "step"]
    still = [r for r in rows if r["kind"] == "still"]
    small = [r for r in rows if r["kind"] == "small"]
    compiled = [r for r in rows if r["kind"] == "compiled"]
    devices = sorted({f"{r['device']}, {r['threads']} thread(s), torch {r['torch']}" for r in rows})
    loads = [r["load"] for r in steps] or [0.0]
    return f"""# Time and memory of a training step

Written by `python -m benchmarks.step`, from the rows in `performance.jsonl`. {"; ".join(devices)}.

One step is forward, cross-entropy, backward and SGD with momentum, on random images. Every variant takes
one step per round, in an order drawn anew; *over plain* is the median over the rounds of its step over the
plain model's of the same round. On one thread the clock counts processor time, so that a wait is not
counted; but the machine is shared, its caches and its memory too, as the quartiles show (load average
{min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores). A neighbour only ever makes a step slower, so
*fastest* compares the fastest steps: the rounds share {DRAWS} draws, each of nearly the FLOPs that are
drawn in the mean, and of each draw the fastest step counts. Memory that is freed stays with the process (see
`KEEPS_MEMORY` in the program), for all variants alike: glibc otherwise gives large blocks back after every
operator and takes them anew page by page.

- `library` is the model's own drop path, `mask` is `skip=False`, `auto` the default, `sample` is
  `unit="sample", skip=True`, `batch` is `unit="batch"`. The schedule is linear to the final drop rate r.
  `empty` drops every branch: what it takes is outside of them.
- *Bound* is the share of the FLOPs that is left on average, `surgeon.status(model).expected_flops`; *FLOPs
  drawn* is the share that the gates really drew in the steps measured, and *time over FLOPs drawn* the ratio
  of the fastest steps over it: what is lost against arithmetic alone.
- *Over by hand* is the fastest time over that of the same network whose blocks were rewritten by hand to drop
  (`benchmarks/_step_by_hand.py`), under the same draws: what surgeon itself costs. The rest of what is lost
  against the arithmetic is lost by the operators.
- *Time bound*: arithmetic counts convolutions and matrix products alone. Norms and activations outside of the
  branches, and the shortcuts' copies, take time and no FLOPs. With the share of time that `empty` takes and
  the share of FLOPs that it draws, a step in which the branches' time shrinks as their FLOPs do takes
  *empty* + (1 - *empty*) (drawn - drawn by empty) / (1 - drawn by empty).
- *Saved activations* is what a forward keeps for its backward, in MB and over that of the plain model; on
  CUDA the peak of allocated memory.

![Time per step over the plain model's](performance.png)

Dots are the fastest steps, lines go from the lower to the upper quartile.

{_against_bound(steps)}{_summary(steps)}
{_small(small)}{_compiled(compiled)}## Nothing dropped

Time over that of the untouched model: evaluation, and a training step at drop rate 0. Median and quartiles of
runs in pairs, and the ratio of the fastest.

{_still(still)}

## All steps

{table(steps)}
"""


def _compiled(rows: list[Row]) -> str:
    if not rows:
        return ""
    anew = sum({r["model"]: r["anew"] for r in rows}.values())
    return f"""## Compiled

Steps under `torch.compile` over the compiled plain network of the same round, linear to r = {COMPILED_RATE},
median of {rows[0]["rounds"]} rounds (`benchmarks/_step_compiled.py`); load average {rows[0]["load"]:.1f}.
*Bound* is the share of the FLOPs that the graph runs, `p B` rows rounded up for each gate; with unit
`"batch"` that of the mean draw, where eager rows are rounded either way. *Memory* is what a forward saves
for its backward. Graphs compiled anew during all of these steps: {anew}.

{compiled_table(rows)}

"""


def _small(rows: list[Row]) -> str:
    if not rows:
        return """## Small kernels

Not measured on a quiet machine yet: `python -m benchmarks.step --small 150` puts it here, with the page.

"""
    return f"""## Small kernels

Fifty blocks of two 1x1 convolutions and norms on 2 x 2 x 2 numbers a row (`benchmarks/_step_small.py`):
everything but arithmetic, as on a GPU. A step is forward, cross-entropy and backward; over the mean of two
plain networks of the same round, of which the second over the first shows the noise. Median and quartiles of
{rows[0]["rounds"]} rounds, r = 0.5, load average {rows[0]["load"]:.1f}.

{small_table(rows)}

"""


def _against_bound(steps: list[Row]) -> str:
    """Fastest time over FLOPs for the largest batch of each model at the largest drop rate."""
    highest = max((r["rate"] for r in steps), default=0)
    lines = [
        f"## Against the arithmetic, r = {highest}",
        "",
        (
            "| model | batch | bound | empty: FLOPs | time "
            "| sample: time | over FLOPs drawn | over time bound | over by hand "
            "| batch: time | over FLOPs drawn | over time bound | over by hand |"
        ),
        "|" + "---|" * 13,
    ]
    for name in NETS:
        cells = [r for r in steps if (r["model"], r["rate"]) == (name, highest) and r["variant"] in COUNTED]
        largest = max((r["batch"] for r in cells), default=0)
        found = {r["variant"]: r for r in cells if r["batch"] == largest}
        if "sample" not in found or "batch" not in found:
            continue
        empty = found.get("empty")
        parts = [
            f"{r['fastest']:.3f} | {r['over_drawn']:.3f} | {_or(_over_time_bound(r, empty), True)} "
            f"| {_or(r.get('over_hand'), True)}"
            for r in (found["sample"], found["batch"])
        ]
        outside = f"{empty['drawn']:.3f} | {empty['fastest']:.3f}" if empty else " | "
        lines.append(
            f"| {name} | {largest} | {found['sample']['bound']:.3f} | {outside} | {' | '.join(parts)} |"
        )
    return "\n".join(lines) + "\n\n"


def _over_time_bound(r: Row, empty: Row | None) -> float | None:
    """Time over that of a step whose branches take time in proportion to their FLOPs."""
    if empty is None:
        return None
    branches = (r["drawn"] - empty["drawn"]) / (1 - empty["drawn"])
    return float(r["fastest"] / (empty["fastest"] + (1 - empty["fastest"]) * branches))


def _summary(steps: list[Row]) -> str:
    """What the default costs against the model's own drop path, or a mask, where both were measured."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for r in steps:
        cells.setdefault((r["model"], r["batch"], r["rate"], r["device"]), {})[r["variant"]] = r
    lines = []
    for other, what in (("library", "the model's own drop path"), ("mask", "a mask, in models without one")):
        found = [
            (c["auto"]["fastest"] / c[other]["fastest"], name, batch, rate)
            for (name, batch, rate, _), c in cells.items()
            if {"auto", other} <= c.keys() and (other == "library" or "library" not in c)
        ]
        if found:
            middle = statistics.median(ratio for ratio, *_ in found)
            (least, *_), (most, name, batch, rate) = min(found), max(found)
            lines.append(
                f"- Against {what}: {least:.2f} to {most:.2f} of its time in {len(found)} settings, in the "
                f"median {middle:.2f}; the most is {name} at batch {batch}, r = {rate}."
            )
    if not lines:
        return ""
    return "\n".join(
        [
            "## The default against the model's own drop path",
            "",
            "`auto`, by the fastest steps:",
            "",
            *lines,
            "",
            "",
        ]
    )


def _still(rows: list[Row]) -> str:
    lines = [
        "| model | batch | | over plain | quartiles | fastest | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, middle, high = statistics.quantiles(r["ratios"], n=4)
        what = f"| {r['model']} | {r['batch']} | {r['variant']} "
        lines.append(f"{what}| {middle:.3f} | {low:.3f} to {high:.3f} | {r['fastest']:.3f} | {r['rounds']} |")
    return "\n".join(lines)


_COLOURS = {
    "library": "#999999",
    "mask": "#c9a227",
    "auto": "#1b7f5c",
    "sample": "#3b6fb6",
    "batch": "#b6443b",
}


def plot(rows: list[Row], path: Path) -> None:
    """One panel per final drop rate: models across, time over the plain step upwards, the bound as a bar.

    A dot is the fastest step, a line goes from quartile to quartile.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    steps = [r for r in rows if r["kind"] == "step"]
    rates = sorted({r["rate"] for r in steps})
    if not rates:
        return
    figure, axes = plt.subplots(
        len(rates), 1, figsize=(9, 1.2 + 2.4 * len(rates)), sharex=True, squeeze=False
    )
    names = [n for n in NETS if any(r["model"] == n for r in steps)]
    for axis, rate in zip(axes[:, 0], rates, strict=True):
        here = [r for r in steps if r["rate"] == rate]
        for place, name in enumerate(names):
            largest = max((r["batch"] for r in here if r["model"] == name), default=0)
            _column(axis, place, [r for r in here if (r["model"], r["batch"]) == (name, largest)])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("step over plain")
        axis.set_title(f"final drop rate {rate}", loc="left", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xticks(range(len(names)), names, rotation=20, ha="right")
    marks = [Line2D([], [], color=c, marker="o", linestyle="", label=v) for v, c in _COLOURS.items()]
    marks.append(Line2D([], [], color="black", linewidth=2, label="bound"))
    figure.legend(handles=marks, ncols=6, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _column(axis: Any, place: int, rows: list[Row]) -> None:
    for r in rows:
        if r["variant"] not in _COLOURS:
            continue
        x = place + 0.14 * (list(_COLOURS).index(r["variant"]) - 2)
        axis.plot([x, x], [r["low"], r["high"]], color=_COLOURS[r["variant"]], alpha=0.4)
        axis.plot(x, r["fastest"], color=_COLOURS[r["variant"]], marker="o", markersize=4)
    bounds = [r["bound"] for r in rows if r["variant"] in COUNTED and r["variant"] in _COLOURS]
    if bounds:
        label = f"batch {rows[0]['batch']}"
        axis.annotate(label, (place, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
        axis.hlines(min(bounds), place - 0.35, place + 0.35, color="black", linewidth=2)
