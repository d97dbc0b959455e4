"""Averages of weights that were made before the gates evaluate without the scales of the paper's rule."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Plain, X
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

import surgeon

AVERAGES: list[Callable[[nn.Module], Any]] = [torch.optim.swa_utils.AveragedModel, ModelEmaV2, ModelEmaV3]


def told(model: nn.Module, **how: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        surgeon.apply(model, example=X, **how)
    return [str(one.message) for one in seen if "without gates" in str(one.message)]


@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_from_before_the_gates_is_told_of(average: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(Plain(), Plain(), nn.Linear(4, 3))
    held = average(model)
    (said,) = told(model, scaling="paper")
    assert f"a {type(held).__name__} holds a copy of such a Sequential without gates" in said
    surgeon.remove(model)
    (said,) = told(model, scaling="paper", keep_eval=True)
    surgeon.remove(model)
    assert told(model) == []  # nothing is missing under the default scaling


def test_other_averages_are_none_of_this_model() -> None:
    model = nn.Sequential(Plain(), nn.Linear(4, 2))
    held = torch.optim.swa_utils.AveragedModel(nn.Sequential(Plain(), Plain(), nn.Linear(4, 2)))
    assert told(model, scaling="paper") == []
    assert held.module is not model


def test_an_average_made_after_the_gates_evaluates_with_them() -> None:
    model = nn.Sequential(Plain(), nn.Linear(4, 5))
    assert told(model, scaling="paper") == []
    held = torch.optim.swa_utils.AveragedModel(model).eval()
    assert torch.equal(held(X), model.eval()(X))
