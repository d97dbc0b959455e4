"""Modules that only add what they are given: the sum is a line of the block that calls them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Of, Plain, X, coins, same
from torch import Tensor, nn

import surgeon

ADDERS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda self, a, b: a + b,
    "in place": lambda self, a, b: a.add_(b),
    "one scaled": lambda self, a, b: 0.3 * a + b,
    "magnitude preserving": lambda self, a, b: (0.3 * a + 0.7 * b) / 0.58**0.5,
    "by a weight": lambda self, a, b: self.gain * a + b,
    "of a list": lambda self, both: both[0] + both[1],
}


class Caller(nn.Module):
    """``add(f(x), x)``, with an adder of its own or one that its neighbour has, too."""

    def __init__(self, adder: nn.Module, listed: bool = False) -> None:
        super().__init__()
        self.f, self.add, self.listed = Plain().f, adder, listed

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return self.add([y, x]) if self.listed else self.add(y, x)  # type: ignore[no-any-return]


def adder(name: str) -> nn.Module:
    return Of(ADDERS[name], gain=torch.rand(4))


def model(name: str, shared: bool) -> nn.Sequential:
    first, listed = adder(name), name == "of a list"
    return nn.Sequential(Caller(first, listed), Caller(first if shared else adder(name), listed))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("name", ADDERS)
def test_the_sum_is_the_callers(name: str, shared: bool) -> None:
    made = model(name, shared)
    found = surgeon.find(made, X)
    assert [(r.name, r.kind, r.branch) for r in found] == [
        ("0.add", "identity", "f"),
        ("1.add", "identity", "f"),
    ]
    assert not found.refused
    expected = made(X)
    surgeon.apply(made, unit="batch", drop_rate=0.5, example=X, skip=True)
    assert [gate.skips for gate in surgeon.status(made).gates] == [True, True]
    assert torch.equal(made.eval()(X), expected)
    made.train()
    with coins(False):
        value = X
        for block in made:
            nothing = torch.zeros_like(X)
            value = block.add(
                [nothing, value] if block.listed else nothing, *([] if block.listed else [value])
            )
        assert same(made(X), value)


def test_other_sizes_and_folds() -> None:
    made = surgeon.apply(model("magnitude preserving", False), drop_rate=0.5, scaling="paper", example=X)
    made.double().eval()
    for x in (X.double(), X[:2].double()):
        torch.testing.assert_close(surgeon.fold(made, example=x)(x), made(x), rtol=1e-13, atol=1e-13)


def test_where_values_decide_and_only_a_real_run_can_be_recorded() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = model("plain", False)

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.steps(x + 1 if mask.all().item() else x)

    made, arguments = Looks(), (X, torch.ones(3, dtype=torch.bool))
    expected = made(*arguments)
    surgeon.apply(made, example=arguments, unit="batch")
    assert [gate.name for gate in surgeon.status(made).gates] == ["steps.0.add", "steps.1.add"]
    assert torch.equal(made.eval()(*arguments), expected)
    with coins(False):
        assert same(made.train()(*arguments), X + 1)


def test_one_with_hooks_stays_a_call() -> None:
    """A trace through it would pass them by; the sum is its own then, of two values that it only gets."""
    made, seen = model("plain", False), list[Any]()
    made[0].add.register_forward_hook(lambda *_: seen.append(1))
    found = surgeon.find(made, X)
    assert [r.name for r in found] == ["0.add.add", "1.add"] and not found.refused
    surgeon.apply(made, "uniform", unit="batch", drop_rate=0.5, example=X)
    seen.clear()
    with coins(lambda name: name != "0.add.add"):
        expected = X + 2 * made[1].f(X)
        assert same(made.train()(X), expected) and seen


def test_what_two_branches_give_is_no_residual_add() -> None:
    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.add = Plain().f, Plain().f, adder("plain")

        def forward(self, x: Tensor) -> Any:
            return self.add(self.f(x), self.g(x))

    found = surgeon.find(nn.Sequential(Fusion(), Plain()), X)
    assert [r.name for r in found] == ["1.add"]
    assert [(r.name, r.code) for r in found.refused] == [("0.add", "fusion")]


def test_a_long_skip_over_them_is_none_of_them() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.add = model("plain", False), adder("plain")

        def forward(self, x: Tensor) -> Any:
            return self.add(self.steps(x), x)

    found = surgeon.find(nn.Sequential(nn.Linear(4, 4), Body()), X)
    assert [r.name for r in found] == ["1.steps.0.add", "1.steps.1.add"]
    assert [(r.name, r.code) for r in found.refused] == [("1.add", "long-skip")]
