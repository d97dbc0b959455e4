"""The pictures of docs/evidence.md, light and narrow enough for a phone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks._evidence_stats import Paired

Row = dict[str, Any]
_COLOURS = ("#555555", "#0b6fa4", "#c4501b", "#3c8031", "#7d4f9e")
_STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 12,
    "axes.titlesize": 12,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "evidence",
}


def forest(parts: Mapping[str, Mapping[str, Paired]], path: Path) -> None:
    """Differences to arm none in points: every pair a dot, the mean a bar, its interval a line."""
    lines = [line for part, arms in parts.items() for line in ((part, None), *arms.items())]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 0.9 + 0.27 * len(lines)), layout="constrained")
        for y, (_, one) in enumerate(lines):
            if one is not None:
                dots = [100 * d for d in one.differences]
                axes.plot([100 * one.low, 100 * one.high], [y, y], color=_COLOURS[1], linewidth=2)
                axes.plot(100 * one.mean, y, "|", color=_COLOURS[1], markersize=13, markeredgewidth=3)
                axes.plot(dots, [y] * len(dots), "o", color="#777777", markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=10)
        for label, (_, one) in zip(axes.get_yticklabels(), lines, strict=True):
            label.set_fontweight("bold" if one is None else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlabel("accuracy minus none's, points")
        _save(figure, path)


def curves(arms: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Training loss and test error by epoch, the mean over seeds (Huang et al. 2016, figures 3 to 5)."""
    with plt.rc_context(_STYLE):
        figure, both = plt.subplots(2, 1, figsize=(5.5, 6.4), sharex=True, layout="constrained")
        for (arm, rows), colour in zip(arms.items(), _COLOURS, strict=False):
            loss, error = (np.mean([row[what] for row in rows], 0) for what in ("loss", "error"))
            both[0].plot(range(1, 1 + len(loss)), loss, color=colour, label=arm)
            both[1].plot(range(1, 1 + len(error)), 100 * error, color=colour)
        both[0].set(ylabel="training loss", ylim=(0, None))
        both[1].set(xlabel="epoch", ylabel="test error, %")
        both[0].legend()
        _save(figure, path)


def gradients(arms: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Mean gradient magnitude by block, in the first epoch and in the last (figure 7)."""
    with plt.rc_context(_STYLE):
        figure, both = plt.subplots(2, 1, figsize=(5.5, 6.4), sharex=True, layout="constrained")
        for (arm, rows), colour in zip(arms.items(), _COLOURS, strict=False):
            for axes, which in zip(both, (0, -1), strict=True):
                mean = np.mean([row["gradients"][which] for row in rows], 0)
                axes.semilogy(range(1, 1 + len(mean)), mean, color=colour, label=arm)
        both[0].set(ylabel="mean |gradient|", title="first epoch")
        both[1].set(ylabel="mean |gradient|", title="last epoch", xlabel="block")
        both[0].legend(fontsize=10)
        _save(figure, path)


def depth_map(rows: Sequence[Row], path: Path) -> None:
    """Test error over depth and final drop rate (figure 8), the mean over seeds in each field."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        net, rate = row["arm"].split(", ")
        cells.setdefault((net, rate), []).append(100 * (1 - row["test"]["accuracy"]))
    nets, rates = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = np.array([[np.mean(cells.get((net, rate), [np.nan])) for rate in rates] for net in nets])
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 1.1 + 0.7 * len(nets)), layout="constrained")
        axes.imshow(values, cmap="Blues", aspect="auto", alpha=0.75)
        for i, j in np.argwhere(~np.isnan(values)):
            axes.text(j, i, f"{values[i, j]:.1f}", ha="center", va="center")
        axes.set_xticks(range(len(rates)), rates)
        axes.set_yticks(range(len(nets)), [net.replace("resnet", "ResNet-") for net in nets])
        axes.set_xlabel("final drop rate")
        axes.set_title("test error, %")
        _save(figure, path)


def shorter(arms: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Accuracy by the share of branches that is left: at once, at random, after an epoch, distilled."""
    ways = {"at once": "-o", "at random": ":", "after an epoch": "--", "distilled": "-."}
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 5.6), layout="constrained")
        for (arm, rows), colour in zip(arms.items(), _COLOURS, strict=False):
            branches = len(rows[0]["alone"])
            left = [100, *(100 * (1 - one["deleted"] / branches) for one in rows[0]["depths"])]
            for way, style in ways.items():
                means = [np.mean([row["full"] for row in rows])]
                means += [np.mean([row["depths"][i][way] for row in rows]) for i in range(len(left) - 1)]
                axes.plot(
                    left, 100 * np.array(means), style, color=colour, label=f"{arm}, {way}", markersize=4
                )
        axes.invert_xaxis()
        axes.set(xlabel="branches left, %", ylabel="test accuracy, %")
        figure.legend(fontsize=10, loc="outside lower center", ncols=2)
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
