"""The statistics of the evidence program, and the page that it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import _evidence_page as page
from benchmarks import _evidence_rows as table
from benchmarks._evidence_found import Found, findings
from benchmarks._evidence_plan import DEEP, plan
from benchmarks._evidence_stats import compared, interval, paired, right, smallest
from surgeon._recommend import recommend

DOCS = Path(__file__).parents[2] / "docs"


def measured(bits):
    bits = np.asarray(bits, bool)
    kept = {"accuracy": float(bits.mean()), "nll": 0.5, "ece": 0.1}
    return kept | {"right": np.packbits(bits).tobytes().hex(), "of": len(bits)}


def test_answers_come_back_from_their_digits():
    bits = np.random.default_rng(0).random(43) < 0.5
    assert (right(measured(bits)) == bits).all()


def test_a_pair_is_of_one_seed_and_counts_who_was_right_alone():
    arm = [{"seed": 1, "test": measured([1, 1, 1, 0])}, {"seed": 7, "test": measured([1, 1, 1, 1])}]
    none = [{"seed": 1, "test": measured([1, 0, 0, 1])}, {"seed": 2, "test": measured([0, 0, 0, 0])}]
    one = paired(arm, none)
    assert one.differences == (0.25,)
    assert (one.only, one.only_none) == (2, 1)
    assert one.p == stats.binomtest(2, 3).pvalue
    assert paired(arm, none[1:]) is None


def test_intervals_cover_what_they_should():
    """Five normal differences; false alarm below 1e-6 for the coverage of 0.93 or more that is asked for."""
    draw = np.random.default_rng(1).normal(size=(200, 5))
    inside = sum(low <= 0 <= high for low, high in map(interval, draw))
    assert stats.binom.cdf(inside, 200, 0.93) > 1e-6
    narrow = sum(abs(values.mean()) < 1.0 * values.std() / 5**0.5 for values in draw)  # done wrong on purpose
    assert stats.binom.cdf(narrow, 200, 0.93) < 1e-6


def test_no_effect_is_seldom_called_one():
    draw = np.random.default_rng(2).normal(size=(400, 3))
    seeds = dict.fromkeys(range(3), 0.0)
    called = sum(compared(dict(enumerate(v)), seeds).verdict() != "no difference seen" for v in draw)
    assert stats.binom.sf(called, 400, 0.06) > 1e-6  # the signs alone would call one of four
    assert compared({0: 1.0, 1: 1.1, 2: 0.9}, seeds).verdict() == "helps"
    assert compared({0: -1.0, 1: -1.1, 2: -0.9}, seeds).verdict() == "harms"
    assert compared({0: 1.0, 1: 1.1}, seeds).verdict() == "too few pairs to say"


@pytest.mark.parametrize("pairs", [3, 5])
def test_the_smallest_effect_is_found_four_times_of_five(pairs):
    draw = np.random.default_rng(3).normal(smallest(pairs, 2.0), 2.0, size=(4000, pairs))
    found = (stats.ttest_1samp(draw, 0, axis=1).pvalue < 0.05).mean()
    assert abs(found - 0.8) < 0.03


def rows(seeds):
    """A table as the program makes it, of invented numbers: arm batch 0.5 is right more often."""
    draw, made = np.random.default_rng(4), []
    for run in plan():
        if run.seed >= seeds:
            continue
        better = 0.1 if run.setting.arm == "batch 0.5" else 0.0
        answers = [measured(draw.random(400) < 0.7 + better) for _ in range(4)]
        row = table.head(run)
        if run.kind == "train":
            row |= {"seconds": 3.0, "loss": [2.0, 1.0], "test": answers[0]}
            row |= {"other": answers[1]} if run.setting.data == "emoji" else {}
            row |= {"error": [0.9, 0.3], "gradients": [[0.1] * 27] * 2} if run.setting.net != "lite0" else {}
        elif run.kind == "time":
            row |= {one.arm: {"seconds": [1.0], "ratio": 0.75, "flops": 0.7} for one in DEEP}
        elif run.kind == "control":
            row |= {"accuracy": 0.1, "holds": True}
        elif run.kind == "sample":
            names = ("upright", "upright, drawn", "turned", "turned, drawn")
            row |= dict(zip(names, answers, strict=True))
            row |= {f"{name}, disagreement": 0.6 for name in names[::2]}
        else:
            ways = ("at once", "the last ones", "after an epoch", "distilled")
            left = [0.6 + better + 0.01 * run.seed * bool(better) - count / 100 for count in (3, 7, 10, 14)]
            depths = [
                {"deleted": count, "chosen": [], "at random": [0.2, 0.3], **dict.fromkeys(ways, value)}
                for count, value in zip((3, 7, 10, 14), left, strict=True)
            ]
            row |= {
                "full": 0.7 + better,
                "alone": {str(i): 0.65 + better for i in range(27)},
                "depths": depths,
            }
        made.append(row)
    return made


def test_the_page_tells_what_ran_and_what_was_found(tmp_path):
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page._BLOCK}\nold\n{page._END}\nafter\n")
    page.write(rows(3), tmp_path / "docs")
    text = (tmp_path / "docs/evidence.md").read_text()
    assert "| fashion | 3 of 5 | 15 of 25 |" in text
    assert "**deep, batch 0.5**: helps. Accuracy +" in text
    assert "**Branches deleted (14, at once)**: having trained with gates helps" in text
    assert "all 4 came out as they should" in text
    for name in ("", "_curves", "_gradients", "_map", "_depth"):
        assert (tmp_path / f"docs/evidence{name}.png").stat().st_size > 5000
        assert f"(evidence{name}.png)" in text
    found = readme.read_text()
    assert found.startswith("before\n") and found.endswith(f"\n{page._END}\nafter\n") and "old" not in found
    told = " ".join(found.split())
    assert "14 of ResNet-56's 27 branches deleted, without training: accuracy 57% if it was trained" in told


def test_means_are_compared_over_the_same_seeds():
    made = [row for row in rows(3) if (row["kind"], row["arm"], row["seed"]) != ("lesion", "none", 2)]
    found = Found(made)
    assert {arm: len(of) for arm, of in found.shared("deep", "lesion").items()} == {"none": 2, "batch 0.5": 2}
    words, none, gated, both = next(found.shorter())
    assert (words, len(none), len(gated), len(both.differences)) == ("none", 2, 2, 2)
    assert found.shared("deep", "nothing") == {}


def test_a_control_that_failed_is_named():
    made = [row | {"holds": row["arm"] != "repeated"} for row in rows(1) if row["kind"] == "control"]
    assert findings(Found(made)) == ["**Controls** that failed: repeated."]


def test_few_rows_make_a_page_without_words(tmp_path):
    page.write(rows(1)[:3], tmp_path)
    assert "two pairs are needed" in (tmp_path / "evidence.md").read_text()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.skipif(not (DOCS / "evidence.jsonl").exists(), reason="nothing has run yet")
def test_the_page_in_docs_is_that_of_its_rows():
    found = Found(table.read(DOCS / "evidence.jsonl"))
    text = (DOCS / "evidence.md").read_text()
    assert [f"- {one}" in text for one in findings(found)].count(False) == 0
    readme = (DOCS.parent / "README.md").read_text()
    assert page.quoted(readme, found) == readme
    assert all(json.dumps(row) for row in found.rows)


@pytest.mark.skipif(not (DOCS / "evidence.jsonl").exists(), reason="nothing has run yet")
def test_what_is_recommended_agrees_with_the_rows():
    compared = list(Found(table.read(DOCS / "evidence.jsonl")).compared())
    gain = any(one.verdict() == "helps" for part, _, _, one in compared if part != "deep")  # fine-tuning
    said = str(recommend("tf_efficientnet_lite0", 4.65, images=300, epochs=5))
    assert ("(docs/evidence.md) saw no gain in accuracy" in said) is not gain
    loss = any(one.verdict() == "harms" for part, _, _, one in compared if part == "deep")
    said = str(recommend("resnet18", 11.7, images=600, epochs=10, scratch=True))
    assert ("(docs/evidence.md) lost accuracy" in said) is loss
