"""Folds where a weight is made of others: parametrisations, old and new, and quantised layers."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from folds import SCALE, Gated, exponents, folds, randomised, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from surgeon._folding.fold import commit, plan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao.quantization import quantize_dynamic


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Sine(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.sin()


def made_by(parametrisation: nn.Module) -> nn.Module:
    layer = nn.Linear(8, 8, bias=False)
    parametrize.register_parametrization(layer, "weight", parametrisation)
    return layer


def behind_a_norm(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), layer)


NORM = {"0.weight": 1, "0.bias": 1}

TAKES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
        {"parametrizations.weight.original0": 1, "bias": 1},
    ),
    "weight norm of old": (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), {"weight_g": 1, "bias": 1}),
    "symmetric": (lambda: made_by(Symmetric()), {"parametrizations.weight.original": 1}),
    "spectral norm": (
        lambda: behind_a_norm(parametrizations.spectral_norm(nn.Linear(8, 8, bias=False))),
        NORM,
    ),
    "spectral norm of old": (
        lambda: behind_a_norm(nn.utils.spectral_norm(nn.Linear(8, 8, bias=False))),
        NORM,
    ),
    "orthogonal": (
        lambda: behind_a_norm(parametrizations.orthogonal(nn.Linear(8, 8, bias=False))),
        NORM,
    ),
}


@pytest.mark.parametrize("kind", TAKES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_parametrised_layer(kind: str) -> None:
    make, expected = TAKES[kind]
    model = Gated(make()).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "0.weight")):
            nn.init.normal_(parameter)
    assert exponents(folds(model, tokens())) == expected


@pytest.mark.parametrize("parametrisation", [Sine, parametrizations._Orthogonal])
def test_a_weight_that_cannot_be_scaled_is_refused(parametrisation: type[nn.Module]) -> None:
    layer = (
        made_by(Sine())
        if parametrisation is Sine
        else parametrizations.orthogonal(nn.Linear(8, 8, bias=False))
    )
    made = folds(Gated(layer).double().eval(), tokens())
    assert not made.products
    assert len(made.kept) == 1


def test_a_parametrisation_stays_one_after_the_fold() -> None:
    model = randomised(Gated(parametrizations.weight_norm(nn.Linear(8, 8))))
    twin = copy.deepcopy(model)
    commit(twin, plan(model, (tokens(),), {}, {"0": SCALE}), {"0": SCALE})
    assert parametrize.is_parametrized(twin.branch, "weight")
    assert list(twin.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(twin.branch.weight, SCALE * model.branch.weight)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_refused() -> None:
    branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = quantize_dynamic(Gated(branch).eval(), {nn.Linear})
    made = plan(model, (tokens().float(),), {}, {"0": SCALE})
    assert made.products == ()
    assert made.kept[0].operator == "quantized.linear_dynamic"


def test_weights_kept_as_integers_stay_and_their_scales_fold() -> None:
    class Integers(nn.Module):
        """Weights of 8 bits and a step per row, as weight-only quantisation stores them."""

        def __init__(self, learnt: bool) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(-127, 127, (8, 8), dtype=torch.int8))
            step = torch.rand(8, 1, dtype=torch.float64) + 0.5
            if learnt:
                self.step = nn.Parameter(step)
            else:
                self.register_buffer("step", step)

        def forward(self, x: Tensor) -> Tensor:
            return x.relu() @ (self.weight * self.step).T

    assert exponents(folds(Gated(Integers(learnt=True)).double(), tokens())) == {"step": 1}
    made = folds(Gated(Integers(learnt=False)).double(), tokens())
    assert made.products == ()
