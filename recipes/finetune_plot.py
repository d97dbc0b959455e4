"""The plots of `finetune.py`: how the training went, and the survival probability of every gate."""

import math
from pathlib import Path
from typing import Any

from finetune_files import write_file

from surgeon.errors import SurgeonError

INK, KEPT, DROPPED, OTHER = "#222222", "#2f6690", "#d8dee6", "#c8553d"


def plot_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Draws loss, accuracy and depth over the epochs, a line for each network."""
    figure, (left, middle, right) = _figure(10.5, 3.4, 3)
    for (name, lines), colour in zip(curves.items(), (KEPT, OTHER), strict=False):
        epochs = [line["epoch"] for line in lines]
        left.plot(epochs, [line["train_loss"] for line in lines], colour, ls=":", label=f"{name}, training")
        left.plot(epochs, [line["loss"] for line in lines], colour, label=f"{name}, held out")
        middle.plot(epochs, [line["top1"] for line in lines], colour, label=name)
        right.plot(
            epochs, [math.nan if line.get("depth") is None else line["depth"] for line in lines], colour
        )
    for axes, title in (
        (left, "loss"),
        (middle, "top-1 of the held-out images, %"),
        (right, "branches that ran"),
    ):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("epoch", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    middle.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def plot_survival(status: Any, title: str, path: Path) -> Path:
    """Draws `p_l` as a PNG: one bar per gate, what is kept in blue, what is dropped in grey."""
    count = len(status.gates)
    figure, (axes,) = _figure(min(24.0, max(6.4, 0.26 * count)), 4.0, 1)
    _bars(axes, [gate.survival for gate in status.gates])
    _names(axes, status.gates)
    axes.set_ylabel("survival probability $p_l$", color=INK)
    axes.set_xlabel("residual add, in execution order", color=INK)
    text = f"{title}\nexpected depth {status.expected_depth:.2f} of {count}"
    axes.set_title(text, loc="left", fontsize=10, color=INK)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def _figure(width: float, height: float, columns: int) -> tuple[Any, tuple[Any, ...]]:
    """A figure and its axes.

    Raises:
        SurgeonError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SurgeonError(
            "the plot needs matplotlib: pip install 'depth-surgeon[recipes]', or deliver.plot=false"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global is touched, and no display is looked for
    return figure, tuple(figure.subplots(1, columns, squeeze=False)[0])


def _saved(figure: Any, path: Path) -> Path:
    return write_file(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def _bars(axes: Any, survival: list[float]) -> None:
    places = range(1, len(survival) + 1)
    axes.bar(places, survival, width=0.72, color=KEPT, label="kept")
    rest = [1 - value for value in survival]
    axes.bar(places, rest, bottom=survival, width=0.72, color=DROPPED, label="dropped")
    axes.set_xlim(0.4, len(survival) + 0.6)
    axes.set_ylim(0, 1)
    if len(survival) <= 16:  # numbers fit into the bars
        for place, value in zip(places, survival, strict=True):
            axes.text(place, value - 0.02, f"{value:.2f}", ha="center", va="top", color="white", fontsize=7)


def _names(axes: Any, gates: Any) -> None:
    """Each gate by its block, or by its own name where a block has several; thinned out if they are many."""
    blocks = [gate.block for gate in gates]
    names = [gate.block if blocks.count(gate.block) == 1 and gate.block else gate.name for gate in gates]
    step = math.ceil(len(names) / 80)
    axes.set_xticks(range(1, len(names) + 1, step), names[::step], rotation=60, ha="right", fontsize=8)
    for label in axes.get_xticklabels():
        label.set_rotation_mode("anchor")
