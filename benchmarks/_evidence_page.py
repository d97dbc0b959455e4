"""docs/evidence.md and its pictures, written from the rows of `benchmarks.evidence`."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _evidence_pictures as pictures
from benchmarks._evidence_plan import NONE, plan
from benchmarks._evidence_stats import Paired, paired

Row = dict[str, Any]

# Parts that are compared, the part that has their arm none, and what they are in words.
PARTS = {
    "fashion": ("fashion", "lite0 with ImageNet weights, 300 images of Fashion-MNIST"),
    "fashion-100": ("fashion-100", "the same, 100 images"),
    "fashion-1000": ("fashion-1000", "the same, 1,000 images"),
    "emoji": ("emoji", "lite0 with ImageNet weights, 480 emoji by category"),
    "emoji-ramps": ("emoji", "the same, rates that change during training"),
    "deep": ("deep", "ResNet-56 from random weights, 1,000 images of Fashion-MNIST at 14 px"),
    "again": ("again", "ResNet-56 trained on classes 0 to 4, then 200 images of classes 5 to 9"),
}
_SETS = {"test": "", "other": ", in another style"}
_DEPTHS = {"none": "trained without gates", "batch 0.5": "trained with gates"}


class Found:
    """The rows by what they are of."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def arm(self, part: str, arm: str, kind: str = "train") -> list[Row]:
        """The rows of one arm, by seed."""
        wanted = (kind, part, arm)
        rows = [row for row in self.rows if (row["kind"], row["part"], row["arm"]) == wanted]
        return sorted(rows, key=lambda row: row["seed"])

    def arms(self, part: str, kind: str = "train") -> dict[str, list[Row]]:
        """All arms of a part, in the order of the plan."""
        names = dict.fromkeys(
            run.setting.arm for run in plan() if (run.kind, run.setting.part) == (kind, part)
        )
        return {arm: rows for arm in names if (rows := self.arm(part, arm, kind))}

    def compared(self, what: str = "accuracy") -> Iterator[tuple[str, str, str, Paired]]:
        """Part, arm, test set and difference of every arm that has two pairs or more."""
        for part, (home, _) in PARTS.items():
            base = self.arm(home, NONE)
            seeds = {row["seed"] for row in base}
            for arm, rows in self.arms(part).items():
                if arm != NONE and len(seeds & {row["seed"] for row in rows}) > 1:
                    for name in _SETS:
                        if name in rows[0]:
                            yield part, arm, name, paired(rows, base, name, what)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Writes evidence.md and its pictures into a folder."""
    found = Found(rows)
    drawn = set(_draw(found, folder))
    (folder / "evidence.md").write_text(page(found, drawn))


def _draw(found: Found, folder: Path) -> Iterator[str]:
    """Draws what there are rows for, and gives its name."""
    differences = {f"{part}{_SETS[name]}: {arm}": one for part, arm, name, one in found.compared()}
    if differences:
        pictures.forest(differences, folder / "evidence.png")
        yield "evidence"
    if deep := found.arms("deep"):
        pictures.curves(deep, folder / "evidence_curves.png")
        pictures.gradients(deep, folder / "evidence_gradients.png")
        yield "curves"
    if rows := [row for arm in found.arms("map").values() for row in arm]:
        pictures.depth_map(rows, folder / "evidence_map.png")
        yield "map"
    if arms := found.arms("deep", "lesion"):
        pictures.shorter({_DEPTHS[arm]: of for arm, of in arms.items()}, folder / "evidence_depth.png")
        yield "depth"


def page(found: Found, drawn: set[str]) -> str:
    """The whole page."""
    versions = ", ".join(sorted({row["torch"] for row in found.rows})) or "none"
    parts = (
        f"""# When gates help, by how much, and what they save

Written by `python -m benchmarks.evidence` from the rows in `evidence.jsonl` (torch {versions}, one CPU thread). What
was to be run, and how it is decided, was written [before](evidence_plan.md). Differences are to the same network
trained without gates, from the same seed: the same images, head, order and mirrorings.

## What was found
""",
        "\n".join(f"- {one}" for one in findings(found)) or "Nothing yet.",
        f"\n## What has run\n\n{_counts(found)}",
        _picture(
            "evidence" in drawn, "evidence.png", "Differences of accuracy to arm none, with their intervals"
        ),
        "\n".join(_part(found, part) for part in PARTS if found.arms(part)),
        _deep(found, drawn),
        _map(drawn),
        _depth(found, drawn),
        _sampled(found),
        _controls(found),
        _advice(),
    )
    return "\n".join(part for part in parts if part)


def _picture(there: bool, name: str, says: str) -> str:
    return f"\n![{says}]({name})\n" if there else ""


def _counts(found: Found) -> str:
    planned = Counter((run.kind, run.setting.part) for run in plan())
    ran = Counter((row["kind"], row["part"]) for row in found.rows)
    lines = ["| part | runs planned | runs made | whole pairs of all arms |", "|---|---|---|---|"]
    for kind, part in planned:
        arms = {run.setting.arm for run in plan() if (run.kind, run.setting.part) == (kind, part)}
        seeds = Counter(row["seed"] for row in found.rows if (row["kind"], row["part"]) == (kind, part))
        whole = sum(count == len(arms) for count in seeds.values())
        name = part if kind == "train" else f"{part}, {kind}"
        lines.append(f"| {name} | {planned[kind, part]} | {ran[kind, part]} | {whole} |")
    total = f"{len(found.rows)} of {sum(planned.values())} planned runs have been made"
    return "\n".join([f"{total}; the program goes on where it stopped.", "", *lines, ""])


def findings(found: Found) -> list[str]:
    """One plain sentence each, also where gates do nothing or harm."""
    said = []
    for part, arm, name, one in found.compared():
        what = f"**{_title(part)}{_SETS[name]}, {arm}**: {one.verdict()}"
        seen = (
            f"; at this scatter {100 * one.visible:.1f} points could have been seen"
            if len(one.differences) > 2
            else ""
        )
        said.append(f"{what}, {_points(one)} over {len(one.differences)} pairs{seen}.")
    for make in (_said_time, _said_depth, _said_controls):
        said += make(found)
    return said


def _title(part: str) -> str:
    text = PARTS[part][1]
    return text.replace("the same", "lite0 with ImageNet weights" if part.startswith("fashion") else "emoji")


def _points(one: Paired) -> str:
    return f"{100 * one.mean:+.1f} points ({100 * one.low:+.1f} to {100 * one.high:+.1f})"


def _part(found: Found, part: str) -> str:
    lines = [
        f"\n## {part}: {PARTS[part][1]}\n",
        "| arm | pairs | accuracy | difference, points | NLL | ECE | seconds | right alone, none alone | McNemar's p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = found.arm(PARTS[part][0], NONE)
    for name, words in _SETS.items():
        for arm, rows in found.arms(part).items():
            if name in rows[0]:
                lines.append(_line(arm + words, rows, base, name))
    note = "\nNLL, ECE and seconds of processor time: mean of the arm, and the difference with its interval."
    return "\n".join([*lines, note, ""])


def _line(label: str, rows: list[Row], base: list[Row], name: str) -> str:
    accuracy = statistics.fmean(row[name]["accuracy"] for row in rows)
    means = [statistics.fmean(row[name][what] for row in rows) for what in ("nll", "ece")]
    seconds = statistics.fmean(row["seconds"] for row in rows)
    if rows[0]["arm"] == NONE or len(rows) < 2 or len(base) < 2:
        return f"| {label} | {len(rows)} | {accuracy:.1%} | | {means[0]:.3f} | {means[1]:.3f} | {seconds:.0f} | | |"
    one, nll, ece = (paired(rows, base, name, what) for what in ("accuracy", "nll", "ece"))
    return (
        f"| {label} | {len(one.differences)} | {accuracy:.1%} | {_points(one).replace(' points', '')} "
        f"| {means[0]:.3f}, {_range(nll)} | {means[1]:.3f}, {_range(ece)} | {seconds:.0f} "
        f"| {one.only}, {one.only_none} | {one.p:.2g} |"
    )


def _range(one: Paired) -> str:
    return f"{one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def _deep(found: Found, drawn: set[str]) -> str:
    rows = found.arm("deep", "batch 0.5", "time")
    text = ""
    if rows:
        text = "\n## Time of a step, ResNet-56 at 14 px\n\n| arm | time over none | FLOPs left |\n|---|---|---|\n"
        text += "".join(
            f"| {arm} | {one['ratio']:.2f} | {one['flops']:.2f} |\n"
            for arm, one in rows[0].items()
            if isinstance(one, dict) and "ratio" in one
        )
        text += "\nProcessor time of forward and backward, means of 12 steps taken in turns. [performance.md](performance.md)\nhas larger networks, and takes more care.\n"
    if "curves" in drawn:
        text += "\n## Training of ResNet-56\n" + _picture(
            True, "evidence_curves.png", "Loss and error by epoch"
        )
        text += _picture(True, "evidence_gradients.png", "Gradient magnitude by block")
        text += "\nThe paper's figures 3 to 5 and 7. Error on the first 500 test images; gradients are those of each block's first\nconvolution, over the steps in which it ran.\n"
    return text


def _map(drawn: set[str]) -> str:
    if "map" not in drawn:
        return ""
    return (
        "\n## Depth and final drop rate\n"
        + _picture(True, "evidence_map.png", "Test error by depth and rate")
        + (
            "\nThe paper's figure 8 on 500 images: rate 0 is without gates, the others one coin for the batch and the paper's rule.\n"
        )
    )


def _depth(found: Found, drawn: set[str]) -> str:
    if "depth" not in drawn:
        return ""
    lines = [
        "\n## Branches deleted from ResNet-56",
        _picture(True, "evidence_depth.png", "Accuracy by the share of branches left"),
        "Accuracy on 1,000 test images. Branches are chosen on 500 others. *After an epoch* and *distilled* train the",
        "shorter network once through its 1,000 training images, the latter with half of the loss from the whole network's",
        "answers. Differences are of networks trained with gates (batch 0.5) to those without, of the same seeds.\n",
        "| branches deleted | | without gates | with gates | difference, points |",
        "|---|---|---|---|---|",
    ]
    none, gated = (found.arm("deep", arm, "lesion") for arm in _DEPTHS)
    for label, get in _ways(none or gated):
        values = [[get(row) for row in rows] for rows in (none, gated)]
        shown = [f"{statistics.fmean(one):.1%}" if one else "" for one in values]
        both = _gains(none, gated, get)
        lines.append(
            f"| {label} | {shown[0]} | {shown[1]} | {_points(both).replace(' points', '') if both else ''} |"
        )
    return "\n".join([*lines, ""])


def _ways(rows: list[Row]) -> Iterator[tuple[str, Any]]:
    yield "0 | ", lambda row: row["full"]
    yield "each alone | mean", lambda row: statistics.fmean(row["alone"].values())
    yield "each alone | worst", lambda row: min(row["alone"].values())
    for i, one in enumerate(rows[0]["depths"]):
        for way in ("at once", "at random", "the last ones", "after an epoch", "distilled"):
            yield f"{one['deleted']} | {way}", lambda row, i=i, way=way: _mean(row["depths"][i][way])


def _mean(value: float | list[float]) -> float:
    return statistics.fmean(value) if isinstance(value, list) else value


def _gains(none: list[Row], gated: list[Row], get: Any) -> Paired | None:
    """The paired difference of a number that one row each gives."""
    from benchmarks._evidence_stats import interval

    other = {row["seed"]: get(row) for row in none}
    differences = tuple(get(row) - other[row["seed"]] for row in gated if row["seed"] in other)
    return Paired(differences, *interval(differences)) if len(differences) > 1 else None


def _said_time(found: Found) -> list[str]:
    rows = found.arm("deep", "batch 0.5", "time")
    if not rows:
        return []
    arms = [
        (arm, one) for arm, one in rows[0].items() if isinstance(one, dict) and "ratio" in one and arm != NONE
    ]
    each = "; ".join(
        f"{arm} {one['ratio']:.2f} of the time with {one['flops']:.2f} of the FLOPs" for arm, one in arms
    )
    return [f"**Time of a step of ResNet-56 at 14 px**: {each}."]


def _said_depth(found: Found) -> list[str]:
    none, gated = (found.arm("deep", arm, "lesion") for arm in _DEPTHS)
    said = []
    for label, get in _ways(none) if none and gated else ():
        both = _gains(none, gated, get)
        count, _, way = label.partition(" | ")
        if both and (
            way == "mean"
            or (way in ("at once", "distilled") and count == str(none[0]["depths"][-1]["deleted"]))
        ):
            deleted = (
                "each branch deleted alone"
                if way == "mean"
                else f"{count} of {len(none[0]['alone'])} branches deleted, {way}"
            )
            said.append(
                f"**{deleted}**: a network trained with gates is {both.verdict('better than', 'worse than').replace('no difference seen', 'seen to be no different from')} "
                f"one without, {_points(both)} over {len(both.differences)} pairs."
            )
    return said


def _said_controls(found: Found) -> list[str]:
    rows = [row for row in found.rows if row["kind"] == "control"]
    failed = [row["arm"] for row in rows if not row["holds"]]
    if not rows:
        return []
    return [
        f"**Controls**: {', '.join(failed)} failed." if failed else f"**Controls**: all {len(rows)} hold."
    ]


def _sampled(found: Found) -> str:
    arms = found.arms("deep", "sample")
    if not arms:
        return ""
    lines = [
        "\n## Gates drawn at evaluation\n",
        "ResNet-56, 1,000 test images upright and turned by 30 degrees; *drawn* is the mean of 8 drawn networks. A network that",
        "was trained without gates gets them for the drawing alone. *Finds errors* is the chance that a wrong answer has more",
        "disagreement among the draws than a right one.\n",
        "| trained | images | seeds | accuracy, drawn | NLL, drawn | ECE, drawn | finds errors |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, rows in arms.items():
        for images in ("upright", "turned"):
            cells = []
            for what, form in (("accuracy", ".1%"), ("nll", ".3f"), ("ece", ".3f")):
                one, drawn = (
                    statistics.fmean(row[images + more][what] for row in rows) for more in ("", ", drawn")
                )
                cells.append(f"{one:{form}}, {drawn:{form}}")
            finds = statistics.fmean(row[f"{images}, disagreement"] for row in rows)
            lines.append(f"| {_DEPTHS[arm]} | {images} | {len(rows)} | {' | '.join(cells)} | {finds:.2f} |")
    return "\n".join([*lines, ""])


def _controls(found: Found) -> str:
    rows = [row for row in found.rows if row["kind"] == "control"]
    if not rows:
        return ""
    lines = ["\n## Controls\n", "| control | accuracy | as it should |", "|---|---|---|"]
    lines += [
        f"| {row['arm']} | {row['accuracy']:.1%} | {'yes' if row['holds'] else '**no**'} |" for row in rows
    ]
    return "\n".join([*lines, ""])


def _advice() -> str:
    return """
## What `surgeon recommend` says

It goes by the published rate that is nearest, and says that none is for so few images: for a small network it starts
at 0.1 and always lists 0 among the rates worth a run. Where this page sees no difference or a loss at such a rate, 0 is the
one to take; the configs of `recipes/configs` train the same network without gates beside it (`compare=true`).
"""
