"""One module called in several ways in one forward, some of which do not perform the gated sum."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Of, coins
from torch import Tensor, nn

import surgeon

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def by_flag(m: Any, x: Tensor, first: bool, a: float = 1) -> Tensor:
    return x + a * m.f(x) if first else m.g(x)


def by_none(m: Any, x: Tensor, other: Tensor | None = None, a: float = 1) -> Tensor:
    return m.g(x) if other is None else x + a * m.f(x * other)


def by_name(m: Any, x: Tensor, mode: str = "plain", a: float = 1) -> Tensor:
    return {"plain": m.g, "residual": lambda v: v + a * m.f(v)}[mode](x)


def by_rank(m: Any, x: Tensor, a: float = 1) -> Tensor:
    return m.g(x) if x.ndim == 2 else x + a * m.f(x)


def by_size(m: Any, x: Tensor, a: float = 1) -> Tensor:
    return m.g(x) if x.shape[0] > 2 else x + a * m.f(x)


def by_nest(m: Any, x: Any, a: float = 1) -> Tensor:
    return m.g(x) if isinstance(x, Tensor) else x[0] + a * m.f(x[0])


def more(m: Any, x: Tensor, other: Tensor | None = None, a: float = 1, b: float = 1) -> Tensor:
    x = x + a * m.f(x)
    return x if other is None else x + b * m.g(other)


def on(block: Any, x: Tensor, *factors: float) -> Any:
    return block(x, True, *factors)


def off(block: Any, x: Tensor, *_: float) -> Any:
    return block(x, False)


CALLS: dict[str, tuple[Callable[..., Any], list[Callable[..., Any]]]] = {
    "flag": (by_flag, [on, off]),
    "flag, the plain one first": (by_flag, [off, on]),
    "flag, by name": (by_flag, [on, lambda b, x, *_: b(x, first=False)]),
    "None": (by_none, [lambda b, x, *g: b(x, x, *g), lambda b, x, *g: b(x)]),
    "a string": (by_name, [lambda b, x, *g: b(x, "residual", *g), lambda b, x, *g: b(x)]),
    "rank": (by_rank, [lambda b, x, *g: b(x[:, None], *g)[:, 0], lambda b, x, *g: b(x)]),
    "size": (by_size, [lambda b, x, *g: b(x[:2], *g).repeat(2, 1), lambda b, x, *g: b(x)]),
    "a tuple": (by_nest, [lambda b, x, *g: b((x,), *g), lambda b, x, *g: b(x)]),
    "three ways": (by_flag, [on, off, lambda b, x, *_: b(x[:, None], False)[:, 0]]),
    "one sum, then two": (more, [lambda b, x, *g: b(x, None, *g[:1]), lambda b, x, *g: b(x, x, *g)]),
}


class Switched(Of):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Net(nn.Module):
    def __init__(self, block: nn.Module, calls: list[Callable[..., Any]]) -> None:
        super().__init__()
        self.stem, self.block, self.calls = nn.Linear(8, 8), block, calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for call in self.calls:
            x = call(self.block, x)
        return x


@pytest.mark.parametrize("scaling", ["inverted", "paper"])
@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("name", CALLS)
def test_each_way_runs_with_the_gates_that_are_in_it(name: str, unit: Any, scaling: Any) -> None:
    function, calls = CALLS[name]
    model = Net(Switched(function, f=mlp(), g=mlp()), calls)
    count = 2 if function is more else 1
    assert len(surgeon.find(model, X)) == count
    surgeon.apply(model, "uniform", drop_rate=0.5, unit=unit, scaling=scaling, example=X)

    def by_hand(*factors: float) -> Tensor:
        x = model.stem(X)
        for call in calls:
            x = call(lambda *args, **kwargs: function(model.block, *args, **kwargs), x, *factors)
        return x

    kept = 1.0 if scaling == "paper" else 2.0
    for keep in (True, False):
        with coins(keep):
            torch.testing.assert_close(model.train()(X), by_hand(*[kept * keep] * count))
    torch.testing.assert_close(model.eval()(X), by_hand(*[0.5 if scaling == "paper" else 1.0] * count))


def test_a_way_that_the_example_did_not_show_and_without_the_branch_has_no_gate() -> None:
    model = Net(Of(by_flag, f=mlp(), g=mlp()), CALLS["flag"][1][:1])
    surgeon.apply(model, example=X)
    with coins(False):
        torch.testing.assert_close(model.block(X, False), model.block.g(X))


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_a_block_that_returns_early_for_some_sizes(unit: Any) -> None:
    def early(m: Any, x: Tensor) -> Tensor:
        return x + m.f(x) if len(x) else x * 2

    model = surgeon.apply(Of(early, f=mlp()), drop_rate=0.5, unit=unit, example=X)
    with coins(False):
        torch.testing.assert_close(model(X), X)
        assert model(X[:0]).shape == (0, X.shape[1])


def test_another_way_that_cannot_be_traced_is_said_at_once() -> None:
    """Not at the first step."""

    def either(m: Any, x: Tensor, first: bool) -> Tensor:
        if first:
            return x + m.f(x)
        m.kept = m.g(x)
        return m.kept

    model = Net(Of(either, f=mlp(), g=mlp()), CALLS["flag"][1])
    found = surgeon.find(model, X)
    assert [(r.code, "assigns self.kept" in r.reason) for r in found.refused] == [("untraceable", True)]
