"""The picture of README and the site's first page, and README's numbers, of rows that others have measured.

    python -m benchmarks.front

Left: the time of a training step over the plain network's (`docs/performance.jsonl`, of
`benchmarks/step.py`), at a final drop rate of 0.5, with the share of the arithmetic that is left as a line.
Right: accuracy with gates minus accuracy without, by pairs of one seed (`docs/evidence.jsonl`, of
`benchmarks/evidence.py`); nothing is drawn there before two pairs have run.
"""

import csv
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

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


def times(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each network the row of one coin per batch, at its largest batch."""
    best: dict[str, dict[str, Any]] = {}
    for row in found:
        wanted = row.get("kind") == "step" and row["rate"] == RATE and row["variant"] == "batch"
        if wanted and row["model"] in NETWORKS and row["batch"] >= best.get(row["model"], row)["batch"]:
            best[row["model"]] = row
    return {model: best[model] for model in NETWORKS if model in best}


def differences(found: list[dict[str, Any]]) -> dict[str, list[float]]:
    """For each way of gating the points of accuracy that it differs by, pair by pair."""
    reached = {
        (row["part"], row["arm"], row["seed"]): row["test"]["accuracy"]
        for row in found
        if row.get("kind") == "train" and "accuracy" in row.get("test", {})
    }
    pairs = defaultdict(list)
    for (part, arm, seed), accuracy in reached.items():
        if arm != "none" and (part, "none", seed) in reached:
            pairs[f"{part}, {arm}"].append(100 * (accuracy - reached[part, "none", seed]))
    return {arm: values for arm, values in sorted(pairs.items()) if len(values) > 1}


def numbers() -> str:
    """The two numbers of README's first screen, in words."""
    steps = times(rows("performance.jsonl"))
    taken = ", ".join(f"{row['ratio']:.2f} on {NETWORKS[model]}" for model, row in steps.items())
    left = ", ".join(f"{row['bound']:.2f}" for row in steps.values())
    with (DOCS / "coverage.csv").open(newline="") as file:
        models = list(csv.DictReader(file))
    gated = sum(int(row["gates"] or 0) > 0 for row in models)
    told = (
        f"**Dropped branches are not computed.** A training step at a final drop rate of {RATE} (one coin per"
        f" batch, one CPU thread) takes, of the plain network's time, {taken}, where {left} of the arithmetic"
        " is left ([how it was measured](docs/performance.md))."
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

    steps, gains = times(rows("performance.jsonl")), differences(rows("evidence.jsonl"))
    figure, axes = plt.subplots(1, 2 if gains else 1, figsize=(9 if gains else 6, 3.1), layout="constrained")
    left = axes[0] if gains else axes
    for y, (model, row) in enumerate(steps.items()):
        left.barh(y, 1, color="#dddddd", height=0.55)
        left.barh(y, row["ratio"], color="#00897b", height=0.55)
        left.plot([row["bound"]] * 2, [y - 0.38, y + 0.38], color="black")
        left.text(row["ratio"] + 0.02, y, f"{row['ratio']:.2f}", va="center")
        left.text(0.02, y, NETWORKS[model], color="white", va="center")
    left.set(title="Time of a training step, plain = 1", xlim=(0, 1.02), yticks=[])
    left.set_xlabel("drop rate 0.5, one coin per batch; line: arithmetic left")
    left.invert_yaxis()
    if gains:
        right = axes[1]
        for y, (_, values) in enumerate(gains.items()):
            right.plot(values, [y] * len(values), "o", color="#00897b", alpha=0.45, markeredgewidth=0)
            right.plot([mean(values)] * 2, [y - 0.3, y + 0.3], color="black")
        right.axvline(0, color="#888888", linewidth=0.8)
        right.set(title="Accuracy with gates minus without, points", yticks=range(len(gains)))
        right.set_yticklabels(list(gains))
        right.set_xlabel("one dot: a pair of one seed; line: their mean")
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
