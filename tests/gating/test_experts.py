"""Branches in which values decide what runs, a mixture of experts above all: no fake tensor goes through."""

import copy
import pickle
from typing import Any

import pytest
import torch
from blocks import Around, Snapshot, coins, randomise
from timm.layers import DropPath
from torch import Tensor, nn

import surgeon
from surgeon._gating.gated import is_gated
from surgeon.errors import FoldError

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Each token goes through the two experts that a router scores highest."""

    def __init__(self, width: int = 8, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens).softmax(-1).topk(2, -1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if rows.numel():
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        return out.reshape(x.shape)


class Block(nn.Module):
    """Mixing along the tokens, then experts; ``drop`` is stochastic depth of its own."""

    def __init__(self, width: int = 8, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.experts, self.drop = Experts(width), DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.mix(self.norm1(x)))
        return x + self.drop(self.experts(self.norm2(x)))


class Dropping(nn.Module):
    """Experts with stochastic depth, as a module of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.experts, self.drop = Experts(width), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.experts(x))  # type: ignore[no-any-return]


class Hidden(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(width), Dropping(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


def network(**options: Any) -> nn.Module:
    return randomise(nn.Sequential(Block(**options), Block(**options)))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_experts_are_gated_and_train_at_other_sizes(unit: Any) -> None:
    plain = network()
    model = surgeon.apply(copy.deepcopy(plain), drop_rate=0.5, unit=unit, example=X)
    assert [g.name for g in surgeon.status(model).gates] == ["0.add", "0.add_1", "1.add", "1.add_1"]
    given = torch.randn(7, 3, 8)
    surgeon.set_drop_rate(model, 0.0)
    torch.testing.assert_close(model(given), plain(given))
    for ours, theirs in zip(gradients(model, given), gradients(plain, given), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(model.eval()(given), plain.eval()(given))


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_dropped_experts_do_nothing(unit: Any) -> None:
    plain = network()
    model = surgeon.apply(copy.deepcopy(plain), "uniform", drop_rate=0.5, unit=unit, example=X)
    with coins({"0.add_1": False, "1.add_1": False, "0.add": True, "1.add": True}):
        out = model(X)
    x = X
    for block in plain:
        x = x + 2 * block.mix(block.norm1(x))
    torch.testing.assert_close(out, x)
    share = {row.name: row.skips for row in surgeon.status(model).gates}
    assert share["0.add_1"] == (unit == "batch")  # rows of a batch share the experts' calls


@pytest.mark.parametrize("block", [lambda: Block(drop=0.5), Hidden])
def test_stochastic_depth_beside_and_around_experts_is_stood_in_for(block: Any) -> None:
    plain = randomise(nn.Sequential(block(), block()))
    model = surgeon.apply(copy.deepcopy(plain), drop_rate=0.0, example=X)
    torch.testing.assert_close(model.train()(X), plain.eval()(X))
    assert not torch.equal(plain.train()(X), plain(X))  # whereas its own depth does drop


def test_experts_keep_their_multiplication_and_all_inputs_agree() -> None:
    model = surgeon.apply(network().double(), drop_rate=0.5, scaling="paper", example=X.double())
    with pytest.warns(UserWarning, match=r"2 of 4 gates keep .*values decide what runs \(nonzero in '0.exp"):
        folded = surgeon.fold(model)
    assert [gate.name for gate in surgeon.status(folded).gates] == ["0.add_1", "1.add_1"]
    for seed in range(5):  # each sends its tokens to other experts
        given = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(seed)).double() * (1 + seed)
        torch.testing.assert_close(folded.eval()(given), model.eval()(given), rtol=1e-12, atol=1e-12)


def test_weights_of_experts_cannot_be_divided() -> None:
    model = network()
    before = Snapshot.of(model)
    with pytest.raises(FoldError, match=r"0\.add_1.*values decide what runs"):
        surgeon.apply(model, drop_rate=0.5, scaling="paper", keep_eval=True, example=X)
    assert before.differences(model) == []
    surgeon.apply(model, drop_rate=0.5, scaling="paper", keep_eval=True, example=X, exclude=["*.add_1"])
    assert not is_gated(surgeon.fold(model))


class Chooser(nn.Module):
    """Which of two layers runs is for the mean of the input to say."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(x.relu()) if x.mean().item() > 0 else self.low(x.relu())  # type: ignore[no-any-return]


class Looked(nn.Module):
    """A weight decides alone, the same for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 8)
        self.choice = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.high if self.choice.item() > 0 else self.low
        return layer(x.relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(("child", "folds"), [(Chooser, False), (Looked, True)])
def test_only_values_of_activations_stop_a_fold(child: type[nn.Module], folds: bool) -> None:
    model = surgeon.apply(randomise(Around(child())), drop_rate=0.5, scaling="paper", example=X).eval()
    if folds:
        folded = surgeon.fold(model)
    else:
        with pytest.warns(UserWarning, match=r"values decide what runs \(item in 'f'\)"):
            folded = surgeon.fold(model)
    assert is_gated(folded) != folds
    for given in (X, X + 3, X - 3):
        torch.testing.assert_close(folded.eval()(given), model(given))


class Chosen(nn.Module):
    """What it chose, and how many."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        rows = (x[..., 0] > 0).nonzero(as_tuple=True)
        return torch.zeros_like(x).index_put(rows, x[rows].tanh()), len(rows[0])


class First(Around):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)[0]  # type: ignore[no-any-return]


def test_a_child_that_gives_more_than_one_tensor_has_no_stand_in() -> None:
    plain = Around(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    findings = surgeon.find(nn.Sequential(First(Chosen()), plain), X)
    assert [r.name for r in findings] == ["1.add"]
    assert [r.code for r in findings.refused] == ["untraceable"]


@pytest.mark.parametrize("kept", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_of_gated_experts(kept: Any) -> None:
    model = surgeon.apply(network(), drop_rate=0.0, scaling="paper", example=X)
    twin = kept(model)
    for training in (True, False):
        torch.testing.assert_close(twin.train(training)(X[:, :3]), model.train(training)(X[:, :3]))
