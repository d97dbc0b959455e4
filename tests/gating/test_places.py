"""A gate stays on its addition when its block is called in a way that performs others too."""

import io
from typing import Any

import pytest
import torch
from blocks import X, coins, randomise
from torch import Tensor, nn

import surgeon
from surgeon.errors import UnseenCallError


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross, self.feed = mlp(), mlp(), mlp()

    def forward(self, x: Tensor, context: Tensor | None = None, bare: bool = False) -> Tensor:
        if not bare:
            x = x + self.own(x)
        if context is not None:
            x = x + self.cross(x + context)
        return x + self.feed(x)


def closed(block: Any, *given: Any, scaling: str = "inverted") -> Any:
    """The block's result on a later call, every gate closed."""
    gated = surgeon.apply(block, unit="batch", drop_rate=0.5, scaling=scaling, example=X)
    with coins(False):
        return gated(*given)


def test_an_addition_on_the_way_takes_no_gate_from_another() -> None:
    block = randomise(Crossed())
    context = torch.randn(3, 4)
    torch.testing.assert_close(closed(block, X, context), X + block.cross(X + context))


def test_a_gate_whose_addition_is_not_performed_goes_to_no_other() -> None:
    block = randomise(Crossed())
    surgeon.apply(block, unit="batch", drop_rate=0.5, scaling="paper", example=X)
    with coins(lambda name: name == "add_1"):
        torch.testing.assert_close(block(X, None, True), X + block.feed(X))
    with coins(lambda name: name == "add"):
        torch.testing.assert_close(block(X, None, True), X)


def test_scales_of_evaluation_stay_on_their_additions() -> None:
    block = randomise(Crossed())
    surgeon.apply(block, unit="batch", drop_rate=0.5, schedule="uniform", scaling="paper", example=X).eval()
    context = torch.randn(3, 4)
    y = X + 0.5 * block.own(X)
    y = y + block.cross(y + context)
    torch.testing.assert_close(block(X, context), y + 0.5 * block.feed(y))


class Scan(nn.Module):
    """A recurrence with additions of its own, in front of two residual adds."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.o, self.m = nn.Linear(4, 4), nn.Linear(4, 4), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scanned(x)
        return x + self.m(x)

    def scanned(self, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = state + torch.tanh(self.f(state * 0.5 + x[:, t]))
            states.append(state)
        result: Tensor = self.o(torch.stack(states, 1))
        return result


def test_a_gate_behind_a_recurrence_stays_there_for_every_length() -> None:
    block, x = randomise(Scan()), torch.randn(3, 5, 4)
    gated = surgeon.apply(
        block, unit="batch", drop_rate=0.5, example=torch.randn(3, 5, 4), exclude=["add_11"]
    )
    assert [gate.name for gate in surgeon.status(gated).gates] == ["add_10"]
    for length in (9, 3, 5):
        x = torch.randn(3, length, 4)
        with coins(False):
            torch.testing.assert_close(gated(x), x + block.m(x))


class Rounds(nn.Module):
    """One branch, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def forward(self, x: Tensor, rounds: int = 2, extra: Tensor | None = None) -> Tensor:
        for _ in range(rounds):
            y = self.f(x)
            if extra is not None:
                y = extra + self.g(extra) + y
            x = x + y
        return x


def test_additions_with_one_branch_are_told_by_their_turn() -> None:
    block = randomise(Rounds())
    gated = surgeon.apply(block, unit="batch", drop_rate=0.5, example=X)
    assert len(surgeon.status(gated).gates) == 2
    for first, second in ((True, False), (False, True)):
        with coins({"add": first, "add_1": second}):
            torch.testing.assert_close(gated(X), X + 2 * block.f(X), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnseenCallError, match="add_1"):
        gated(X, rounds=1)


def test_where_no_addition_is_surely_the_one_the_call_is_refused() -> None:
    with pytest.raises(UnseenCallError, match="does not perform the gated addition add;"):
        closed(randomise(Rounds()), X, 2, torch.randn(3, 4))


class Prepares(nn.Module):
    """One branch runs more where there is more to read; another sum is refused in both."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = mlp(), mlp(), mlp()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.f(x)
        if mask is not None:
            y = y * self.g(mask).sigmoid()
        x = x + y
        return x + self.h(x)


@pytest.mark.parametrize("exclude", [(), ("add_1",)], ids=["all", "some"])
def test_a_branch_that_runs_more_than_on_the_example_keeps_its_gate(exclude: tuple[str, ...]) -> None:
    block = randomise(Prepares())
    gated = surgeon.apply(block, unit="batch", drop_rate=0.5, example=X, exclude=exclude)
    with coins(False):
        torch.testing.assert_close(gated(X, X.sin()), X + block.h(X) if exclude else X)


def test_gates_stay_where_they_are_in_a_copy() -> None:
    block = randomise(Crossed())
    file, context = io.BytesIO(), torch.randn(3, 4)
    torch.save(surgeon.apply(block, unit="batch", drop_rate=0.5, example=X), file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    with coins(False):
        torch.testing.assert_close(twin(X, context), X + block.cross(X + context))
