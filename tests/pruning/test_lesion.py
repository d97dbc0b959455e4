"""What branches are worth: against measurements by hand, and the choice of several at once."""

import copy
import itertools
import json
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import Plain, randomise
from torch import Tensor, nn
from torch.nn import functional

import surgeon
from surgeon._depth import depth_law, interval, path_lengths, poisson_binomial
from surgeon._pruning.choose import choose
from surgeon._pruning.picture import draw
from surgeon._pruning.score import Worth
from surgeon.errors import UsageError


class Net(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*[Plain() for _ in range(depth)]), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


MODEL = randomise(Net(5)).eval()
GENERATOR = torch.Generator().manual_seed(3)
BATCHES = [
    (torch.randn(8, 4, generator=GENERATOR), torch.randint(3, (8,), generator=GENERATOR)) for _ in range(3)
]


def by_hand(without: Collection[int]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all batches, the blocks run one by one."""
    logits = []
    with torch.no_grad():
        for x, _ in BATCHES:
            for place, block in enumerate(MODEL.blocks):
                x = x if place in without else block(x)  # noqa: PLW2901 - as it goes through the network
            logits.append(MODEL.head(x))
    return torch.cat(logits), torch.cat([labels for _, labels in BATCHES])


def test_each_branch_is_worth_what_it_is_by_hand() -> None:
    before = copy.deepcopy(MODEL.state_dict())
    found = surgeon.lesion(MODEL, BATCHES, example=BATCHES[0][0])
    assert [one.name for one in found] == [f"blocks.{i}.add" for i in range(5)] and len(found) == 5
    for place, one in enumerate(found):
        logits, labels = by_hand([place])
        assert one.worth.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert one.worth.accuracy == (logits.argmax(-1) == labels).double().mean().item()
    assert len({one.worth.loss for one in found}) == 5
    assert found.labelled and found.full.loss == pytest.approx(
        functional.cross_entropy(*by_hand([])).item(), rel=1e-5
    )
    assert all(torch.equal(before[k], v) for k, v in MODEL.state_dict().items())


def test_without_labels_agreement_with_the_whole_network_counts() -> None:
    found = surgeon.lesion(MODEL, [x for x, _ in BATCHES], example=BATCHES[0][0])
    assert found.full == Worth(pytest.approx(0, abs=1e-6), 1.0)
    full, less = by_hand([])[0].softmax(-1), by_hand([2])[0].softmax(-1)
    divergence = (full * (full / less).log()).sum(-1).mean().item()
    assert found.single[2].worth.loss == pytest.approx(divergence, rel=1e-4)
    assert not found.labelled and "agreement" in str(found)


def test_a_score_of_ones_own() -> None:
    found = surgeon.lesion(MODEL, score=lambda m: -m(BATCHES[0][0]).norm().item(), example=BATCHES[0][0])
    with torch.no_grad():
        norm = MODEL.head(MODEL.blocks[1:](BATCHES[0][0])).norm().item()
    assert found.single[0].worth == Worth(pytest.approx(norm, rel=1e-5), None)


def test_several_at_once_and_the_printed_table() -> None:
    found = surgeon.lesion(MODEL, BATCHES, counts=[1, 3], draws=4, candidates=5, example=BATCHES[0][0])
    one, three = found.curve
    best = min(range(5), key=lambda i: functional.cross_entropy(*by_hand([i])).item())
    assert one.chosen == (f"blocks.{best}.add",) and len(three.chosen) == 3 and len(three.at_random) == 4
    logits, labels = by_hand([2, 3, 4])
    assert three.tail.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert json.loads(json.dumps(found.to_dict()))["curve"][1]["deleted"] == 3
    text = str(found)
    assert (
        text.startswith("5 branches; whole network: loss ") and "deleted together" in text and " ± " in text
    )
    with pytest.raises(UsageError, match="counts has 5; the network has 5 branches, so give 1 to 4"):
        surgeon.lesion(MODEL, BATCHES, counts=[5], example=BATCHES[0][0])


def test_the_picture_has_a_line_for_each_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    found = surgeon.lesion(MODEL, BATCHES, counts=[1, 3], draws=2, example=BATCHES[0][0])
    assert draw(found, tmp_path / "harm.png", "a net").read_bytes().startswith(b"\x89PNG")
    alone, together = drawn[0].axes
    heights = list(alone.get_lines()[0].get_ydata())
    assert heights == [one.worth.accuracy for one in found] and alone.get_title("left") == "a net"
    chosen = together.get_lines()[0].get_ydata()
    assert list(chosen) == [found.full.accuracy, *(row.worth.accuracy for row in found.curve)]
    draw(surgeon.lesion(MODEL, BATCHES, example=BATCHES[0][0]), tmp_path / "alone.png", "")
    assert len(drawn[1].axes) == 1  # nothing was deleted together


def test_deletions_that_interact_are_measured_together() -> None:
    """Alone "a" and "b" do least harm, but each stands in for the other."""

    def worth(names: Collection[str]) -> Worth:
        harm = sum({"a": 1.0, "b": 1.1, "c": 2.0, "d": 9.0}[name] for name in names)
        return Worth(harm + (50 if {"a", "b"} <= set(names) else 0))

    def two(gone: Collection[str]) -> bool:
        return len(gone) == 2

    assert choose(worth, list("abcd"), two, candidates=4) == ["a", "c"]
    assert choose(worth, list("abcd"), two, candidates=1) == ["a", "b"]  # the first measurement is trusted
    best = min(itertools.combinations("abcd", 2), key=lambda pair: worth(pair).loss)
    assert set(choose(worth, list("abcd"), two, candidates=4)) == set(best)


def test_prune_takes_the_least_missed() -> None:
    found = surgeon.lesion(MODEL, BATCHES, counts=[2], candidates=5, example=BATCHES[0][0])
    pruned = surgeon.prune(MODEL, depth=0.6, data=BATCHES, candidates=5, example=BATCHES[0][0])
    gone = {f"blocks.{i}.add" for i, block in enumerate(pruned.blocks) if type(block) is nn.Identity}
    assert gone == set(found.curve[0].chosen)


def test_what_is_no_row_of_logits_is_named() -> None:
    with pytest.raises(UsageError, match=r"gives \[8, 2, 2\] and not one row of logits"):
        surgeon.lesion(nn.Sequential(Plain(), nn.Unflatten(1, (2, 2))), BATCHES, example=BATCHES[0][0])
    with pytest.raises(UsageError, match="data holds no batch"):
        surgeon.lesion(MODEL, [], example=BATCHES[0][0])
    with pytest.raises(UsageError, match=r"a batch of data is \(inputs, labels\)"):
        surgeon.lesion(MODEL, [(1, 2, 3)], example=BATCHES[0][0])


def test_depth_follows_the_poisson_binomial_law() -> None:
    survival = [0.9, 0.5, 0.25, 1.0]
    law = depth_law(survival)
    every = [0.0] * 5
    for runs in itertools.product([0, 1], repeat=4):
        every[sum(runs)] += math.prod(p if r else 1 - p for p, r in zip(survival, runs, strict=True))
    assert law == pytest.approx(every) and sum(law) == pytest.approx(1)
    assert sum(k * p for k, p in enumerate(law)) == pytest.approx(sum(survival))
    assert poisson_binomial([]) == [1.0]


def test_path_lengths_of_veit_et_al() -> None:
    """Without gates the 2^54 paths of a ResNet-110 are binomial, most of them 19 to 35 blocks long."""
    plain = path_lengths([1.0] * 54)
    assert plain == pytest.approx([math.comb(54, k) / 2**54 for k in range(55)])
    assert interval(plain) == (20, 34)
    gated = path_lengths([1 - l / 54 * 0.5 for l in range(1, 55)])
    assert 10 <= int(np.argmax(gated)) <= 34 and np.argmax(gated) < np.argmax(plain)
    alive = [0.0] * 4
    for runs in itertools.product([0, 1], repeat=3):  # by enumeration: a path lives where its branches run
        alive[sum(runs)] += math.prod(p for p, r in zip([0.5, 0.3, 0.8], runs, strict=True) if r)
    assert path_lengths([0.5, 0.3, 0.8]) == pytest.approx([a / sum(alive) for a in alive])
