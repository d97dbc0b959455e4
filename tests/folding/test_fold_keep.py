"""``keep_eval=True``: evaluation stays under the paper's rule, and a fold gives the weights back."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from blocks import Branch, Pair, Plain, coins, randomise, same
from folds import made_anew, zoo_randomised
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import surgeon
from surgeon import _scales
from surgeon._folding.fold import FoldPlan
from surgeon._gating.gated import gates_of, placed_gates
from surgeon.errors import CheckpointError, FoldError, NotGatedError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

State = dict[str, Tensor]


class Chain(nn.Sequential):
    """Three gates in two blocks, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__(Plain(), nn.Linear(4, 4), Pair())


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-300))


def weights(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def distance(one: State, other: State) -> float:
    assert list(one) == list(other)
    return max(error(value, other[name]) for name, value in one.items() if value.is_floating_point())


def kept(model: nn.Module, x: Tensor, **arguments: Any) -> nn.Module:
    return surgeon.apply(model, scaling="paper", keep_eval=True, example=x, **arguments)


# The round trip.

MODELS = {
    "timm:seresnet18": 64,
    "timm:test_byobnet": 64,
    "timm:test_nfnet": 96,
    "timm:test_convnext": 64,
    "torchvision:resnet18": 64,
}
SLOW = {
    "timm:test_vit2": 160,
    "timm:ghostnet_050": 64,
    "timm:resnetv2_18": 64,
    "timm:swin_tiny_patch4_window7_224": 56,
    "torchvision:mobilenet_v2": 64,
}


@pytest.mark.parametrize(
    ("name", "size"),
    [*MODELS.items(), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW.items())],
)
@torch.no_grad()
def test_a_fold_gives_back_what_keeping_evaluation_divided(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = zoo_randomised(made_anew(name.removeprefix("timm:"), size))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    before, expected, names = weights(model), model(x), list(model.state_dict())
    kept(model, x)
    assert error(model(x), expected) < 1e-12
    for placed in placed_gates(model):  # no gate is without effect
        gate = placed.gate
        scale, gate.scale = gate.scale, 1.0
        assert error(model(x), expected) > 1e-11, f"{placed.name} shows nothing"
        gate.scale = scale
    stock = surgeon.fold(model)
    assert list(stock.state_dict()) == names
    assert distance(weights(stock), before) < 1e-12
    assert error(stock(x), expected) < 1e-12
    assert weights(model).keys() > before.keys()  # the fold was done in a copy
    surgeon.remove(model)
    assert distance(weights(model), before) < 1e-12
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


@torch.no_grad()
def test_without_it_evaluation_jumps() -> None:
    model = randomise(Chain()).eval()
    before, expected = weights(model), model(X)
    surgeon.apply(model, scaling="paper", example=X)
    assert error(model(X), expected) > 1e-3
    assert same(weights(model), before)


@pytest.mark.parametrize("damage", ["one step missing", "the other way", "one step twice"])
@torch.no_grad()
def test_a_division_done_wrong_is_seen(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = _scales.commit

    def wrong(model: nn.Module, plan: FoldPlan, scales: dict[str, float]) -> None:
        if damage == "the other way":
            return commit(model, plan, {gate: 1 / scale for gate, scale in scales.items()})
        steps = plan.products[1:] if damage == "one step missing" else (*plan.products, plan.products[0])
        return commit(model, FoldPlan(steps, plan.kept, plan.together), scales)

    monkeypatch.setattr(_scales, "commit", wrong)
    model = randomise(Chain()).double().eval()
    expected = model(X.double())
    kept(model, X.double())
    assert error(model(X.double()), expected) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_rounding_is_that_of_the_weights(dtype: torch.dtype) -> None:
    model, x = randomise(Chain()).to(dtype), X.to(dtype)
    before, expected = weights(model), model.eval()(x)
    kept(model, x)
    eps = torch.finfo(dtype).eps
    assert error(model(x), expected) < 8 * eps
    surgeon.remove(model)
    assert 0 <= distance(weights(model), before) <= 2 * eps


# What else a gated model does.


def test_training_starts_as_with_the_other_scaling() -> None:
    """A surviving branch is ``branch / p`` under both; the paper's rule has the 1 / p in the weights."""
    model, other = randomise(Chain()).double(), randomise(Chain()).double()
    kept(model, X.double(), unit="batch")
    surgeon.apply(other, unit="batch", example=X.double())
    for fate in (True, False, {"0.add": True, "2.add": False, "2.add_1": True}):
        with coins(fate):
            torch.testing.assert_close(model.train()(X.double()), other.train()(X.double()))


def test_evaluation_stays_while_the_drop_rate_changes() -> None:
    model = kept(randomise(Chain()), X).eval()
    expected = model(X)
    surgeon.set_drop_rate(model, 0.1)
    assert torch.equal(model(X), expected)
    with pytest.warns(UserWarning, match="the ramp ends at the drop rate 0.3, but under scaling='paper'"):
        ramp = surgeon.Ramp(model, 0.3, steps=2)
    assert torch.equal(model(X), expected)
    ramp.step()
    assert torch.equal(model(X), expected)
    torch.testing.assert_close(surgeon.fold(model)(X), expected)


def test_the_status_says_so() -> None:
    model = kept(randomise(Chain()), X)
    status = surgeon.status(model)
    assert all(gate.keep_eval and gate.scaling == "paper" for gate in status.gates)
    assert "paper, weights divided to keep evaluation" in str(status)
    surgeon.remove(model)
    assert "weights divided" not in str(surgeon.status(surgeon.apply(model, scaling="paper", example=X)))


def test_the_default_scaling_keeps_evaluation_anyway() -> None:
    model = randomise(Chain()).eval()
    before, expected = weights(model), model(X)
    surgeon.apply(model, keep_eval=True, example=X)
    assert same(weights(model), before)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("keep_eval", [True, False])
def test_a_model_fresh_from_a_pickle_folds(keep_eval: bool) -> None:
    """Its blocks have no evaluating forward yet."""
    model = randomise(Chain()).double()
    surgeon.apply(model, scaling="paper", keep_eval=keep_eval, example=X.double())
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301
    folded = surgeon.fold(twin)
    assert [type(m) for m in folded.modules()] == [type(m) for m in randomise(Chain()).modules()]
    torch.testing.assert_close(folded.eval()(X.double()), model.eval()(X.double()), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(twin.eval()(X.double()), model(X.double()), rtol=1e-12, atol=1e-14)


class Caches(nn.Module):
    """In evaluation alone it hands a cache down, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Cached()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, None if self.training else [])


class Cached(Branch):
    def forward(self, x: Tensor, cache: list[Tensor] | None) -> Tensor:
        y = self.f(x)
        return x + (2 * y if cache is not None else y)


def test_evaluation_may_call_a_block_in_a_way_that_training_does_not() -> None:
    model = surgeon.apply(randomise(Caches()), scaling="paper", example=X)
    folded = surgeon.fold(model)
    torch.testing.assert_close(folded.eval()(X), model.eval()(X))


def test_after_training_a_removal_keeps_evaluation_too() -> None:
    model = kept(randomise(Chain()).double(), X.double())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model.eval()(X.double())
    surgeon.remove(model)
    with pytest.raises(NotGatedError):
        surgeon.status(model)
    torch.testing.assert_close(model(X.double()), expected, rtol=1e-13, atol=0)


# What it refuses.


class Ending(nn.Module):
    """A branch that ends in SiLU, beside one that folds."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Sequential(nn.Linear(4, 4), nn.SiLU()), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x.relu())


def test_a_gate_that_no_weight_can_take_is_named_and_nothing_changes() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 4), Ending()))
    before, kinds = weights(model), [type(module) for module in model.modules()]
    with pytest.raises(
        FoldError, match=r"1 of 2 gates \(1\.add: the branch ends in silu in '1\.f\.1'"
    ) as caught:
        kept(model, X)
    assert "exclude=['1.add']" in str(caught.value)
    assert "scaling='inverted'" in str(caught.value)
    assert same(weights(model), before)
    assert [type(module) for module in model.modules()] == kinds
    expected = model.eval()(X)
    kept(model, X, exclude=["1.add"])
    torch.testing.assert_close(model(X), expected)


def test_what_a_fold_leaves_is_data() -> None:
    model = surgeon.apply(randomise(nn.Sequential(nn.Linear(4, 4), Ending())), scaling="paper", example=X)
    with pytest.warns(
        UserWarning, match=r"1 of 2 gates keep one multiplication: 1\.add: the branch ends in silu"
    ):
        left = surgeon.fold(model)
    [gate] = surgeon.status(left).gates
    assert (gate.name, gate.block_type, gate.obstacle) == ("1.add", "Ending", "silu")
    assert gate.note == "the branch ends in silu in '1.f.1', which does not commute with a scale"


def test_a_fold_ends_the_part_of_every_gate_in_training() -> None:
    model = surgeon.apply(randomise(nn.Sequential(Plain(), Ending())), scaling="paper", example=X)
    with pytest.warns(UserWarning, match="1 of 3 gates keep one multiplication"):
        left = surgeon.fold(model)
    expected = left.eval()(X)
    assert [gate.name for gate in surgeon.status(left).gates] == ["1.add"]
    for rate in (0.5, [0.5], lambda l, count: 0.5):
        with pytest.raises(NotGatedError, match="the model is folded"):
            surgeon.set_drop_rate(left, rate)  # type: ignore[arg-type]
    torch.testing.assert_close(left.train()(X), expected, rtol=0, atol=0)
    surgeon.set_drop_rate(model, 0.4)
    assert [gate.drop_rate for gate in gates_of(model)] == pytest.approx([0.2, 0.4, 0.4])


def test_a_part_that_is_folded_leaves_the_other_gates_alone() -> None:
    model = surgeon.apply(randomise(nn.Sequential(Ending(), Plain())), scaling="paper", example=X)
    with pytest.warns(UserWarning, match="keep one multiplication"):
        surgeon.fold(model[0], inplace=True, example=X)
    surgeon.set_drop_rate(model, 0.4)
    assert [gate.drop_rate for gate in gates_of(model)] == [0.0, 0.4]


def test_a_branch_that_takes_no_scale_any_more_is_not_removed() -> None:
    model = kept(randomise(Chain()), X)
    model[2].g.append(nn.SiLU())  # type: ignore[union-attr, operator]
    before, kinds, expected = weights(model), [type(m) for m in model.modules()], model.eval()(X)
    with pytest.raises(
        FoldError, match=r"cannot be removed: .* of 1 of 3 any more \(2\.add_1: the branch ends"
    ):
        surgeon.remove(model)
    assert same(weights(model), before)
    assert [type(m) for m in model.modules()] == kinds
    assert same(model(X), expected)
    with pytest.warns(UserWarning, match="1 of 3 gates keep one multiplication") as told:
        left = surgeon.fold(model)
    assert told[0].filename == __file__
    torch.testing.assert_close(left(X), expected)


def test_a_quotient_that_overflows_changes_nothing() -> None:
    model = randomise(Chain())
    nn.init.constant_(model[2].g[1].bias, 3e38)  # type: ignore[arg-type, union-attr, index]
    before = weights(model)
    with pytest.raises(FoldError, match=r"overflows torch\.float32"):
        kept(model, X)
    assert same(weights(model), before)
    with pytest.raises(NotGatedError):
        surgeon.status(model)


class Counting(Ending):
    def get_extra_state(self) -> Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        self.count = state


def test_a_block_with_an_extra_state_of_its_own_is_refused() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 4), Counting()))
    with pytest.raises(FoldError, match="Counting has an extra state of its own"):
        kept(model, X, exclude=["1.add"])


# Its state dict is not a stock one.


def test_the_keys_are_stock_but_for_the_scales() -> None:
    model = randomise(Chain())
    names = list(model.state_dict())
    kept(model, X, schedule="uniform", drop_rate=0.25)
    extra = [name for name in model.state_dict() if name not in names]
    assert extra == ["0._extra_state", "2._extra_state"]
    assert model.state_dict()["2._extra_state"].tolist() == [[0, 0.75], [1, 0.75]]


@pytest.mark.parametrize("strict", [True, False])
def test_stock_weights_do_not_go_in(strict: bool) -> None:
    model, stock = kept(randomise(Chain()), X), randomise(Chain(), 1)
    with pytest.raises(CheckpointError, match=r"0: these weights are not from .* surgeon\.load\("):
        model.load_state_dict(stock.state_dict(), strict=strict)


def test_weights_beside_the_gates_go_in() -> None:
    model = kept(randomise(Chain()), X)
    part = {"1.weight": torch.zeros(4, 4)}
    model.load_state_dict(part, strict=False)
    assert not model[1].weight.any()  # type: ignore[union-attr, index, operator]


def test_divided_weights_do_not_go_into_a_stock_model() -> None:
    model, stock = kept(randomise(Chain()), X), randomise(Chain(), 1)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0\._extra_state"'):
        stock.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0\._extra_state"'):
        surgeon.apply(stock, scaling="paper", example=X).load_state_dict(model.state_dict())


def test_weights_divided_by_other_scales_do_not_go_in() -> None:
    model, other = kept(randomise(Chain()), X), kept(randomise(Chain()), X, drop_rate=0.4)
    with pytest.raises(CheckpointError, match=r"0: .* evaluation scales 0\.8, the model's are 0\.75"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match=r"0: .* divided by the scales 0\.8, the model's are 0\.75"):
        model.load_state_dict(dict(other.state_dict()))


def _plain(state: State) -> State:
    return state


def _saved(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


def _safe(state: State) -> State:
    return safetensors.torch.load(safetensors.torch.save(state))


def _halved(state: State) -> State:
    return {name: value.half() for name, value in state.items()}


@pytest.mark.parametrize("way", [_plain, _saved, _safe, _halved])
def test_a_model_gated_alike_takes_them(way: Callable[[State], State]) -> None:
    model, other = kept(randomise(Chain()), X), kept(randomise(Chain(), 1), X)
    other.load_state_dict(way(model.state_dict()))
    rough = 1e-2 if way is _halved else 0.0
    torch.testing.assert_close(other.eval()(X), model.eval()(X), rtol=rough, atol=rough)


def test_copies_pickles_and_averages_carry_the_scales() -> None:
    model = kept(randomise(Chain()), X).eval()
    expected, state = model(X), weights(model)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301
        ModelEmaV2(model).module,
        ModelEmaV3(model).module,
    ):
        assert same(weights(twin), state)
        assert torch.equal(twin(X), expected)
        twin.load_state_dict(state)
        torch.testing.assert_close(surgeon.fold(twin)(X), expected)
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(model)
    assert same(weights(ema.module), state)


def test_a_distributed_checkpoint_takes_the_scales_along() -> None:
    model, other = kept(randomise(Chain()), X), kept(randomise(Chain(), 1), X)
    state = get_model_state_dict(model)
    assert state["2._extra_state"].shape == (2, 2)
    set_model_state_dict(other, state)
    assert same(weights(other), weights(model))


class Stack(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_a_slice_of_a_gated_sequential_has_no_scales() -> None:
    model = kept(nn.Sequential(nn.Linear(4, 4), Stack(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))), X)
    assert len(surgeon.status(model).gates) == 1
    part = model[1][:2]  # type: ignore[index]
    assert part.state_dict()["_extra_state"].numel() == 0
    part.load_state_dict(part.state_dict())
    assert same(part(X), (X + model[1][0](X).relu()))  # type: ignore[index, operator]
