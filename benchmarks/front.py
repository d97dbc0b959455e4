"""The picture of README and the site's first page, and README's numbers, of rows that others have measured.

    python -m benchmarks.front

Left: the time of a training step over the plain network's (`docs/performance.jsonl`, of
`benchmarks/step.py`), at a final drop rate of 0.5, with the share of the arithmetic that is left as a line.
Right: accuracy with gates minus accuracy without, by pairs of one seed (`docs/evidence.jsonl`, of
`benchmarks/evidence.py`), for every arm of which two pairs or more have run.
"""

import csv
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks._evidence_found import Found
from benchmarks._evidence_stats import Paired

DOCS = Path(__file__).resolve().parents[1] / "docs"
NETWORKS = {
    "resnet50": "ResNet-50",
    "vit_small": "ViT-S",
    "convnext_tiny": "ConvNeXt-T",
    "resnet110": "ResNet-110",
}
BLOCK = "<!-- numbers: written by `python -m benchmarks.front` -->\n"
END = "<!-- /numbers -->"
RATE = 0.5


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file; none if it is not there."""
    path = DOCS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# The parts that the plan has first; the others are in docs/evidence.md.
SHOWN = {
    "fashion": "lite0, ImageNet weights: 300 images of Fashion-MNIST",
    "emoji": "lite0, ImageNet weights: 400 emoji by category",
    "deep": "ResNet-56, random weights: 600 images, 14 px",
    "again": "ResNet-56, trained on other classes: 200 images, 14 px",
}


def times(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each network the row of one coin per batch, at its largest batch."""
    best: dict[str, dict[str, Any]] = {}
    for row in found:
        wanted = row.get("kind") == "step" and row["rate"] == RATE and row["variant"] == "batch"
        if wanted and row["model"] in NETWORKS and row["batch"] >= best.get(row["model"], row)["batch"]:
            best[row["model"]] = row
    return {model: best[model] for model in NETWORKS if model in best}


def differences(found: list[dict[str, Any]]) -> dict[str, dict[str, Paired]]:
    """What was trained, and for each way of gating it the differences of accuracy, pair by pair."""
    parts: dict[str, dict[str, Paired]] = {}
    for part, arm, name, one in Found(found).compared():
        if part in SHOWN and name == "test":
            parts.setdefault(SHOWN[part], {})[arm] = one
    return parts


def between(values: Iterable[float]) -> str:
    """The least and the greatest of them."""
    return f"{min(known := list(values)):.2f} to {max(known):.2f}"


def numbers() -> str:
    """The two numbers of README's first screen, in words."""
    steps = times(rows("performance.jsonl")).values()
    taken, left = between(row["ratio"] for row in steps), between(row["bound"] for row in steps)
    with (DOCS / "coverage.csv").open(newline="") as file:
        models = list(csv.DictReader(file))
    gated = sum(int(row["gates"] or 0) > 0 for row in models)
    told = (
        f"**Dropped branches are not computed.** With drop rates that rise to {RATE} a"
        f" training step takes {taken} of the plain network's time, where {left} of the arithmetic is left"
        " ([how it was measured](docs/performance.md))."
    )
    any_network = (
        f"**Any network.** {gated} of the {len(models)} models of timm and torchvision take gates; of every"
        " other addition the reason is listed ([model by model](docs/coverage.md))."
    )
    lines = (
        textwrap.fill(one, 118, initial_indent="- ", subsequent_indent="  ") for one in (told, any_network)
    )
    return "\n".join(lines) + "\n"


def quoted(page: str) -> str:
    """A page with its block of numbers written anew; as it is without one."""
    before, mark, rest = page.partition(BLOCK)
    return f"{before}{mark}{numbers()}{END}{rest.partition(END)[2]}" if mark else page


def draw(place: Path) -> None:
    """Draws the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    gains = differences(rows("evidence.jsonl"))
    height = max(2.9, 0.28 * sum(1 + len(arms) for arms in gains.values()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, height), layout="constrained")
    for y, (model, row) in enumerate(times(rows("performance.jsonl")).items()):
        left.barh(y, 1, color="#dddddd", height=0.55)
        left.barh(y, row["ratio"], color="#00897b", height=0.55)
        left.plot([row["bound"]] * 2, [y - 0.38, y + 0.38], color="black")
        left.text(row["ratio"] + 0.02, y, f"{row['ratio']:.2f}", va="center")
        left.text(0.02, y, NETWORKS[model], color="white", va="center")
    left.set(title="Time of a training step, plain network = 1", xlim=(0, 1.02), yticks=[])
    left.set_xlabel(f"drop rates rise to {RATE}; line: arithmetic left")
    left.invert_yaxis()

    labels = []
    for part, arms in gains.items():
        where = {"transform": right.get_yaxis_transform(), "va": "center", "fontsize": 9}
        right.text(-0.19, len(labels), part, backgroundcolor="white", **where).set_in_layout(False)
        labels.append("")
        for arm, one in arms.items():
            points, y = [100 * value for value in one.differences], len(labels)
            right.plot(points, [y] * len(points), "o", color="#00897b", alpha=0.45, markeredgewidth=0)
            right.plot([mean(points)] * 2, [y - 0.3, y + 0.3], color="black")
            labels.append(arm)
    right.axvline(0, color="#888888", linewidth=0.8, zorder=0)
    right.set(title="Accuracy with gates minus without, points", yticks=range(len(labels)))
    right.set_yticklabels(labels)
    right.tick_params(axis="y", length=0)
    right.spines["left"].set_visible(False)
    right.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    right.set_ylim(-0.6, len(labels) - 0.4)
    right.set_xlabel("dot: two trainings of one seed; line: their mean")
    right.invert_yaxis()
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(place, dpi=150, facecolor="white")


def main() -> None:
    """Writes all of it."""
    draw(DOCS / "front.png")
    readme = DOCS.parent / "README.md"
    readme.write_text(quoted(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
