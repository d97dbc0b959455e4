"""Branches that compute with the number of their rows, which some of the rows have not: they are masked."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon


class Inner(nn.Module):
    """A function as a child, into which no trace of its block looks."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: Tensor) -> Tensor:
        return self.function(y)


class Block(nn.Module):
    """``x + g(relu(W x))`` for a function g, traced through or not; W is the identity."""

    def __init__(self, function: Callable[[Tensor], Tensor], inner: bool) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4, bias=False), Inner(function) if inner else function
        nn.init.eye_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.layer(x).relu())


def spread(values: Tensor) -> Tensor:
    return values.float()[:, None, None]


COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "half of the batch": lambda y: y * spread(torch.arange(y.shape[0]) < y.shape[0] // 2),
    "mean by hand": lambda y: y / y.shape[0],
    "root": lambda y: y * y.shape[0] ** -0.5,
    "numel": lambda y: y / y.numel(),
    "linspace": lambda y: y * spread(torch.linspace(0, 1, y.shape[0])),
    "eye": lambda y: y * spread(torch.eye(y.shape[0])[0]),
    "counted": lambda y: y * spread(torch.ones(y.shape[0]).cumsum(0)),
    "counted like": lambda y: y * torch.ones_like(y).cumsum(0),
    "summed": lambda y: y * torch.ones(y.shape[0]).sum(),
    "filled": lambda y: y * torch.full((4,), 1.0 * y.shape[0]),
    "two halves": lambda y: (
        y * spread(torch.cat((torch.zeros(h := y.shape[0] // 2), torch.ones(len(y) - h))))
    ),
    "a slice of a table": lambda y: y * spread(torch.arange(10**5)[: y.shape[0]]),
    "Python's numbers": lambda y: y * torch.tensor(1.0 * y.shape[0]),
}
SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda y: y.reshape(y.shape[0] * 3, 4).softmax(-1).view(y.shape[0], 3, 4),
    "expand": lambda y: torch.cat((torch.ones(1, 1, 4).expand(y.shape[0], -1, -1), y), 1)[:, 1:] * 2,
    "repeat": lambda y: y * torch.ones(1, 3, 4).repeat(y.shape[0], 1, 1),
    "zeros": lambda y: torch.zeros(y.shape[0], 3, 4).add_(y),
    "full": lambda y: y * torch.full((y.shape[0], 1, 1), 0.5),
    "a convolution with weights per row": lambda y: F.conv1d(
        y.reshape(1, y.shape[0] * 3, 4), torch.ones(y.shape[0] * 3, 3, 1), groups=y.shape[0]
    ).view(y.shape),
    "heads": lambda y: (
        y.view(y.shape[0], 3, 2, 2).transpose(1, 2).reshape(y.shape[0] * 2, 3, 2).view(y.shape)
    ),
    "a list of tokens": lambda y: y[:, [2, 0, 1]],
}


def gated(function: Callable[[Tensor], Tensor], inner: bool) -> nn.Module:
    block = Block(function, inner)
    return surgeon.apply(block, "uniform", skip=True, drop_rate=0.5, example=torch.zeros(2, 3, 4))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_a_branch_that_counts_its_rows_is_masked(name: str, inner: bool) -> None:
    """A row that survives gets twice what the plain branch gives it, whatever the others do."""
    block, x = gated(COUNTS[name], inner), torch.rand(6, 3, 4)
    branch = 2 * COUNTS[name](x)
    kept = dropped = 0
    for _ in range(20):
        for row, (out, plain) in enumerate(zip(block(x), x, strict=True)):
            survived = torch.allclose(out, plain + branch[row])
            assert survived or torch.equal(out, plain)
            kept, dropped = kept + survived, dropped + (not survived)
    assert kept
    assert dropped
    (gate,) = surgeon.status(block).gates
    assert not gate.skips
    assert gate.note
    assert not torch.allclose(COUNTS[name](x[3:]), COUNTS[name](x)[3:])


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_a_branch_that_takes_its_rows_for_sizes_is_skipped(name: str, inner: bool) -> None:
    block, x = gated(SIZES[name], inner), torch.rand(5, 3, 4)
    (gate,) = surgeon.status(block).gates
    assert (gate.skips, gate.note) == (True, "")
    torch.testing.assert_close(SIZES[name](x)[[1, 3]], SIZES[name](x[[1, 3]]))
