"""What lesions look like: the harm of each branch, and accuracy against the number of deleted ones."""

import statistics
from pathlib import Path
from typing import Any

from surgeon._files import beside, settle
from surgeon._needs import need
from surgeon._pruning.lesion import Lesions
from surgeon._pruning.score import Worth

_INK, _ONE, _CHOSEN, _RANDOM, _TAIL = "#222222", "#2f6690", "#2f6690", "#b45309", "#8a8f98"


def draw(found: Lesions, path: Path, title: str) -> Path:
    """Draws lesions into a file of matplotlib's formats and returns its path.

    Left, the accuracy (or agreement, or the score) without each branch alone, in execution order, with the
    whole network as a line. Right, where several were deleted together, the least important, random ones with
    their spread, and the last ones.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    need("a plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if found.curve else 1
    figure = Figure(
        figsize=(min(16.0, 4.5 + 0.12 * len(found)) + 4.5 * (panels - 1), 4.0), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    label = "accuracy" if found.labelled else "agreement with the whole network"
    if found.full.accuracy is None:
        label = "score"
    _alone(axes[0], found)
    axes[0].set_title(title, loc="left", fontsize=10, color=_INK)
    if found.curve:
        _together(axes[1], found)
    for one in axes:
        one.set_ylabel(label, color=_INK)
        one.spines[["top", "right"]].set_visible(False)
        one.xaxis.get_major_locator().set_params(integer=True)
    with beside(path) as folder:
        made = folder / path.name
        figure.savefig(made, dpi=150)
        settle(made, path)
    return path


def _value(worth: Worth) -> float:
    return -worth.loss if worth.accuracy is None else worth.accuracy


def _alone(axes: Any, found: Lesions) -> None:
    axes.bar(range(len(found)), [_value(one.worth) for one in found], color=_ONE, width=0.8)
    axes.axhline(_value(found.full), color=_INK, linewidth=1, linestyle="--")
    axes.annotate(
        "whole network", (0, _value(found.full)), xytext=(2, 3), textcoords="offset points", fontsize=8
    )
    low = min(_value(one.worth) for one in found)
    span = max(_value(found.full) - low, 1e-3)
    axes.set_ylim(bottom=max(0.0, low - span) if found.full.accuracy is not None else low - span)
    axes.set_xlabel("branch left out, in execution order", color=_INK)


def _together(axes: Any, found: Lesions) -> None:
    counts = [row.deleted for row in found.curve]
    rows = (
        ("least important", [row.worth for row in found.curve], _CHOSEN, "o-"),
        ("the last ones", [row.tail for row in found.curve], _TAIL, "s:"),
    )
    for name, worths, colour, style in rows:
        axes.plot([0, *counts], [_value(w) for w in (found.full, *worths)], style, color=colour, label=name)
    draws = [[_value(w) for w in row.at_random] for row in found.curve]
    means = [statistics.mean(values) for values in draws]
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in draws]
    axes.errorbar(
        counts, means, spread, fmt="^--", color=_RANDOM, capsize=3, label="at random (mean, deviation)"
    )
    axes.set_xlabel(f"branches deleted, of {len(found)}", color=_INK)
    axes.legend(frameon=False, fontsize=8)
