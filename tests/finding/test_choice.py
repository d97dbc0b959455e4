"""`include` and `exclude` on refused additions: what comes in, which side is told, what cannot and why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Branch, Plain, coins, randomise, same
from torch import Tensor, nn

import surgeon
from surgeon.errors import UsageError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Merge(Branch):
    """Neither side is a shortcut: two branches with activations of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x)


class Mixed(Merge):
    """One sum of each kind in one block."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return self.f(x) + self.g(x)


class Table(Branch):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x + self.table)


class Spread(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x).mean(0, keepdim=True)


class Assigns(Branch):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x + self.f(x)


def names(*blocks: nn.Module, **choice: Any) -> list[str]:
    return [r.name for r in surgeon.find(nn.Sequential(*blocks), X, **choice)]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", ["0.add", "fusion", "0.*", "Merge"])
def test_a_told_side_is_the_shortcut(pattern: str, side: str, kept: bool) -> None:
    model = randomise(nn.Sequential(Merge()))
    block = model[0]
    left, right = block.f(X), block.g(X)
    surgeon.apply(
        model,
        "uniform",
        drop_rate=0.5,
        unit="batch",
        scaling="paper",
        include=[f"{pattern}:{side}"],
        example=X,
    )
    assert [(g.name, g.kind) for g in surgeon.status(model).gates] == [("0.add", side)]
    alone = left if side == "left" else right
    with coins(kept):
        assert same(model(X), left + right if kept else alone)
    model.eval()
    other = right if side == "left" else left
    torch.testing.assert_close(model(X), alone + 0.5 * other)


def test_a_told_gate_works_on_calls_not_seen() -> None:
    model = randomise(nn.Sequential(Mixed()))
    surgeon.apply(
        model, "uniform", drop_rate=0.5, unit="batch", include=["0.add_1:left"], scaling="paper", example=X
    )
    assert [g.name for g in surgeon.status(model).gates] == ["0.add_1"]
    block, wide = model[0], torch.randn(2, 5, 4)
    x = wide + block.f(wide)
    with coins(False):
        assert same(model(wide), block.f(x))


def test_one_residual_add_beside_the_gated_one_is_not_taken_for_it() -> None:
    """The block has one plain residual add and one gate, but the gate belongs to another sum."""
    model = randomise(nn.Sequential(Mixed()))
    surgeon.apply(model, "uniform", drop_rate=0.5, unit="batch", include=["0.add_1:right"], example=X)
    block = model[0]
    x = X + block.f(X)
    with coins(False):
        assert same(model(X), block.g(x))


def test_a_bias_needs_no_side() -> None:
    assert names(Table(4), Table(3, 4), include=["bias"]) == ["1.add"]  # the other is spread over the rows
    assert names(Table(3, 4), include=["0.add"]) == ["0.add"]


def test_exclude_wins() -> None:
    assert names(Merge(), Plain(), include=["fusion:left", "Plain"], exclude=["Plain"]) == ["0.add"]


def test_wildcards_without_a_side_leave_refused_additions_alone() -> None:
    assert names(Merge(), Plain(), include=["*"]) == ["1.add"]


CANNOT: list[tuple[Callable[[], nn.Module], str, str]] = [
    (Merge, "0.add", r"either side of the sum may be the shortcut.*'0.add:left' or '0.add:right'"),
    (Merge, "fusion", r"either side of the sum may be the shortcut.*'fusion:left'"),
    (lambda: Table(3, 4), "0.add:right", "its right side depends on no input, so it is no shortcut"),
    (
        lambda: Table(4),
        "0.add",
        "asks for 0.add: its shortcut is spread over the branch",
    ),
    (Spread, "0.add", "its branch over the samples.*expand the smaller side"),
    (Spread, "broadcast", "asks for 0.add: its shortcut is spread over the branch"),
    (Assigns, "0.add", "the block could not be traced: its forward assigns self.last; what the reason names"),
    (Assigns, "untraceable", "asks for 0.add"),
    (Merge, "gating:left", "matches no residual add"),
    (Merge, "0.add:middle", "matches no residual add"),
]


@pytest.mark.parametrize(("block", "pattern", "message"), CANNOT)
def test_what_cannot_come_in_says_why_and_what_to_do(
    block: Callable[[], nn.Module], pattern: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        names(block(), Plain(), include=[pattern])
