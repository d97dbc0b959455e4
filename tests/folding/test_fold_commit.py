"""The plan changes nothing; the commit changes what the plan says, or nothing."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from blocks import Of
from folds import (
    SCALE,
    Gated,
    SqueezeExcite,
    difference,
    exponents,
    folds,
    image,
    randomised,
    scaled,
    tokens,
    weights,
)
from torch import Tensor, nn

from surgeon._folding.fold import FoldPlan, Kept, Product, commit, plan
from surgeon.errors import FoldError

# The plan changes nothing.


class Caching(nn.Module):
    """Keeps what it saw, in every place a module may."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.cache: dict[str, object] = {"old": 1, "deep": {"list": [1]}}
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x + torch.rand(()) + random.random())  # noqa: S311
        self.cache["new"] = y
        self.cache["deep"]["list"].append(y)  # type: ignore[index]
        self.seen.append(y)
        self.last = y
        return y

    def train(self, mode: bool = True) -> "Caching":
        raise AssertionError("an overridden train() is not to be called")


def test_the_plan_leaves_everything_as_it_was() -> None:
    model = Gated(nn.Sequential(Caching(), nn.BatchNorm1d(5), nn.Dropout()))
    object.__setattr__(model.branch[1], "training", False)  # type: ignore[index]
    state = {name: (id(t), t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    flags = [module.training for module in model.modules()]
    attributes = [{k: id(v) for k, v in vars(module).items()} for module in model.modules()]
    plain, python = torch.get_rng_state(), random.getstate()
    fast = torch.backends.mha.get_fastpath_enabled()
    made = plan(model, (torch.randn(2, 5, 8),), {}, {"0": SCALE})
    torch.set_rng_state(plain)  # the example itself was drawn after the state was taken
    assert made.products
    after = model.state_dict(keep_vars=True)
    for name, (identity, value, version) in state.items():
        assert (id(after[name]), after[name]._version) == (identity, version)
        assert torch.equal(after[name], value)
    assert [module.training for module in model.modules()] == flags
    assert [{k: id(v) for k, v in vars(module).items()} for module in model.modules()] == attributes
    caching = model.branch[0]  # type: ignore[index]
    assert caching.cache == {"old": 1, "deep": {"list": [1]}}
    assert (caching.seen, caching.last) == ([], None)
    assert random.getstate() == python
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_the_plan_leaves_the_random_state_alone() -> None:
    model, x = Gated(Caching()), torch.randn(2, 5, 8)
    before = torch.get_rng_state()
    plan(model, (x,), {}, {"0": SCALE})
    assert torch.equal(torch.get_rng_state(), before)


def test_the_plan_is_the_same_in_training_mode() -> None:
    model, x = Gated(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5))), tokens().float()
    assert plan(model.train(), (x,), {}, {"0": SCALE}) == plan(model.eval(), (x,), {}, {"0": SCALE})


def test_keyword_arguments_and_frozen_parameters() -> None:
    model = randomised(Gated(nn.Linear(8, 8))).requires_grad_(requires_grad=False)
    assert exponents(plan(model, (), {"x": tokens()}, {"0": SCALE})) == {"weight": 1, "bias": 1}


# The commit.


def test_the_commit_keeps_the_parameters() -> None:
    model = Gated(nn.Linear(8, 8))
    before = [(id(p), p.clone(), p.requires_grad) for p in model.parameters()]
    commit(model, plan(model, (tokens().float(),), {}, {"0": SCALE}), {"0": SCALE})
    for (identity, value, grad), parameter in zip(before, model.parameters(), strict=True):
        assert (id(parameter), parameter.requires_grad) == (identity, grad)
        assert torch.equal(parameter, (value.double() * SCALE).float())  # rounded once


def test_the_inverse_scales_undo_the_fold() -> None:
    model, x = (
        randomised(Gated(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), SqueezeExcite(4)))),
        image(),
    )
    made = plan(model, (x,), {}, {"0": SCALE})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    commit(model, made, {"0": 1 / SCALE})
    assert not torch.equal(model.state_dict()["branch.1.weight"], before["branch.1.weight"])
    commit(model, made, {"0": SCALE})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("damage", "dtype", "scale", "message"),
    [
        (float("nan"), torch.float32, 0.5, "'branch.bias' holds NaN or infinite values"),
        (float("inf"), torch.float32, 0.5, "'branch.bias' holds NaN or infinite values"),
        (3e38, torch.float32, 2.0, "'branch.bias' overflows torch.float32"),
        (6e4, torch.float16, 2.0, "'branch.bias' overflows torch.float16"),
        (1e-45, torch.float32, 0.3, "'branch.bias' underflows torch.float32"),
        (1e-6, torch.float16, 0.77, "'branch.bias' underflows torch.float16"),
    ],
)
def test_a_commit_that_fails_changes_nothing(
    damage: float, dtype: torch.dtype, scale: float, message: str
) -> None:
    model = Gated(nn.Linear(8, 8))
    made = plan(model, (tokens().float(),), {}, {"0": scale})
    model.to(dtype)
    nn.init.constant_(model.branch.bias, damage)  # type: ignore[arg-type, union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FoldError, match=message):
        commit(model, made, {"0": scale})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_single_weights_may_vanish_beside_larger_ones() -> None:
    model = Gated(nn.Linear(8, 8))
    made = plan(model, (tokens().float(),), {}, {"0": 0.3})
    model.branch.weight.data[0, 0] = 1e-45  # type: ignore[union-attr, index]
    commit(model, made, {"0": 0.3})
    assert model.branch.weight[0, 0] == 0  # type: ignore[union-attr, index]


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_must_be_positive(scale: float) -> None:
    model = Gated(nn.Linear(8, 8))
    made = plan(model, (tokens().float(),), {}, {"0": SCALE})
    with pytest.raises(FoldError, match="only a finite scale above 0 can be folded"):
        plan(model, (tokens().float(),), {}, {"0": scale})
    with pytest.raises(FoldError, match="only a finite scale above 0 can be folded"):
        commit(model, made, {"0": scale})
    with pytest.raises(FoldError, match="no scale was given"):
        commit(model, made, {})


def test_a_plan_for_another_model_is_refused() -> None:
    made = FoldPlan((Product("branch.weight", "0", 1), Product("elsewhere.weight", "0", 1)), ())
    model = Gated(nn.Linear(8, 8))
    before = model.branch.weight.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(FoldError, match=r"no parameter 'elsewhere\.weight'"):
        commit(model, made, {"0": 0.5})
    assert torch.equal(model.branch.weight, before)  # type: ignore[arg-type]


def test_meta_parameters_are_planned_but_not_written() -> None:
    model = Gated(nn.Linear(8, 8)).to("meta")
    made = plan(model, (torch.randn(2, 5, 8, device="meta"),), {}, {"0": SCALE})
    assert len(made.products) == 2
    with pytest.raises(FoldError, match="on the meta device"):
        commit(model, made, {"0": SCALE})


def test_a_model_that_cannot_run_is_an_error() -> None:
    with pytest.raises(FoldError, match="could not run in evaluation mode"):
        plan(Gated(nn.Linear(8, 8)), (torch.randn(2, 5),), {}, {"0": SCALE})


class Asking(nn.Module):
    """Looks at its input around its block, as detectors do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum().item() > 0 else x  # type: ignore[no-any-return]


def test_a_forward_that_asks_for_a_value_runs_on_real_tensors() -> None:
    model, x = randomised(Asking(Gated(nn.Linear(8, 8)))), tokens().abs()
    before = {name: (value.clone(), value._version) for name, value in model.state_dict().items()}
    made = plan(model, (x,), {}, {"0": SCALE})
    assert exponents(made) == {"block.branch.weight": 1, "block.branch.bias": 1}
    assert plan(model, (-x,), {}, {"0": SCALE}).kept == (Kept("0", "the model's forward did not pass it"),)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value._version == before[name][1]
    with pytest.raises(FoldError, match="neither on fake tensors nor on real ones"):
        plan(model, (x.to("meta"),), {}, {"0": SCALE})


class Masked(Gated):
    """Looks into its mask only where that has numbers in it, as language models do."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        assert isinstance(mask, torch._subclasses.FakeTensor) == (self.scale is None)
        if isinstance(mask, torch._subclasses.FakeTensor) or not mask.all():
            x = x.masked_fill(~mask[..., None], 0.0)
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_a_mask_is_seen_to_be_fake(dtype: torch.dtype) -> None:
    model = randomised(Masked(nn.Linear(8, 8)))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    if dtype != torch.bool:
        model.forward = lambda x, mask: Masked.forward(model, x, mask != 0)  # type: ignore[assignment, method-assign]
    made = plan(model, (tokens(), mask.to(dtype)), {}, {"0": SCALE})
    assert exponents(made) == {"weight": 1, "bias": 1}


def test_a_plan_prints_well() -> None:
    steps = (
        Product("a.weight", "0", 1),
        Product("b.weight", "0", -1),
        Product("table", "1", 1, rows=(2, 3)),
        Product("w", "1", 1, (0, 4), 1),
    )
    made = FoldPlan(steps, (Kept("2", "the branch ends in silu, which does not commute with a scale"),))
    assert str(made).splitlines() == [
        "2 gates fold into 4 parameters, 1 keep a factor",
        "gate 0: a.weight *= scale",
        "gate 0: b.weight *= scale ** -1",
        "gate 1: table[2:3] *= scale",
        "gate 1: w[:, 0:4] *= scale",
        "gate 2: kept, the branch ends in silu, which does not commute with a scale",
    ]


def test_parameters_over_one_memory_are_all_written() -> None:
    """A copy of the model has them taken apart; in place there is one memory, to be written once."""
    model = nn.Sequential(Gated(nn.Linear(8, 8)), nn.Linear(8, 8))
    randomised(model)
    model[1].weight = nn.Parameter(model[0].branch.weight.data)
    pair = {"one": nn.Linear(8, 8), "other": nn.Linear(8, 8)}
    twice = randomised(nn.Sequential(Gated(Of(lambda held, x: held.one(x) + held.other(x), **pair))))
    pair["other"].weight = nn.Parameter(pair["one"].weight.data)
    x = tokens()
    assert folds(model, x).kept  # the second use is outside of the branch
    made = folds(twice, x)
    assert not made.kept
    (step,) = [step for step in made.products if step.parameter.endswith("weight")]
    assert step.also == ("0.branch.other.weight",)
    expected = _scaled_by(twice, SCALE, x)
    commit(twice, made, {"0": SCALE})
    assert difference(_scaled_by(twice, 1.0, x), expected) < 1e-12


@torch.no_grad()
def _scaled_by(model: nn.Module, scale: float, x: Tensor) -> Tensor:
    scaled(model, {"0": scale})
    result: Tensor = model(x)
    scaled(model, None)
    return result


def test_a_parameter_that_repeats_a_number_is_not_written() -> None:
    gained = Of(lambda held, x: F.relu(held.first(x)) * held.gain, first=nn.Linear(8, 8), gain=torch.ones(8))
    model = randomised(Gated(gained))
    made = folds(model, tokens())
    assert exponents(made) == {"gain": 1}
    model.branch.gain = nn.Parameter(torch.full((1,), 0.7, dtype=torch.float64).expand(8))
    assert exponents(folds(model, tokens())) == weights("first")
    both = FoldPlan((Product("branch.first.bias", "0", 1), *made.products), ())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FoldError, match="one number in memory"):
        commit(model, both, {"0": SCALE})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
