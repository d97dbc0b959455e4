"""More spellings: ``x + a * (f(x) - x)`` is one residual add, whatever ``x`` sums up; vmap; flat features."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from blocks import coins
from torch import Tensor, nn

import surgeon
from surgeon._finding.findings import REASONS, Code


class Moves(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.given = forward
        self.f = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.g = nn.Linear(4, 4)
        self.a = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)


def after_a_linear_step(m: nn.Module, x: Tensor) -> Tensor:
    a = m.a.sigmoid()
    x = x + a[0] * (m.g(x) - x)
    return x + a[1] * (m.f(x) - x)


def kept_by_another_name(m: nn.Module, x: Tensor) -> Tensor:
    x = kept = m.g(x) + x
    x = m.f(x)
    return kept + m.a[1] * (x - kept)


def the_difference_first(m: nn.Module, x: Tensor) -> Tensor:
    x = x + m.g(x)
    return (m.f(x) - x) * m.a[1] + x


def written_as_a_subtraction(m: nn.Module, x: Tensor) -> Tensor:
    x = x + m.g(x)
    return x - m.a[1] * (x - m.f(x))


def from_an_argument(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.a[1] * (m.f(x) - x)


FORMS = (
    after_a_linear_step,
    kept_by_another_name,
    the_difference_first,
    written_as_a_subtraction,
    from_an_argument,
)


@pytest.mark.parametrize("form", FORMS)
def test_the_outer_sum_is_the_residual_add(form: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Moves(form)).eval(), torch.randn(3, 4)
    start = model[0](x)
    # What is left when the step is not made: the value that it would have started from.
    expected = {
        after_a_linear_step: start + model[1].a[0].sigmoid() * (model[1].g(start) - start),
        from_an_argument: start,
    }.get(form, start + model[1].g(start))
    surgeon.apply(model, "uniform", drop_rate=0.5, unit="batch", scaling="paper", example=x)
    assert len(surgeon.status(model)) == 1
    model.train()
    with coins(False):
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_a_block_under_vmap_does_not_hide_the_others() -> None:
    def rows(m: nn.Module, x: Tensor) -> Tensor:
        return x + torch.vmap(m.f)(x)

    model = nn.Sequential(Moves(rows), Moves(from_an_argument))
    found = surgeon.find(model, torch.randn(3, 4))
    assert [r.block for r in found] == ["1"]
    assert any(r.block == "0" and r.code == "untraceable" for r in found.refused)


def test_a_sum_of_flattened_features_is_no_measure() -> None:
    def flat(m: nn.Module, x: Tensor) -> Tensor:
        return (x.reshape(-1) + m.f(x).reshape(-1)).reshape(x.shape)

    assert len(surgeon.find(nn.Sequential(Moves(flat)), torch.randn(3, 4))) == 1


def test_reasons_are_a_fixed_set() -> None:
    assert set(get_args(Code)) == set(REASONS)
    found = surgeon.find(nn.Sequential(Moves(from_an_argument)), torch.randn(3, 4), exclude="0.add")
    assert {refusal.code for refusal in found.refused} == {"excluded", "nested"}


def test_new_features_that_are_left_out_by_name_are_listed() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
            self.g = nn.Sequential(nn.Linear(6, 2), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x, self.f(x)], 1)
            return torch.cat([x, self.g(x)], 1)

    every = surgeon.find(Dense(), torch.randn(3, 4), include=["concat"])
    assert len(every) == 2
    one = surgeon.find(Dense(), torch.randn(3, 4), include=["concat"], exclude=every[0].name)
    assert [r.name for r in one] == [every[1].name] and one.refused[0].code == "excluded"
