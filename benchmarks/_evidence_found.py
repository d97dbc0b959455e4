"""The rows of `benchmarks.evidence` by arm, their comparisons, and the findings in plain sentences."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks._evidence_plan import NONE, plan
from benchmarks._evidence_stats import Paired, compared, paired
from surgeon._text import count

Row = dict[str, Any]

# Parts that are compared: which part has their arm none, and what they are in words.
_LITE0 = "lite0 with ImageNet weights"
PARTS = {
    "fashion": ("fashion", f"{_LITE0}, 300 images of Fashion-MNIST"),
    "fashion-100": ("fashion-100", f"{_LITE0}, 100 images of Fashion-MNIST"),
    "fashion-1000": ("fashion-1000", f"{_LITE0}, 1,000 images of Fashion-MNIST"),
    "emoji": ("emoji", f"{_LITE0}, 400 emoji by category"),
    "emoji-ramps": ("emoji", f"{_LITE0}, 400 emoji by category, rates that change"),
    "deep": ("deep", "ResNet-56 from random weights, 600 images of Fashion-MNIST at 14 px"),
    "again": ("again", "ResNet-56 trained on classes 0 to 4, then 200 images of classes 5 to 9"),
}
SETS = {"test": "", "other": ", other style"}
HALF = 14  # of ResNet-56's 27 branches
DEPTHS = {NONE: "without gates", "batch 0.5": "with gates"}


class Found:
    """Rows by what they are of."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def kind(self, kind: str) -> list[Row]:
        """All rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def arm(self, part: str, arm: str, kind: str = "train") -> list[Row]:
        """The rows of one arm, by seed."""
        rows = [row for row in self.kind(kind) if (row["part"], row["arm"]) == (part, arm)]
        return sorted(rows, key=lambda row: row["seed"])

    def arms(self, part: str, kind: str = "train") -> dict[str, list[Row]]:
        """All arms of a part, in the order of the plan."""
        runs = [run for run in plan() if (run.kind, run.setting.part) == (kind, part)]
        names = dict.fromkeys(run.setting.arm for run in runs)
        return {arm: rows for arm in names if (rows := self.arm(part, arm, kind))}

    def shared(self, part: str, kind: str = "train") -> dict[str, list[Row]]:
        """The same, of the seeds alone that all of these arms have, so that their means can be compared."""
        arms = self.arms(part, kind)
        seeds = [{row["seed"] for row in rows} for rows in arms.values()]
        common = set.intersection(*seeds) if seeds else set()
        kept = {arm: [row for row in rows if row["seed"] in common] for arm, rows in arms.items()}
        return kept if common else {}

    def base(self, part: str) -> list[Row]:
        """The rows of arm none that a part is compared with."""
        return self.arm(PARTS[part][0], NONE)

    def compared(self) -> Iterator[tuple[str, str, str, Paired]]:
        """Part, arm, test set and difference of accuracy of every arm that has two pairs or more."""
        for part in PARTS:
            for arm, rows in self.arms(part).items():
                for name in SETS:
                    one = name in rows[0] and arm != NONE and paired(rows, self.base(part), name)
                    if one and len(one.differences) > 1:
                        yield part, arm, name, one

    def shorter(self) -> Iterator[tuple[str, list[float], list[float], Paired | None]]:
        """What deleted branches leave: in words, accuracies without gates, with gates, and the difference."""
        shared = self.shared("deep", "lesion")
        none, gated = (shared.get(arm, []) for arm in DEPTHS)
        for words, get in _ways((none or gated)[0]) if none or gated else ():
            values = [{row["seed"]: get(row) for row in rows} for rows in (none, gated)]
            yield words, *(list(one.values()) for one in values), compared(values[1], values[0])  # type: ignore[misc]

    def steps(self) -> dict[str, Row]:
        """Step times by arm, none among them."""
        rows = self.kind("time")
        return (
            {arm: one for arm, one in rows[0].items() if isinstance(one, dict) and "ratio" in one}
            if rows
            else {}
        )


def _ways(row: Row) -> Iterator[tuple[str, Callable[[Row], float]]]:
    yield "none", lambda row: row["full"]
    yield "each one alone, mean", lambda row: statistics.fmean(row["alone"].values())
    yield "each one alone, worst", lambda row: min(row["alone"].values())
    for i, one in enumerate(row["depths"]):
        for way in ("at once", "at random", "the last ones", "after an epoch", "distilled"):
            yield f"{one['deleted']}, {way}", lambda row, i=i, way=way: mean(row["depths"][i][way])


def mean(value: float | list[float]) -> float:
    """Of several draws, or of one value."""
    return statistics.fmean(value) if isinstance(value, list) else value


def points(one: Paired) -> str:
    """A difference of accuracy with its interval."""
    ends = f" ({100 * one.low:+.1f} to {100 * one.high:+.1f})" if len(one.differences) > 1 else ""
    return f"{100 * one.mean:+.1f}{ends}"


def _pairs(one: Paired) -> str:
    return count(len(one.differences), "pair")


def findings(found: Found) -> list[str]:
    """One plain sentence each, also where gates do nothing or harm."""
    return [*_accuracy(found), *_steps(found), *_shorter(found), *_controls(found)]


def headlines(found: Found) -> list[str]:
    """At most two: what gates did to a fine-tune, and to a network with branches deleted."""
    lines = []
    for part, arm, name, one in found.compared():
        if (part, arm, name) == ("fashion", "linear 0.2", "test") and len(one.differences) > 2:
            lines.append(
                f"Fine-tuning {PARTS[part][1]}, linear 0.2: {one.verdict()}, {points(one)} points of "
                f"accuracy over {_pairs(one)}."
            )
    for words, none, gated, both in found.shorter():
        if both and len(both.differences) > 2 and words == f"{HALF}, at once":
            kept = [f"{statistics.fmean(one):.0%}" for one in (gated, none)]
            lines.append(
                f"{HALF} of ResNet-56's 27 branches deleted, without training: accuracy {kept[0]} if it was "
                f"trained with gates, {kept[1]} if without ({_pairs(both)}; {both.verdict()})."
            )
    return lines


def _accuracy(found: Found) -> Iterator[str]:
    for part, arm, name, one in found.compared():
        seen = f"; {100 * one.visible:.1f} points could have been seen" if len(one.differences) > 2 else ""
        where = f"**{part}{SETS[name]}, {arm}**"
        yield f"{where}: {one.verdict()}. Accuracy {points(one)} points over {_pairs(one)}{seen}."


def _steps(found: Found) -> Iterator[str]:
    each = [
        f"{arm} takes {one['ratio']:.2f} of the time with {one['flops']:.2f} of the arithmetic"
        for arm, one in found.steps().items()
        if arm != NONE
    ]
    if each:
        yield f"**Time of a step**, ResNet-56 at 14 px: {'; '.join(each)}."


def _shorter(found: Found) -> Iterator[str]:
    shown = [(words, both) for words, _, _, both in found.shorter() if both]
    last = shown[-1][0].split(",")[0] if shown else ""
    for words, both in shown:
        if words in ("each one alone, mean", f"{last}, at once", f"{last}, distilled"):
            verdict = both.verdict("having trained with gates helps", "having trained with gates harms")
            said = f"Accuracy {points(both)} points over {_pairs(both)}."
            yield f"**Branches deleted ({words})**: {verdict}. {said}"


def _controls(found: Found) -> Iterator[str]:
    rows = found.kind("control")
    if failed := [row["arm"] for row in rows if not row["holds"]]:
        yield f"**Controls** that failed: {', '.join(failed)}."
    elif rows:
        yield f"**Controls**: all {len(rows)} came out as they should."
