"""Which of several residual adds around one another are steps of a stream, and which streams there are."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blocks import coins
from timm.layers import DropPath
from torch import Tensor, nn

import surgeon

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Cross(nn.Module):
    """A branch that reads another stream."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = (nn.Linear(8, n) for n in (8, 16, 8))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        k, v = self.kv(other).chunk(2, -1)
        weights = (self.q(x) @ k.transpose(1, 2)).softmax(-1)
        result: Tensor = self.out(weights @ v)
        return result


class Net(nn.Module):
    """A forward written as a function of its own module, with four residual blocks and two more branches."""

    def __init__(self, forward: Callable[..., Any], drop: nn.Module | None = None) -> None:
        super().__init__()
        self.run, self.drop = forward, drop or nn.Identity()
        self.steps = nn.Sequential(*(Step() for _ in range(4)))
        self.a, self.b, self.cross, self.back = mlp(), mlp(), Cross(), Cross()
        self.query = nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, *args: Tensor) -> Any:
        return self.run(self, *args)


def mixed(m: Any, x: Tensor) -> Tensor:
    first = x
    for step in m.steps:
        x = step(x) * 0.9 + first * 0.1
    return x


def u_shaped(m: Any, x: Tensor) -> Tensor:
    kept = []
    for step in m.steps[:2]:
        kept.append(x)
        x = step(x)
    for step in m.steps[2:]:
        x = step(x) + 0.5 * kept.pop()
    return x


def inline(m: Any, x: Tensor) -> Tensor:
    y = x + m.a(x)
    y = y + m.b(y)
    return x + m.steps[0].f(y)


def reversible(m: Any, x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1) if x.shape[1] % 2 == 0 else (x, x.flip(1))
    left = left + m.a(right)
    right = right + m.b(left)
    return torch.cat([left, right], 1)


def two_way(m: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q = q + m.cross(q, k)
    q = q + m.a(q)
    return q, k + m.back(k, q)


def both_halves(m: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x + m.a(x)
    x = x + m.b(x)
    return y + m.cross(y, x)


def queried(m: Any, x: Tensor) -> Tensor:
    x = m.steps(x)
    query = m.query.expand(len(x), -1, -1)
    return query + m.cross(query, x)


def twice_derived(m: Any, x: Tensor) -> Tensor:
    """The midpoint rule, thrice: each addition starts from x again."""
    return x + m.a(x + m.b(x + m.steps[0].f(x)))


def beside(m: Any, x: Tensor) -> Tensor:
    """Two residual adds on one of two ways through a branch, as in attentions that hand on head by head."""
    y = x.tanh()
    y = y + m.a(y)
    y = y + m.b(y)
    return x + y * m.steps[0].f(x)


STEPS = [f"steps.{place}.add" for place in range(4)]
CASES: dict[str, tuple[Callable[..., Any], list[str], dict[str, str]]] = {
    "long skip over blocks": (lambda m, x: x + m.a(m.steps(x)), STEPS, {"add": "long-skip"}),
    "long skip inline": (inline, ["add", "add_1"], {"add_2": "long-skip"}),
    "first value mixed in": (
        mixed,
        ["add", *STEPS[1:]],  # the first skips over one block alone
        {"add_1": "long-skip", "add_2": "long-skip", "add_3": "long-skip"},
    ),
    "u-shaped": (u_shaped, STEPS, {"add": "long-skip", "add_1": "long-skip"}),
    "two streams": (reversible, ["add", "add_1"], {}),
    "two ways": (two_way, ["add", "add_1", "add_2"], {}),
    "encoder and decoder": (both_halves, ["add", "add_1", "add_2"], {}),
    "learnt queries": (queried, ["add", *STEPS], {}),
    "on one of two ways": (beside, ["add_2"], {"add": "nested", "add_1": "nested"}),
    "from one value again": (twice_derived, ["add_2"], {"add": "nested", "add_1": "nested"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_steps_of_a_stream(case: str) -> None:
    forward, gates, refused = CASES[case]
    example = (X, X.flip(0)) if forward in (two_way, both_halves) else (X,)
    found = surgeon.find(Net(forward), example)
    assert sorted(r.name for r in found) == sorted(gates)
    codes = {r.name: r.code for r in found.refused}
    assert {name: codes.get(name) for name in refused} == refused


def test_its_author_may_take_a_long_skip_for_a_step() -> None:
    def outer(m: Any, x: Tensor) -> Tensor:
        return x + m.drop(m.steps(x))

    assert [r.name for r in surgeon.find(Net(outer, DropPath(0.1)), X)] == ["add"]


def test_a_long_skip_comes_in_by_its_code() -> None:
    assert [
        r.name for r in surgeon.find(Net(CASES["long skip over blocks"][0]), X, include=["long-skip"])
    ] == ["add"]


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_what_another_stream_reads_runs_though_its_reader_is_dropped(unit: str) -> None:
    model = Net(two_way)
    surgeon.apply(model, unit=unit, scaling="paper", example=(X, X.flip(0)))
    model.train()
    with coins(lambda name: name != "add_2"), torch.no_grad():
        q, k = model(X, X.flip(0))
        kept = X + model.cross(X, X.flip(0))
        assert torch.allclose(q, kept + model.a(kept), atol=1e-6)
        assert torch.equal(k, X.flip(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, lambda: float(torch.rand(()))],
    ids=["python", "numpy", "torch"],
)
def test_blocks_that_chance_passes_over_are_found(draw: Callable[[], float], training: bool) -> None:
    """LayerDrop in all spellings; the user's own draws go on as if nothing had been."""

    def passing(m: Any, x: Tensor) -> Tensor:
        for step in m.steps:
            if not (m.training and draw() < 0.5):
                x = step(x)
        return x

    random.seed(1)
    before = random.getstate()
    for _ in range(3):
        assert [r.name for r in surgeon.find(Net(passing).train(training), X)] == STEPS
    assert random.getstate() == before


def test_a_branch_costs_what_runs_for_it_alone() -> None:
    gates = {r.name: r.flops for r in surgeon.find(Net(two_way), (X, X.flip(0)))}
    assert gates["add"] == gates["add_2"]  # not the branches that made the stream which the second one reads
