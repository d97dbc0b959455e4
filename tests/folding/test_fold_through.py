"""Folds into what is no parameter as such: functions of them, running means, rows that alone are read."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from blocks import Of
from folds import SCALE, Gated, difference, folds, image, randomised, scaled, tokens
from test_fold_sharing import Parts, rows
from torch import Tensor, nn

import surgeon
from surgeon._folding.fold import Product, commit, plan
from surgeon._gating.gated import gates_of
from surgeon.errors import FoldError

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
}


def beside(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A learnt step from the input towards its image: the branch holds the shortcut itself."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return function(block.alpha).view(1, -1) * (block.fc(x).relu() - x)  # type: ignore[operator, arg-type]

    return forward


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_of_a_parameter_takes_the_scale(function: str) -> None:
    model = randomised(Gated(Of(beside(FUNCTIONS[function]), fc=nn.Linear(8, 8), alpha=torch.ones(8))))
    made = folds(model, tokens())
    assert made.products == (Product("branch.alpha", "0", 1, through=function),)
    assert str(made).splitlines()[1] == f"gate 0: {function}(branch.alpha) *= scale"


def test_a_gated_linear_unit_takes_it_in_its_first_half() -> None:
    """As if it were written out: the half that the sigmoid reads stays."""
    spelt = (F.glu, lambda y: (h := y.chunk(2, -1))[0] * h[1].sigmoid())
    made = []
    for glu in spelt:
        model = randomised(Gated(Of(lambda m, x, glu=glu: glu(m.fc(x)), fc=nn.Linear(8, 16))))
        made.append(folds(model, tokens()).products)
    assert made[0] == made[1]
    assert {(one.parameter, one.exponent) for one in made[0]} == {
        ("branch.fc.weight", 1),
        ("branch.fc.bias", 1),
    }


def test_a_factor_on_the_parameter_itself_is_seen() -> None:
    model = randomised(Gated(Of(beside(torch.sigmoid), fc=nn.Linear(8, 8), alpha=torch.ones(8))))
    x, wrong = tokens(), copy.deepcopy(model)
    wrong.branch.alpha.data.mul_(SCALE)
    with torch.no_grad():
        scaled(model, {"0": SCALE})
        scaled(wrong, {})
        assert difference(wrong(x), model(x)) > 1e-3


def test_a_layer_takes_it_first() -> None:
    """A product is exact for any scale; a function may leave its range."""
    model = randomised(
        Gated(Of(lambda m, x: m.alpha.sigmoid() * m.fc(x), fc=nn.Linear(8, 8), alpha=torch.ones(8)))
    )
    assert {step.parameter for step in folds(model, tokens()).products} == {
        "branch.fc.weight",
        "branch.fc.bias",
    }


def test_a_parameter_read_elsewhere_too_stays() -> None:
    model = randomised(
        Gated(
            Of(
                lambda m, x: m.alpha.sigmoid() * (m.fc(x).relu() - x) * m.alpha.cos(),
                fc=nn.Linear(8, 8),
                alpha=torch.ones(8),
            )
        )
    )
    made = folds(model, tokens())
    assert len(made.kept) == 1


def test_rows_of_a_table_under_a_function() -> None:
    def table(block: nn.Module, x: Tensor) -> Tensor:
        alpha = torch.sigmoid(block.table).view(3, -1, 1, 1)
        for row in range(3):
            branch = alpha[row] * (block.conv(x) - x)
            x = x + (block.gated(branch) if row == 1 else branch)
        return x

    model = randomised(Parts(table, conv=nn.Conv2d(4, 4, 1), table=torch.ones(3, 4)))
    made = folds(model, image())
    assert rows(made) == {"table": ((1, 2), 0, 1)}
    assert str(made.products[0]) == "gate 0: sigmoid(table[1:2]) *= scale"


def test_a_value_out_of_range_changes_nothing() -> None:
    model = randomised(Gated(Of(beside(torch.sigmoid), fc=nn.Linear(8, 8), alpha=torch.ones(8))))
    nn.init.constant_(model.branch.alpha, 3.0)
    made = plan(model, (tokens(),), {}, {"0": SCALE})
    before = model.branch.alpha.clone()
    with pytest.raises(FoldError, match=r"no finite value of the parameter 'branch\.alpha' takes the scale"):
        commit(model, made, {"0": 1 / SCALE})
    assert torch.equal(model.branch.alpha, before)
    commit(model, made, {"0": SCALE})
    commit(model, made, {"0": 1 / SCALE})
    torch.testing.assert_close(model.branch.alpha, before, rtol=1e-14, atol=0)


def cheap(block: nn.Module, x: Tensor) -> Tensor:
    """A ghost module whose cheap path is a norm alone."""
    first = block.conv(x).relu()  # type: ignore[operator]
    return torch.cat([first, block.bn(first) + block.dw(first)], dim=1)  # type: ignore[operator]


def _cheap(**norm: bool) -> nn.Module:
    return randomised(
        Gated(
            Of(
                cheap,
                conv=nn.Conv2d(4, 2, 1),
                bn=nn.BatchNorm2d(2, **norm),
                dw=nn.Conv2d(2, 2, 1, bias=False),
            )
        )
    )


def test_a_norm_hands_a_scale_on_when_its_running_mean_takes_it_too() -> None:
    made = folds(_cheap(), image())
    assert {step.parameter.removeprefix("branch."): step.exponent for step in made.products} == {
        "conv.weight": 1,
        "conv.bias": 1,
        "bn.running_mean": 1,
        "bn.bias": 1,
    }
    assert folds(_cheap(affine=False), image()).products != ()


def test_a_running_mean_left_alone_is_seen() -> None:
    model, x = _cheap(), image()
    made = plan(model, (x,), {}, {"0": SCALE})
    steps = tuple(step for step in made.products if not step.parameter.endswith("running_mean"))
    with torch.no_grad():
        scaled(model, {"0": SCALE})
        expected = model(x)
        scaled(model, {})
        commit(model, dataclasses.replace(made, products=steps), {"0": SCALE})
        assert difference(model(x), expected) > 1e-3


def test_a_norm_by_the_statistics_of_the_batch_hands_nothing_on() -> None:
    [kept] = folds(_cheap(track_running_stats=False), image()).kept
    assert (kept.operator, kept.module) == ("batch_norm", "branch.bn")
    assert kept.reason.endswith("which normalises what it reads")


def test_a_running_mean_with_another_reader_stays() -> None:
    model = _cheap()
    model.branch.function = lambda m, x: cheap(m, x) + m.bn.running_mean.sum()
    assert len(folds(model, image()).kept) == 1


def test_tokens_that_nobody_reads_may_be_scaled() -> None:
    """Class attention: the patch tokens are handed on, doubled, and of the last block only one is read."""

    def last(block: nn.Module, x: Tensor) -> Tensor:
        branch = torch.cat([block.gamma * block.fc(x[:, :1]), x[:, 1:]], dim=1)
        return block.norm(x + block.gated(branch))[:, 0]

    parts = {"fc": nn.Linear(8, 8), "gamma": torch.ones(8), "norm": nn.LayerNorm(8)}
    assert rows(folds(randomised(Parts(last, **parts)), tokens())) == {"gamma": (None, 0, 1)}

    def read(block: nn.Module, x: Tensor) -> Tensor:
        branch = torch.cat([block.gamma * block.fc(x[:, :1]), x[:, 1:]], dim=1)
        return block.norm(x + block.gated(branch))[:, :2]

    assert len(folds(randomised(Parts(read, **parts)), tokens()).kept) == 1


@pytest.mark.slow
@torch.no_grad()
def test_efficientvim_has_nothing_left() -> None:
    torch.manual_seed(0)
    model = timm.create_model("efficientvim_m1", num_classes=10).double().eval()
    for name, value in model.state_dict().items():
        if name.endswith(("alpha", "bn.weight", "norm.weight")):
            value.normal_(std=0.5)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    surgeon.apply(model, scaling="paper", example=x)
    folded = surgeon.fold(model)
    assert not gates_of(folded)
    assert difference(folded(x), model(x)) < 1e-12
    assert difference(surgeon.remove(model)(x), folded(x)) > 1e-3
