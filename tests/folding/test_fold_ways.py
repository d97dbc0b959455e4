"""Folds of blocks that are called in several ways, and under which conditions a block's forward was made."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folds import randomised
from torch import Tensor, nn

import surgeon
from surgeon._folding import ways as _ways
from surgeon._gating.gated import gates_of
from surgeon.errors import NotGatedError

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


class Conditioned(nn.Module):
    """A branch to which a second one may be added; the same layer ends it, or none."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 8) if last else nn.ReLU()

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        y = self.first(F.gelu(x))
        if beside is not None:
            y = y + self.second(beside)
        out: Tensor = x + self.last(y)
        return out


class Sized(nn.Module):
    """Another layer for larger batches, or the same one in another spelling."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first if same else nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(x)
        out: Tensor = x + (self.first(y) if x.shape[0] < 10 else self.second(y))
        return out


def gated(model: nn.Module, example: Any = X, **arguments: Any) -> nn.Module:
    return surgeon.apply(
        randomised(model), "uniform", drop_rate=0.4, scaling="paper", example=example, **arguments
    ).eval()


def notes(model: nn.Module) -> list[str]:
    try:
        return [gate.note for gate in surgeon.status(model).gates]
    except NotGatedError:
        return []


@torch.no_grad()
def folded(model: nn.Module, *calls: tuple[Any, ...]) -> list[str]:
    """Folds a copy and one in place; both must evaluate like the gated model in every call."""
    expected = [model(*call) for call in calls]
    left = []
    for result in (surgeon.fold(model), surgeon.fold(copy.deepcopy(model), inplace=True)):
        for call, value in zip(calls, expected, strict=True):
            assert error(result(*call), value) < 1e-12
        left.append(notes(result))
    assert left[0] == left[1]
    return left[0]


@pytest.mark.filterwarnings("ignore:1 of 1 gates keep")
def test_a_gate_stays_where_another_call_would_scale_other_weights() -> None:
    model = gated(Conditioned(last=False))
    assert folded(model, (X,)) == []
    (note,) = folded(model, (X,), (X, X.flip(0)))
    assert "called in another way" in note


def test_a_gate_folds_where_every_call_scales_the_same_weights() -> None:
    assert folded(gated(Conditioned(last=True)), (X,), (X, X.flip(0))) == []


@pytest.mark.filterwarnings("ignore:1 of 1 gates keep")
def test_a_path_that_the_batch_size_decides_is_seen() -> None:
    many = TOKENS.reshape(12, 8)
    assert folded(gated(Sized(same=True)), (X,), (many,)) == []
    model = gated(Sized(same=False))
    assert folded(model, (X,)) == []
    assert folded(model, (X,), (many,)) != []


@pytest.mark.filterwarnings("ignore:1 of 1 gates keep")
def test_a_way_seen_in_training_counts() -> None:
    model = gated(Conditioned(last=False)).train()
    model(X, X)
    assert folded(model.eval(), (X,)) != []


class Training(nn.Module):
    """Calls its block otherwise while it trains, and with an object that may not be kept."""

    class Cache:
        pass

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
            y = F.relu(self.first(x))
            out: Tensor = x + (y if mask is None else y * mask)
            return out

    def __init__(self) -> None:
        super().__init__()
        self.block = Training.Block()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(x) if self.training else None
        out: Tensor = self.block(x, mask, Training.Cache())
        return out


def test_what_the_example_shows_in_training_is_no_other_way() -> None:
    model = gated(Training()).train()
    model(X)
    assert folded(model.eval(), (X,)) == []


@pytest.mark.filterwarnings("ignore:1 of 1 gates keep")
def test_a_way_that_cannot_be_repeated_keeps_the_gate() -> None:
    model = gated(Training())
    model.block(X, X[0], Training.Cache())
    (note,) = folded(model, (X,))
    assert "cannot be analysed" in note


def test_another_shape_with_the_same_laws_is_no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block alone would scale a weight that the whole model also uses outside of it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first = nn.LayerNorm(8), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(F.relu(self.norm(x)))
            out: Tensor = x + (y if len(x) < 100 else -y)
            return out

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.block(x), self.block.first.weight)

    model = gated(Outer())
    assert folded(model, (X,), (X[:2],), (TOKENS.flatten(0, 1),)) == []
    monkeypatch.setattr(_ways, "_laws", lambda flat: object())  # no two lists have the same laws then
    with pytest.warns(UserWarning, match="called in another way"):
        surgeon.fold(model)


def test_what_keep_eval_has_divided_comes_back_whatever_calls_there_were() -> None:
    model = randomised(Conditioned(last=False))
    before = copy.deepcopy(model)
    surgeon.apply(model, scaling="paper", drop_rate=0.4, keep_eval=True, example=X)
    model(X, X)
    surgeon.remove(model)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert error(one, other) < 1e-15
    assert error(model(X, X), before(X, X)) < 1e-12


@pytest.mark.parametrize("keep_eval", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_forward_that_asks_for_the_grad_mode(norm_first: bool, keep_eval: bool) -> None:
    """PyTorch's own encoder layer, folded before it was ever run without gradients."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    plain = randomised(layer)
    model = surgeon.apply(
        copy.deepcopy(plain), "uniform", drop_rate=0.4, scaling="paper", keep_eval=keep_eval, example=TOKENS
    )
    assert len(gates_of(model)) == 2
    result = surgeon.fold(model)
    assert notes(result) == []
    with torch.no_grad():
        assert error(result(TOKENS), model(TOKENS)) < 1e-12
        assert (error(result(TOKENS), plain(TOKENS)) < 1e-12) == keep_eval
