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
    whole network as a line. Right, where several were deleted together, the least important, random ones from
    the worst draw to the best, and the last ones.

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
    full, values = _value(found.full), [_value(one.worth) for one in found]
    places = range(1, len(found) + 1)
    axes.vlines(places, values, full, color=_ONE, linewidth=2)
    axes.plot(places, values, "o", color=_ONE, markersize=5)
    axes.axhline(full, color=_INK, linewidth=1, linestyle="--")
    axes.annotate("whole network", (1, full), xytext=(2, 3), textcoords="offset points", fontsize=8)
    span = max(max(*values, full) - min(*values, full), 1e-3)
    axes.set_ylim(min(*values, full) - 0.1 * span, max(*values, full) + 0.15 * span)
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
    whiskers = [
        [mean - min(values) for mean, values in zip(means, draws, strict=True)],
        [max(values) - mean for mean, values in zip(means, draws, strict=True)],
    ]
    axes.errorbar(
        counts, means, whiskers, fmt="^--", color=_RANDOM, capsize=3, label="at random (worst to best)"
    )
    axes.set_xlabel(f"branches deleted, of {len(found)}", color=_INK)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
