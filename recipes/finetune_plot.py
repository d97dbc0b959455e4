"""The plot of `finetune.py`: the survival probability of every gate over the depth of the network."""

from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError

INK, BAR, PALE = "#222222", "#2f6690", "#d8dee6"


def plot_survival(status: Any, title: str, path: Path) -> Path:
    """Draws `p_l` against l as a PNG, one bar per gate, with the part that is dropped in grey.

    Raises:
        SurgeonError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SurgeonError(
            "the plot needs matplotlib: pip install 'surgeon[plots]', or deliver.plot=false"
        ) from error
    survival = [gate.survival for gate in status.gates]
    depth = range(1, len(survival) + 1)
    figure = Figure(figsize=(max(6.4, 0.3 * len(survival)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global is touched, and no display is looked for
    axes = figure.add_subplot()
    axes.bar(depth, [1.0] * len(survival), width=0.72, color=PALE, label="dropped")
    axes.bar(depth, survival, width=0.72, color=BAR, label="kept")
    for place, value in zip(depth, survival, strict=True):
        if len(survival) <= 24:
            axes.text(place, value - 0.02, f"{value:.2f}", ha="center", va="top", color="white", fontsize=7)
    axes.set_xticks(
        list(depth), [gate.block or gate.name for gate in status.gates], rotation=60, ha="right", fontsize=8
    )
    axes.set_xlim(0.4, len(survival) + 0.6)
    axes.set_ylim(0, 1)
    axes.set_ylabel("survival probability $p_l$", color=INK)
    axes.set_xlabel("residual add $l$, in execution order", color=INK)
    axes.set_title(
        f"{title}\nexpected depth {status.expected_depth:.2f} of {len(survival)}",
        fontsize=10,
        color=INK,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)
    draft = path.with_name(f"draft-{path.name}")
    figure.savefig(draft, dpi=150)
    draft.replace(path)
    return path
