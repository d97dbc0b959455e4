"""Gates that skip under what builds on autograd: `torch.func`, second derivatives, autocast; and no rows."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from blocks import Plain, coins, randomise
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import surgeon

# PyTorch's own rules for forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
SKIPPING: list[dict[str, Any]] = [{"unit": "batch"}, {"unit": "batch", "unused": "zero"}, {"skip": True}]


def network() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(4, 4), Plain(), Plain(), nn.Linear(4, 3))).double()


def gated(**options: Any) -> nn.Module:
    return surgeon.apply(network(), "uniform", drop_rate=0.5, example=X, **options)


def twice(model: nn.Module) -> Tensor:
    """The gradient of a gradient penalty by the input."""
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return second


def by_weights(model: nn.Module) -> Tensor:
    model[0].requires_grad_(False)  # type: ignore[index]
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = grad(lambda w: functional_call(model, w, (X,)).square().sum())(weights)
    return torch.cat([value.flatten() for value in found.values()])


def forward_mode(model: nn.Module) -> Tensor:
    tangent: Tensor = jvp(model, (X,), (torch.ones_like(X),))[1]
    return tangent


@pytest.mark.parametrize("options", SKIPPING, ids=str)
@pytest.mark.parametrize("ask", [twice, by_weights, forward_mode])
@pytest.mark.parametrize("drops", [True, False])
def test_derivatives_are_those_of_the_network_that_ran(
    options: dict[str, Any], ask: Callable[[nn.Module], Tensor], drops: bool
) -> None:
    """The first block is kept; the second is dropped, or kept as well."""
    paper = {**options, "scaling": "paper"}  # what is kept counts as it is
    model, plain = gated(**paper), network()
    if drops:
        plain[2] = nn.Identity()  # type: ignore[index]
    with coins({"1.add": True, "2.add": not drops}):
        found = ask(model)
    want = ask(plain)
    if ask is by_weights and drops:  # those of the dropped branch are nothing, or zeros
        sizes = [p.numel() for name, p in model.named_parameters() if name.startswith("2.")]
        at = sum(p.numel() for name, p in model.named_parameters() if name.startswith("1."))
        assert not found[at : at + sum(sizes)].any()
        found = torch.cat([found[:at], found[at + sum(sizes) :]])
    torch.testing.assert_close(found, want)


def test_forward_mode_by_rows() -> None:
    """Of the rows that run the tangents are those of the plain network, of the others the shortcut's."""
    model = surgeon.apply(
        nn.Sequential(randomise(Plain()).double()), drop_rate=0.5, skip=True, scaling="paper", example=X
    )
    torch.manual_seed(3)
    out, tangent = jvp(model, (X,), (torch.ones_like(X),))
    kept = (out != X).any(1)
    assert 0 < kept.sum() < len(X)
    _, whole = jvp(model[0]._ungated_forward, (X,), (torch.ones_like(X),))  # type: ignore[operator, index]
    torch.testing.assert_close(tangent, torch.where(kept[:, None], whole, torch.ones_like(X)))


@pytest.mark.parametrize("options", SKIPPING, ids=str)
def test_gradients_of_each_sample(options: dict[str, Any]) -> None:
    """`vmap` hides the coins from Python, so everything is computed and masked there."""
    model = gated(**options)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x[None],)).square().sum()  # type: ignore[no-any-return]

    torch.manual_seed(0)
    found = vmap(grad(loss), (None, 0), randomness="different")(weights, X)
    name = "2.f.0.weight"
    assert found[name].shape == (6, *weights[name].shape)
    dropped = ~found[name].flatten(1).any(1)
    assert 0 < dropped.sum() < 6  # each sample has a coin of its own


@pytest.mark.parametrize("options", [{}, *SKIPPING, {"skip": False}], ids=str)
def test_a_batch_of_none(options: dict[str, Any]) -> None:
    model = gated(**options)
    assert model(X[:0]).shape == (0, 3)
    model(X[:0]).sum().backward()
    large = surgeon.apply(timm.create_model("test_resnet", num_classes=3), **options)
    for module in large.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    assert large(torch.zeros(0, 3, 160, 160)).shape == (0, 3)


class Scaled(nn.Module):
    """A branch whose last factor is not in half precision: the sum is in single, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.gain = nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.gain


@pytest.mark.parametrize("options", [{"unit": "batch"}, {"skip": True}], ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_the_type_of_a_sum_is_no_matter_of_luck(options: dict[str, Any], kept: bool) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), Scaled(), Plain())
    norms = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Scaled())
    for net in (plain, norms):
        model = surgeon.apply(net, "uniform", drop_rate=0.5, example=X.float(), **options)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with coins(kept), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(X.float()).dtype == net.eval()(X.float()).dtype == torch.float32
            net.train()
        if not kept and net is norms:  # what was run to know the type has left nothing behind
            assert before["1.num_batches_tracked"] + 1 == model.state_dict()["1.num_batches_tracked"]


def test_asking_for_the_type_draws_nothing_and_moves_no_statistics() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    model = surgeon.apply(Normed(), "uniform", drop_rate=0.5, unit="batch", example=X.float())
    with coins(kept=False), torch.autocast("cpu", dtype=torch.bfloat16):
        state = torch.get_rng_state()
        model(X.float())
    assert torch.equal(state, torch.get_rng_state())
    norm = model.f[1]  # type: ignore[index]
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()


def test_the_type_is_asked_anew_when_weights_change_theirs() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x.to(self.f[0].weight.dtype))

    model = surgeon.apply(Casting(), "uniform", drop_rate=0.5, unit="batch", example=X.float())
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        for kept in (False, True):
            with coins(kept):
                assert model(X.float()).dtype == torch.promote_types(dtype, torch.float32)


def test_steps_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Plain(), Plain())
        surgeon.apply(model, "uniform", drop_rate=0.9, unit="batch", example=torch.zeros(2, 4))
        for _ in range(10):
            assert model(torch.zeros(2, 4)).is_meta
