"""docs/evidence.md and its pictures, written from the rows of `benchmarks.evidence`."""

import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _evidence_pictures as pictures
from benchmarks._evidence_found import DEPTHS, PARTS, SETS, Found, findings, headlines, points
from benchmarks._evidence_plan import NONE, plan
from benchmarks._evidence_stats import Paired, paired

Row = dict[str, Any]
_BLOCK = "<!-- evidence: written by `python -m benchmarks.evidence` -->"
_END = "<!-- /evidence -->"
_TITLE = "**Measured, also where it does not help** ([paired runs](docs/evidence.md))."


def write(rows: Sequence[Row], folder: Path) -> None:
    """Writes evidence.md and its pictures into a folder, and the numbers in a README.md above it."""
    found = Found(rows)
    drawn = dict(_draw(found, folder))
    (folder / "evidence.md").write_text(page(found, drawn))
    if (readme := folder.parent / "README.md").exists():
        readme.write_text(quoted(readme.read_text(), found))


def quoted(readme: str, found: Found) -> str:
    """The text with its block of numbers written anew; as it is without a block or numbers."""
    before, mark, rest = readme.partition(_BLOCK)
    lines = headlines(found)
    if not mark or not lines:
        return readme
    told = textwrap.fill(" ".join([_TITLE, *lines]), 118, initial_indent="- ", subsequent_indent="  ")
    return f"{before}{mark}\n{told}\n{_END}{rest.partition(_END)[2]}"


def _draw(found: Found, folder: Path) -> Iterator[tuple[str, str]]:
    """Draws what there are rows for; name and Markdown of each picture."""
    parts: dict[str, dict[str, Paired]] = {}
    for part, arm, name, one in found.compared():
        parts.setdefault(part + SETS[name], {})[arm] = one
    if parts:
        pictures.forest(parts, folder / "evidence.png")
        yield "evidence", "Differences of accuracy to arm none, with intervals"
    if deep := found.shared("deep"):
        pictures.curves(deep, folder / "evidence_curves.png")
        yield "evidence_curves", "Training loss and test error by epoch"
        pictures.gradients(deep, folder / "evidence_gradients.png")
        yield "evidence_gradients", "Gradient magnitude by block"
    if rows := [row for arm in found.arms("map").values() for row in arm]:
        pictures.depth_map(rows, folder / "evidence_map.png")
        yield "evidence_map", "Test error by depth and final drop rate"
    if arms := found.shared("deep", "lesion"):
        pictures.shorter({DEPTHS[arm]: of for arm, of in arms.items()}, folder / "evidence_depth.png")
        yield "evidence_depth", "Accuracy by the share of branches that is left"


def page(found: Found, drawn: dict[str, str]) -> str:
    """The whole page; `drawn` names the pictures that there are."""
    versions = ", ".join(sorted({row["torch"] for row in found.rows})) or "none"

    def picture(name: str) -> str:
        return f"![{drawn[name]}]({name}.png)\n" if name in drawn else ""

    said = (
        "\n".join(f"- {one}" for one in findings(found))
        or "Nothing yet: two pairs are needed for a first word."
    )
    sections = (
        _HEAD.format(versions=versions),
        said + "\n",
        _counts(found),
        picture("evidence"),
        *(_part(found, part) for part in PARTS if found.arms(part)),
        _steps(found),
        _section(_TRAINING, picture("evidence_curves") + "\n" + picture("evidence_gradients")),
        _section(_MAP, picture("evidence_map")),
        _shorter(found, picture("evidence_depth")),
        _sampled(found),
        _controls(found),
        _ADVICE,
    )
    return "\n".join(one for one in sections if one)


def _section(head: str, body: str) -> str:
    return f"{head}\n{body}" if body.strip() else ""


def _table(head: str, lines: Sequence[str]) -> str:
    return "\n".join(
        [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {one} |" for one in lines), ""]
    )


def _counts(found: Found) -> str:
    planned = Counter((run.kind, run.setting.part) for run in plan())
    ran = Counter((row["kind"], row["part"]) for row in found.rows)
    lines = []
    for kind, part in planned:
        runs = [run for run in plan() if (run.kind, run.setting.part) == (kind, part)]
        arms, seeds = {run.setting.arm for run in runs}, {run.seed for run in runs}
        rows = Counter(row["seed"] for row in found.rows if (row["kind"], row["part"]) == (kind, part))
        whole = sum(count == len(arms) for count in rows.values())
        name = part if kind in ("train", part) else f"{part}, {kind}"
        lines.append(f"{name} | {whole} of {len(seeds)} | {ran[kind, part]} of {planned[kind, part]}")
    total = f"{len(found.rows)} of {sum(planned.values())} planned runs have been made"
    return f"## What has run\n\n{total}; the program goes on where it stopped.\n\n" + _table(
        "part | seeds with all arms | runs", lines
    )


def _part(found: Found, part: str) -> str:
    lines = [
        _line(arm + words, rows, found.base(part), name)
        for name, words in SETS.items()
        for arm, rows in found.arms(part).items()
        if name in rows[0]
    ]
    head = "arm | seeds | accuracy | difference, points | NLL | ECE | seconds | right alone | McNemar's p"
    return f"## {part}: {PARTS[part][1]}\n\n{_table(head, lines)}\n{_EXPLAINED}"


def _line(label: str, rows: list[Row], base: list[Row], name: str) -> str:
    def average(what: str) -> float:
        return statistics.fmean(row[name][what] for row in rows)

    seconds = statistics.fmean(row["seconds"] for row in rows)
    start = f"{label} | {len(rows)} | {average('accuracy'):.1%}"
    one, nll, ece = (paired(rows, base, name, what) for what in ("accuracy", "nll", "ece"))
    if rows[0]["arm"] == NONE or one is None or nll is None or ece is None:
        return f"{start} | | {average('nll'):.3f} | {average('ece'):.3f} | {seconds:.0f} | | "
    cells = [f"{average(what):.3f}, {_range(diff)}" for what, diff in (("nll", nll), ("ece", ece))]
    alone = f"{one.only}, none {one.only_none}"
    return f"{start} | {points(one)} | {cells[0]} | {cells[1]} | {seconds:.0f} | {alone} | {one.p:.2g}"


def _range(one: Paired) -> str:
    ends = f" ({one.low:+.3f} to {one.high:+.3f})" if len(one.differences) > 1 else ""
    return f"{one.mean:+.3f}{ends}"


def _steps(found: Found) -> str:
    lines = [f"{arm} | {one['ratio']:.2f} | {one['flops']:.2f}" for arm, one in found.steps().items()]
    return _section(_TIME, _table("arm | time over none | FLOPs left", lines) if lines else "")


def _shorter(found: Found, picture: str) -> str:
    lines = []
    for words, none, gated, both in found.shorter():
        cells = [f"{statistics.fmean(one):.1%}" if one else "" for one in (none, gated)]
        lines.append(f"{words} | {cells[0]} | {cells[1]} | {points(both) if both else ''}")
    table = (
        _table("deleted | trained without gates | with gates | difference, points", lines) if lines else ""
    )
    return _section(_DEPTH, picture + "\n" + table)


def _sampled(found: Found) -> str:
    lines = []
    for arm, rows in found.shared("deep", "sample").items():
        for images in ("upright", "turned"):
            cells = [
                ", ".join(
                    f"{statistics.fmean(row[images + more][what] for row in rows):{form}}"
                    for more in ("", ", drawn")
                )
                for what, form in (("accuracy", ".1%"), ("nll", ".3f"), ("ece", ".3f"))
            ]
            finds = statistics.fmean(row[f"{images}, disagreement"] for row in rows)
            lines.append(f"{DEPTHS[arm]} | {images} | {len(rows)} | {' | '.join(cells)} | {finds:.2f}")
    head = "trained | images | seeds | accuracy, drawn | NLL, drawn | ECE, drawn | finds errors"
    return _section(_SAMPLED, _table(head, lines) if lines else "")


def _controls(found: Found) -> str:
    lines = [
        f"{row['arm']} | {row['accuracy']:.1%} | {'yes' if row['holds'] else '**no**'}"
        for row in found.kind("control")
    ]
    return _section(_CONTROLS, _table("control | accuracy | as it should", lines) if lines else "")


_HEAD = """# When gates help, by how much, and what they save

Written by `python -m benchmarks.evidence` from the rows in `evidence.jsonl` (torch {versions}, one CPU
thread). What was to be run, and how it is decided, was written [before](evidence_plan.md). Differences
are to the same network trained without gates from the same seed: the same images, head, order and
mirrorings.

## What was found
"""

_EXPLAINED = """Differences are means over seeds, with their intervals; NLL and ECE have theirs behind
the mean of the arm. Seconds are processor time of the training steps. *Right alone* counts answers, over
all seeds, that this arm or none had right and the other had not.
"""

_TIME = """## Time of a step of ResNet-56 at 14 px

Processor time of forward and backward, means of 12 steps taken in turns.
[performance.md](performance.md) has larger networks and takes more care.
"""

_TRAINING = """## Training of ResNet-56

The paper's figures 3 to 5 and 7, means over seeds. The error is that of the first 300 test images;
gradients are those of each block's first convolution, over the steps in which it ran.
"""

_MAP = """## Depth and final drop rate

The paper's figure 8, on 500 images: rate 0 is without gates, the others are one coin for the batch and
the paper's rule.
"""

_DEPTH = """## Branches deleted from ResNet-56

*At once* is without training: the branches that are missed least, chosen on 500 images that are in no other
set. *After an epoch* and *distilled* train that shorter network once through the training images, the
latter with half of the loss from the whole network's answers. Accuracies of these are on the first 1,000
test images, those of branches alone, at random (three draws) and of the last ones on the 500 images held
back. *With gates* is the arm batch 0.5.
"""

_SAMPLED = """## Gates drawn at evaluation

ResNet-56, 1,000 test images, upright and turned by 30 degrees. *Drawn* is the mean of 8 drawn networks;
a network that was trained without gates gets them for the drawing alone. *Finds errors* is the chance
that the draws disagree more on a wrong answer than on a right one.
"""

_CONTROLS = """## Controls

*Never drawn* and *repeated* have to give the row of their twin to the bit, times apart; shuffled labels
give chance, 10 %, within 5 points.
"""

_ADVICE = """## What `surgeon recommend` says

It takes the published rate that is nearest, 0.1 for a small network, says that none is for so few
images, and always has 0 among the rates worth a run. Where there is no difference or a loss above, 0 is
the rate to take. The configs in `recipes/configs` keep published rates for full data sets;
`compare=true` trains the network without gates beside.
"""
