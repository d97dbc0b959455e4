"""Stochastic depth that is already there is known by what it does to whole rows, and by nothing else."""

from collections.abc import Callable

import pytest
import torch
from blocks import Branch
from torch import Tensor, nn

import surgeon

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Applies(nn.Module):
    """A module without parameters that does something to its argument when it trains."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x) if self.training else x


class Block(Branch):
    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.path = Applies(what)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.f(x))


def rows(x: Tensor) -> Tensor:
    return torch.rand(len(x), 1)


COINS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli_ of a new tensor": lambda x: x * x.new_empty(len(x), 1).bernoulli_(0.8) / 0.8,
    "bernoulli of a table": lambda x: x * torch.bernoulli(torch.full((len(x), 1), 0.8)),
    "floor of a shifted draw": lambda x: x / 0.8 * torch.floor(0.8 + rows(x)),
    "a comparison": lambda x: x * (rows(x) < 0.8),
    "the other comparison": lambda x: x * (rows(x) >= 0.2).float(),
    "rounding": lambda x: x * torch.round(rows(x)),
    "one coin for the batch": lambda x: x * (torch.rand(1) < 0.8),
}

OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a coin per number": lambda x: x * x.new_empty(x.shape).bernoulli_(0.8),
    "dropout": lambda x: torch.dropout(x, 0.2, True),
    "a coin per channel": lambda x: x * x.new_empty(1, 4).bernoulli_(0.8),
    "a random gain per row": lambda x: x * rows(x),
    "noise": lambda x: x + torch.randn(len(x), 1),
    "rounding without a draw": lambda x: x * torch.round(x.mean(1, keepdim=True)),
    "a threshold without a draw": lambda x: x * (x > 0),
    "nothing": lambda x: x,
}


@pytest.mark.parametrize("what", COINS)
def test_coins_for_whole_rows_are_stood_in_for(what: str) -> None:
    (residual,) = surgeon.find(nn.Sequential(Block(COINS[what])), X)
    assert residual.replaces == ("0.path",)


@pytest.mark.parametrize("what", OTHERS)
def test_what_else_is_random_or_rounds_stays(what: str) -> None:
    (residual,) = surgeon.find(nn.Sequential(Block(OTHERS[what])), X)
    assert residual.replaces == ()


def test_a_coin_is_taken_off_once_it_is_gated() -> None:
    """With the gate open and the block's own rate at a half, no row may be lost."""
    model = nn.Sequential(Block(lambda x: x * x.new_empty(len(x), 1).bernoulli_(0.5)))
    surgeon.apply(model, "uniform", drop_rate=0.0, example=X)
    model.train()
    out = model(X)
    assert torch.equal(out, X + model[0].f(X))
