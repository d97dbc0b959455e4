"""Budgets: what is chosen for them, those that cannot be met, and what was measured before."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
import torch
from blocks import Plain, randomise
from torch import Tensor, nn

import surgeon
from surgeon._pruning.choose import Costs, choose
from surgeon._pruning.score import Worth
from surgeon.errors import PruneError, UsageError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Net(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*[Plain() for _ in range(depth)]), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


NAMES = [f"blocks.{i}.add" for i in range(5)]
COSTS = Costs(10.0, dict(zip(NAMES, (1.0, 2.0, 3.0, 1.0, 0.0), strict=True)))


def test_harm_counts_per_unit_saved() -> None:
    """Of equal harm the dearest goes; what saves nothing never does; what does good goes first."""
    harm = {"a": 1.0, "b": 1.0, "c": 0.1, "d": -0.2}

    def worth(names: Collection[str]) -> Worth:
        return Worth(5 + sum(harm[name] for name in names))

    costs = Costs(10.0, {"a": 1.0, "b": 4.0, "c": 0.0, "d": 1.0})

    def enough(gone: Sequence[str]) -> bool:
        return costs.without(gone) <= 5

    assert choose(worth, list("abcd"), enough, 4, costs.branches) == ["d", "b"]
    assert choose(worth, list("abcd"), lambda gone: len(gone) == 2, 4) == ["d", "c"]  # each saves one
    assert choose(worth, list("abcd"), lambda _: True, 4) == []


def test_a_network_is_pruned_until_it_meets_the_budget() -> None:
    model = randomise(Net()).eval()
    shorter = surgeon.prune(model, budget=6.5, costs=COSTS, data=[(X, Y)], example=X)
    left = {residual.name for residual in surgeon.find(shorter, X)}
    gone = set(NAMES) - left
    assert COSTS.without(gone) <= 6.5 and NAMES[4] in left
    assert all(COSTS.without(gone - {name}) > 6.5 for name in [max(gone, key=COSTS.branches.__getitem__)])
    same = surgeon.prune(model, budget=10.0, costs=COSTS, data=[(X, Y)], example=X)
    assert len(surgeon.find(same, X)) == 5  # it is met as it is


def test_what_cannot_be_met_and_what_is_missing() -> None:
    model = Net()
    with pytest.raises(UsageError, match=r"2 ms cannot be met.* takes 10, .* 3 are left; give that or more"):
        surgeon.prune(model, budget=2.0, costs=COSTS, data=[(X, Y)], example=X)
    with pytest.raises(UsageError, match=r"a budget needs costs.*surgeon.latency\(model\)"):
        surgeon.prune(model, budget=2.0, data=[(X, Y)], example=X)
    with pytest.raises(UsageError, match="give one of drop"):
        surgeon.prune(model, depth=0.5, budget=2.0, costs=COSTS, data=[(X, Y)], example=X)
    assert len(surgeon.find(model, X)) == 5


def test_every_block_of_a_stage_may_go() -> None:
    model = randomise(Net()).eval()
    assert torch.equal(surgeon.prune(model, ["blocks.*"], example=X)(X), model.head(X))


def test_a_branch_that_changes_the_shape_has_a_projection_that_stays() -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
            self.shortcut = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.shortcut(x) + self.f(x)

    model = nn.Sequential(Wider(), nn.Linear(8, 3))
    shorter = surgeon.prune(model, ["0.add"], example=X)
    torch.testing.assert_close(shorter(X), model[1](model[0].shortcut(X)))
    assert not hasattr(shorter[0], "f")


def measured(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_a_lesion_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, cache = randomise(Net()).eval(), tmp_path / "lesion.jsonl"
    first = surgeon.lesion(model, [(X, Y)], counts=[2], cache=cache, example=X)
    count = measured(cache)
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join(lines[: count // 2]) + "\n")  # as if it had been stopped there
    seen: list[int] = []
    again = surgeon.lesion(model, [(X, Y)], counts=[2], cache=cache, example=X, progress=seen.append)
    assert again == first and measured(cache) == count == seen[-1] and len(seen) == count - count // 2
    surgeon.lesion(model, [(X, Y)], counts=[2], cache=cache, example=X, progress=seen.append)
    assert measured(cache) == count  # nothing was left to measure


def test_other_weights_or_data_are_measured_anew(tmp_path: Path) -> None:
    model, cache = randomise(Net()).eval(), tmp_path / "lesion.jsonl"
    first = surgeon.lesion(model, [(X, Y)], cache=cache, example=X)
    other = surgeon.lesion(model, [(X + 1, Y)], cache=cache, example=X)
    assert other == surgeon.lesion(model, [(X + 1, Y)], example=X) != first
    with torch.no_grad():
        model.blocks[0].f[0].weight[0, 0] += 1
    changed = surgeon.lesion(model, [(X, Y)], cache=cache, example=X)
    assert changed == surgeon.lesion(model, [(X, Y)], example=X) != first


def test_files_that_are_no_cache(tmp_path: Path) -> None:
    for text in ("no json\n", json.dumps({"some": "thing"}) + "\n", "[1]\n"):
        (tmp_path / "c").write_text(text)
        with pytest.raises(UsageError, match=r"is no cache of lesions .* name another file"):
            surgeon.lesion(Net(), [(X, Y)], cache=tmp_path / "c", example=X)
        assert (tmp_path / "c").read_text() == text
    with pytest.raises(UsageError, match="a cache is for what is measured on data"):
        surgeon.lesion(Net(), score=lambda _: 1.0, cache=tmp_path / "c", example=X)


def test_a_refused_branch_changes_nothing() -> None:
    with pytest.raises(PruneError, match="evaluation"):
        surgeon.prune(Sometimes(), ["add"], example=X)


class Sometimes(nn.Module):
    """Adds in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if self.training else self.f(x)
