"""Rows of joint weights where the parts are of odd sizes or a bias stands for all of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import Of
from folds import Gated, folds, randomised, tokens
from torch import Tensor, nn


@pytest.mark.parametrize("sizes", [(0, 8, 4), (8, 0, 4), (8, 4, 0)])
def test_a_part_of_no_size(sizes: tuple[int, ...]) -> None:
    def forward(held: Any, x: Tensor) -> Tensor:
        u, v = [part for part in held.joint(x).split(sizes, -1) if part.shape[-1]]
        return u * torch.sigmoid(held.last(F.silu(v)))

    model = randomised(Gated(Of(forward, joint=nn.Linear(8, 12), last=nn.Linear(4, 8))))
    folds(model, tokens())


@pytest.mark.parametrize(
    ("shape", "rows"), [((12,), 2), ((1, 12), 2), ((1,), None), ((), None), ((10, 1), None), ((10, 12), 2)]
)
def test_a_bias_that_stands_for_all_columns(shape: tuple[int, ...], rows: int | None) -> None:
    """One number cannot take the scale for some of the columns and not for others."""

    def forward(held: Any, x: Tensor) -> Tensor:
        u, v = torch.addmm(held.bias, x.flatten(0, 1), held.weight).split([8, 4], -1)
        return (u * torch.sigmoid(held.last(F.silu(v)))).view_as(x)

    parts = {"bias": torch.randn(shape), "weight": torch.randn(8, 12), "last": nn.Linear(4, 8)}
    made = folds(randomised(Gated(Of(forward, **parts))), tokens())
    if rows is None:
        assert made.kept
    else:
        assert [step.rows for step in made.products] == [(0, 8)] * rows


@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
def test_a_table_without_a_batch_is_pooled_over_its_last_two_dimensions(pool: Any) -> None:
    """Columns that a pool has mixed are no rows of their own; channels, its first dimension, are."""

    def forward(columns: bool) -> Any:
        def run(held: Any, x: Tensor) -> Tensor:
            gains = pool(held.gains, (3, 1), 1, (1, 0))
            gain, other = (gains[0, 2], gains[0, 3]) if columns else (gains[0, 2], gains[1, 2])
            return x.tanh() * gain * torch.sigmoid(x * other)

        return run

    for columns in (True, False):
        model = randomised(Gated(Of(forward(columns), gains=torch.randn(2, 6, 8))))
        made = folds(model, tokens())
        assert bool(made.kept) == columns, made
