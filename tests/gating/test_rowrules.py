"""Branches that mix rows without a trace in the shapes of their results: none is run on some rows only."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon


class Block(nn.Module):
    """``x + g(w * x)`` for a function g."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(())), function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function((x * self.weight).relu())


def rows_of(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] - 1, -1, -1)


ONES = torch.ones(4, 4)

# On inputs of shape (2, 3, 4): rows, tokens, channels.
MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed by index": lambda x: x[rows_of(x)],
    "index_select": lambda x: x.index_select(0, rows_of(x)),
    "gather": lambda x: x.gather(0, rows_of(x)[:, None, None].expand_as(x)),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "roll of all": lambda x: x.roll(1),
    "sort": lambda x: x.sort(0).values,
    "topk": lambda x: x.topk(x.shape[0], 0).values,
    "softmax": lambda x: x.softmax(0),
    "cumsum": lambda x: x.cumsum(0),
    "attention over rows": lambda x: F.scaled_dot_product_attention(
        x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1)
    ).transpose(0, 1),
    "convolution along rows": lambda x: F.conv1d(x.permute(1, 2, 0), torch.ones(4, 4, 3), padding=1).permute(
        2, 0, 1
    ),
    "pooling along rows": lambda x: F.avg_pool1d(x.permute(1, 2, 0), 3, 1, 1).permute(2, 0, 1),
    "layer norm over rows": lambda x: F.layer_norm(x.transpose(0, 2), (x.shape[0],)).transpose(0, 2),
    "group norm over rows": lambda x: F.group_norm(x.permute(1, 2, 0), 2).permute(2, 0, 1),
    "scrambled by a view": lambda x: x.reshape(3, x.shape[0], 4).softmax(0).reshape(x.shape),
    "fourier": lambda x: torch.fft.fft(x, dim=0).real,
    "scattered": lambda x: torch.zeros_like(x).scatter(0, rows_of(x)[:, None, None].expand_as(x), x),
    "joined": lambda x: torch.cat((x[: x.shape[0] // 2], x[: x.shape[0] - x.shape[0] // 2]), 0),
}
KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "by index along tokens": lambda x: x[:, [2, 0, 1]],
    "a table looked up": lambda x: x + torch.ones(5, 4)[(x[..., 0] > 0).long()],
    "flip": lambda x: x.flip(1),
    "sort": lambda x: x.sort(-1).values,
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "convolution along tokens": lambda x: F.conv1d(
        x.transpose(1, 2), torch.ones(4, 4, 3), padding=1
    ).transpose(1, 2),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "group norm": lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "a view": lambda x: x.reshape(x.shape[0], 2, 6).softmax(1).reshape(x.shape),
    "heads in the rows": lambda x: (x.reshape(-1, 2, 2) @ torch.ones(2, 2)).reshape(x.shape),
    "activations": lambda x: F.hardswish(F.gelu(x)) + F.logsigmoid(x) + F.leaky_relu(x),
    "fourier": lambda x: torch.fft.fft(x, dim=1).real,
    "joined": lambda x: torch.cat((x[..., :2], x[..., 2:]), -1),
    "padded": lambda x: F.pad(x, (1, 0))[..., 1:],
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_rows_is_masked(name: str) -> None:
    block = surgeon.apply(Block(MIXES[name]), "uniform", skip=True, example=torch.zeros(2, 3, 4))
    (gate,) = surgeon.status(block).gates
    assert not gate.skips
    assert gate.note
    x = torch.randn(5, 3, 4)  # and mixes them indeed: another first row changes other rows as well
    other = torch.cat((torch.randn(1, 3, 4), x[1:]))
    assert not torch.equal(MIXES[name](x)[1:], MIXES[name](other)[1:])


def test_an_operator_that_is_not_listed_counts_as_mixing() -> None:
    block = Block(lambda x: torch.cdist(x, x) @ x)  # which does not mix rows, but who knows
    surgeon.apply(block, "uniform", skip=True, example=torch.zeros(2, 3, 4))
    (gate,) = surgeon.status(block).gates
    assert not gate.skips
    assert "not known to keep rows apart (cdist" in gate.note


@pytest.mark.parametrize("name", KEEPS)
def test_what_keeps_rows_apart_is_skipped(name: str) -> None:
    block = surgeon.apply(Block(KEEPS[name]), "uniform", skip=True, example=torch.zeros(2, 3, 4))
    (gate,) = surgeon.status(block).gates
    assert (gate.skips, gate.note) == (True, "")
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(KEEPS[name](x)[[1, 3]], KEEPS[name](x[[1, 3]]))
