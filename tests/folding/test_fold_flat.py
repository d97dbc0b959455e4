"""What the flat list of a model must not miss: writes in place, looks at numbers, state, odd results."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import Of
from folds import Gated, exponents, folds, image, randomised, tokens, weights
from torch import Tensor, nn

import surgeon
from surgeon._folding import flat as _flat
from surgeon._folding.fold import plan
from surgeon._mark import mark
from surgeon.errors import FoldError

Forward = Callable[[Any, Tensor], Tensor]


# Writes in place.


def _as_it_is(function: Callable[[Sequence[Tensor]], Iterator[Tensor]], tensors: Sequence[Tensor]) -> Any:
    return list(function(tensors))


def circular(held: Any, x: Tensor) -> Tensor:
    result: Tensor = held.last(F.relu(held.first(x)))
    return result


def padded(held: Any, x: Tensor) -> Tensor:
    rows = nn.utils.rnn.pad_sequence(list(F.relu(held.first(x))), batch_first=True)
    return rows * held.gain


def halves(held: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., :4] = held.first(x)[..., :4]
    y[..., 4:] = held.last(x)[..., 4:]
    return F.relu(y)


def scaled_in_place(held: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., :4] += held.first(x)[..., :4]
    y[..., 2:].mul_(held.gain)
    return y


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize(("written", "where"), [(padded, "gain"), (halves, ""), (scaled_in_place, "")])
def test_writes_in_place_are_followed(
    written: Forward, where: str, functional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without PyTorch's functionalisation, which takes nearly all of them out."""
    gain = torch.rand(6) if written is scaled_in_place else torch.rand(8)
    branch = Of(written, first=nn.Linear(8, 8), last=nn.Linear(8, 8), gain=gain)
    if not functional:
        monkeypatch.setattr(_flat, "_functionalised", _as_it_is)
    made = folds(randomised(Gated(branch)), tokens())
    if functional:
        assert not made.kept
    if where:
        assert exponents(made) == {where: 1}


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_circular_padding_carries_the_scale(
    bias: bool, functional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=bias)
    branch = Of(circular, first=nn.Conv2d(4, 4, 1), last=last)
    if not functional:
        monkeypatch.setattr(_flat, "_functionalised", _as_it_is)
    found = exponents(folds(randomised(Gated(branch)), image()))
    assert found == (weights("last") if bias else {"last.weight": 1})


def test_a_scale_before_circular_padding() -> None:
    """Nothing behind the padding takes the scale, so it goes through it."""

    def function(held: Any, x: Tensor) -> Tensor:
        return F.pad(F.relu(held.first(x)), (1, 1, 1, 1), mode="circular")[..., 1:-1, 1:-1]

    assert exponents(folds(randomised(Gated(Of(function, first=nn.Conv2d(4, 4, 1)))), image())) == weights(
        "first"
    )


# Functions with a backward of their own.


class Swish(torch.autograd.Function):
    """With a context, as before PyTorch 2.0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return gradient * gate * (1 + x * (1 - gate))


class Rectified(torch.autograd.Function):
    """With ``setup_context``, and written in place."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone().relu_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return gradient * (output > 0)


taken_early = Swish.apply


@pytest.mark.parametrize("function", [Swish.apply, taken_early])
def test_classic_autograd_functions_are_seen_through(function: Callable[[Tensor], Tensor]) -> None:
    def forward(held: Any, x: Tensor) -> Tensor:
        result: Tensor = held.last(function(held.first(x)))
        return result

    branch = Of(forward, first=nn.Linear(8, 8), last=nn.Linear(8, 8))
    assert exponents(folds(randomised(Gated(branch)), tokens())) == weights("last")
    (kept,) = folds(
        randomised(Gated(Of(lambda held, x: function(held.first(x)), first=nn.Linear(8, 8)))), tokens()
    ).kept
    assert "mul" in kept.reason or "sigmoid" in kept.reason


def test_autograd_functions_of_the_new_kind_are_seen_through() -> None:
    branch = Of(lambda held, x: Rectified.apply(held.first(x)), first=nn.Linear(8, 8))
    assert exponents(folds(randomised(Gated(branch)), tokens())) == weights("first")


def test_a_model_trained_with_a_classic_function_folds() -> None:
    branch = Of(
        lambda held, x: held.last(Swish.apply(held.first(x))), first=nn.Linear(8, 8), last=nn.Linear(8, 8)
    )
    model = surgeon.apply(Sum(branch), scaling="paper", drop_rate=0.4, example=tokens().float())
    model.train()
    model(tokens().float()).sum().backward()
    model.double().eval()
    x = tokens()
    torch.testing.assert_close(surgeon.fold(model)(x), model(x), rtol=1e-12, atol=1e-12)


# Numbers.


class Sum(nn.Module):
    """A residual block."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.branch(x)
        return result


def test_a_complex_constant_is_a_constant() -> None:
    def forward(held: Any, x: Tensor) -> Tensor:
        return (torch.complex(held.first(x), held.last(x)) + 1j).abs() * held.gain

    parts = {"first": nn.Linear(8, 8), "last": nn.Linear(8, 8), "gain": torch.rand(8)}
    assert exponents(folds(randomised(Gated(Of(forward, **parts))), tokens())) == {"gain": 1}
    bare = Of(lambda held, x: (torch.complex(held.first(x), x) - 2j).real, first=nn.Linear(8, 8))
    (kept,) = folds(randomised(Gated(bare)), tokens()).kept
    assert "adds a constant" in kept.reason


def test_a_number_read_out_of_a_tensor_pins_it() -> None:
    """The weight's norm as a float, read outside of the branch."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gated = Gated(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.gated(x) / self.gated.branch.weight.norm().item()
            return result

    assert folds(randomised(Normed()), tokens()).kept


@pytest.mark.parametrize("look", [float, bool, lambda one: torch.equal(one, one)])
def test_whatever_python_looks_at_stays(look: Callable[[Tensor], Any]) -> None:
    def forward(held: Any, x: Tensor) -> Tensor:
        y: Tensor = held.first(x)
        return F.relu(y) if look(held.first.weight.mean()) else y

    model = randomised(Gated(Of(forward, first=nn.Linear(8, 8, bias=False))))
    assert folds(model, tokens()).kept
    look = torch.is_tensor
    assert exponents(folds(model, tokens())) == {"first.weight": 1}


def test_a_tensor_that_fills_another_is_no_free_constant() -> None:
    def forward(held: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x).fill_(held.gain.sum()) * held.first(x)

    made = folds(randomised(Gated(Of(forward, first=nn.Linear(8, 8), gain=torch.rand(8)))), tokens())
    assert exponents(made) == weights("first")


# What a model returns and leaves behind.


@dataclasses.dataclass(slots=True)
class Slotted:
    out: Tensor
    feature: Tensor


class Hidden:
    __slots__ = ("__feature", "out")

    def __init__(self, out: Tensor, feature: Tensor) -> None:
        self.out, self.__feature = out, feature


class Callable_:
    def __init__(self, out: Tensor, feature: Tensor) -> None:
        self.out, self.feature = out, feature

    def __call__(self) -> Tensor:
        return self.out


class Returning(nn.Module):
    """The branch's result goes out beside the sum."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.form = nn.Linear(8, 8), form

    def forward(self, x: Tensor) -> Any:
        feature = mark(F.relu(self.first(x)), "0")
        branch = F.relu(self.first(x))
        return self.form(x + mark(branch, "0"), branch + 0 * feature)


@pytest.mark.parametrize(
    "form", [Slotted, Hidden, Callable_, lambda out, feature: {"out": [out, {"deep": (feature,)}]}]
)
def test_results_of_any_make_are_looked_into(form: Callable[[Tensor, Tensor], Any]) -> None:
    made = plan(randomised(Returning(form)), (tokens(),), {}, {"0": 0.7})
    assert [kept.gate for kept in made.kept] == ["0"]
    without = plan(randomised(Returning(lambda out, _: out)), (tokens(),), {}, {"0": 0.7})
    assert not without.kept


@pytest.mark.parametrize(
    "form", [lambda out, feature: lambda: feature, lambda out, feature: iter([out, feature])]
)
def test_a_result_that_cannot_be_looked_into_is_refused(form: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(FoldError, match="cannot be seen"):
        plan(randomised(Returning(form)), (tokens(),), {}, {"0": 0.7})


class Averaging(nn.Module):
    """A running mean that evaluation moves, too."""

    def __init__(self, replaced: bool) -> None:
        super().__init__()
        self.first, self.replaced = nn.Linear(8, 8), replaced
        self.register_buffer("average", torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        out: Tensor = y / (self.average + 1e-3)
        if self.replaced:
            self.average = 0.9 * self.average + 0.1 * y.mean((0, 1)).detach()
        else:
            self.average.mul_(0.9).add_(y.detach().mean((0, 1)), alpha=0.1)
        return out


@pytest.mark.parametrize("replaced", [True, False])
def test_state_that_evaluation_writes_is_a_result(replaced: bool) -> None:
    model = randomised(Gated(Averaging(replaced)))
    made = plan(model, (tokens(),), {}, {"0": 0.7})
    assert made.kept
    assert not plan(randomised(Gated(nn.Linear(8, 8))), (tokens(),), {}, {"0": 0.7}).kept


def test_an_argument_that_is_written_to_is_a_result() -> None:
    class Storing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            y = F.relu(self.first(x))
            cache.copy_(y)
            out: Tensor = x + mark(y, "0")
            return out

    assert plan(randomised(Storing()), (tokens(), torch.zeros_like(tokens())), {}, {"0": 0.7}).kept


# Memory under several names.


def test_a_plain_attribute_over_a_weight_blocks_it() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gated = Gated(nn.Linear(8, 8))
            self.alias: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.gated(x)
            return y if self.alias is None else y @ self.alias

    model = randomised(Aliased())
    assert not plan(model, (tokens(),), {}, {"0": 0.7}).kept
    model.alias = model.gated.branch.weight.data
    assert plan(model, (tokens(),), {}, {"0": 0.7}).kept
    model.alias = model.gated.branch.weight.data.clone()
    assert not plan(model, (tokens(),), {}, {"0": 0.7}).kept
