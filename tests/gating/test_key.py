"""What decides which code a gated block runs: a change of it after ``apply`` is followed, or refused by name.

Each model is gated with a drop rate of zero, so that with every coin kept its result must be the plain one's.
"""

# ruff: noqa: S311, NPY002 - these generators are what is tested

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from blocks import Branch, Plain, X, randomise
from torch import Tensor, nn

import surgeon
from surgeon._gating.block import gating_of
from surgeon._tracing.state import draws


def follows(block: nn.Module, example: tuple[Any, ...], later: tuple[Any, ...], **options: Any) -> None:
    """A gated block does as its own forward does, on the example and on a later call, over and over."""
    gated = surgeon.apply(randomise(block), drop_rate=0.0, example=example, **options)
    for training in (True, False):
        gated.train(training)
        for given in (example, later, example, later):
            torch.testing.assert_close(gated(*given), by_its_own_forward(gated, *given))


def by_its_own_forward(block: Any, *given: Any) -> Tensor:
    result: Tensor = block._ungated_forward(*given)
    return result


def refused(block: nn.Module, *given: Any) -> str:
    """Why no gate goes in; the one beside it does."""
    findings = surgeon.find(_Both(block), (X, *given))
    assert [r.name for r in findings] == ["plain.add"]
    return next(r.reason for r in findings.refused if r.code == "untraceable")


class _Both(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.plain = block, Plain()

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        found = self.block(x, *given)
        return self.plain(found)  # type: ignore[no-any-return]


# --- arguments ------------------------------------------------------------------------------------


class Context:
    def __init__(self, flag: bool = False, steps: int = 1, **more: Any) -> None:
        self.flag, self.steps = flag, steps
        self.__dict__.update(more)

    def doubles(self) -> bool:
        return self.flag

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__


class Slotted:
    __slots__ = ("flag",)

    def __init__(self, flag: bool) -> None:
        self.flag = flag


class Flag(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y = self.f(x)
        return x + (2 * y if c.flag else y)


class Inner(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y = self.f(x)
        return x + (2 * y if c.inner[0].flag else y)


class Steps(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y = x
        for _ in range(c.steps):
            y = self.f(y)
        return x + y


class Asks(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y = self.f(x)
        return x + (2 * y if c.doubles() else y)


class Holds(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y = self.f(x)
        return x + (2 * y if "scale" in c else y)


class Has(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y = self.f(x)
        return x + (y * c.scale if hasattr(c, "scale") else y)


class Rank(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y = self.f(x)
        return x + (y * c.scale if c.scale.ndim == 1 else y * c.scale.sum(0))


class Each(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y = x
        for _ in c:
            y = self.f(y)
        return x + y


class Adder(Branch):
    def forward(self, x: Tensor, c: Any) -> Tensor:
        y: Tensor = c.add(self.f(x))
        return x + y


ARGUMENTS = {
    "flag": (Flag, Context(False), Context(True)),
    "flag in a slot": (Flag, Slotted(False), Slotted(True)),
    "flag of a namespace": (Flag, SimpleNamespace(flag=False), SimpleNamespace(flag=True)),
    "flag further in": (
        Inner,
        SimpleNamespace(inner=[Context(False)]),
        SimpleNamespace(inner=[Context(True)]),
    ),
    "number": (Steps, Context(steps=1), Context(steps=3)),
    "answer of a method": (Asks, Context(False), Context(True)),
    "name in an object": (Holds, Context(), Context(scale=2.0)),
    "item of a set": (Holds, {"a"}, {"scale"}),
    "there or not": (Has, Context(), Context(scale=torch.ones(4) * 3)),
    "rank": (Rank, Context(scale=torch.ones(4)), Context(scale=torch.ones(2, 4))),
    "a method called add": (Adder, SimpleNamespace(add=torch.sin), SimpleNamespace(add=torch.cos)),
    "size of a set": (Each, {1}, {1, 2}),
    "length of a range": (Each, range(1), range(3)),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_what_is_read_of_an_argument_is_followed(case: str) -> None:
    block, example, later = ARGUMENTS[case]
    follows(block(), (X, example), (X, later))


def test_what_is_read_of_an_argument_is_followed_in_evaluation() -> None:
    follows(Flag(), (X, Context(False)), (X, Context(True)), scaling="paper")


def test_what_is_not_read_of_an_argument_costs_no_trace() -> None:
    gated = surgeon.apply(Flag(), drop_rate=0.0, example=(X, Context(step=0)))
    for step in range(4):
        gated(X, Context(step=step))
    gating = gating_of(gated)
    assert gating is not None
    assert len(gating.runs) == 1


# --- what nothing follows ---------------------------------------------------------------------------


class PythonCoin(Branch):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return x + self.f(x)


class NumpyDepth(Branch):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(np.random.randint(1, 4)):
            y = self.f(y)
        return x + y


class GivenGenerator(Branch):
    def forward(self, x: Tensor, rng: Any) -> Tensor:
        y = self.f(x)
        return x + (y.flip(-1) if rng.random() < 0.5 else y)


@pytest.mark.parametrize("rng", [random.Random(0), np.random.default_rng(0)], ids=["python", "numpy"])
def test_a_generator_that_is_handed_in_and_asked_stops_a_trace(rng: Any) -> None:
    assert "draws random numbers" in refused(GivenGenerator(), rng)


class OwnGenerator(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + (y.flip(-1) if self.rng.random() < 0.5 else y)


class Coin(nn.Module):
    def forward(self) -> bool:
        return random.random() < 0.5


class CoinOfAChild(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.coin = Coin()

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(x).flip(-1) if self.coin() else self.f(x))


@pytest.mark.parametrize("block", [PythonCoin, NumpyDepth, OwnGenerator, CoinOfAChild])
def test_random_numbers_of_python_and_numpy_stop_a_trace(block: Callable[[], nn.Module]) -> None:
    random.seed(0)  # with which the example's call adds
    before = draws()
    assert "draws random numbers" in refused(block())
    assert draws() == before


class Jitters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + random.random())


class DrawsInAChild(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.jitter = Jitters()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.jitter(self.f(x))


def test_random_numbers_of_a_child_are_drawn_at_each_call() -> None:
    gated = surgeon.apply(randomise(DrawsInAChild()), drop_rate=0.0, example=X)
    for seed in range(3):
        random.seed(seed)
        found = gated(X)
        random.seed(seed)
        torch.testing.assert_close(found, by_its_own_forward(gated, X))
    rows = torch.stack([X, X])  # a call of another kind, for which the child runs in the trace
    random.seed(0)
    found = gated(rows)
    random.seed(0)
    torch.testing.assert_close(found, by_its_own_forward(gated, rows))


@dataclass
class Losses:
    aux: Tensor
    count: int = 0

    def add(self, loss: Tensor) -> None:
        self.aux = self.aux + loss


class Assigns(Branch):
    def forward(self, x: Tensor, c: Losses) -> Tensor:
        y = self.f(x)
        c.aux = c.aux + y.mean()
        return x + y


class Counts(Branch):
    def forward(self, x: Tensor, c: Losses) -> Tensor:
        c.count += 1
        return x + self.f(x)


class Adds(Branch):
    def forward(self, x: Tensor, c: Losses) -> Tensor:
        y = self.f(x)
        c.add(y.mean())
        return x + y


@pytest.mark.parametrize("block", [Assigns, Counts, Adds])
def test_a_change_of_an_argument_stops_a_trace(block: Callable[[], nn.Module]) -> None:
    given = Losses(torch.zeros(()))
    assert re.search(r"(attribute \w+ of|changes) a Losses", refused(block(), given))
    assert torch.equal(given.aux, torch.zeros(()))
    assert given.count == 0


SEEN: list[Any] = []


class Appends(Branch):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        SEEN.append({"aux": y.mean()})
        return x + y


def test_a_value_kept_outside_of_the_block_stops_a_trace() -> None:
    assert "changes SEEN, which is not its own" in refused(Appends())


# --- modules ----------------------------------------------------------------------------------------


class Config:
    def __init__(self) -> None:
        self.pre, self.step = True, 0
        self.deep = SimpleNamespace(scales=[1.0, 2.0])

    @property
    def post(self) -> bool:
        return not self.pre


class Configured(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = Config()
        self.scales, self.act = [1.0, 1.0], torch.relu
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.frozen = nn.Parameter(torch.ones(4))

    def plus(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class ReadsPre(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x, self.f(x) if self.cfg.pre else -self.f(x))


class ReadsProperty(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x, -self.f(x) if self.cfg.post else self.f(x))


class ReadsDeep(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x, self.f(x) * self.cfg.deep.scales[1])


class ReadsVars(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x, self.f(x) if vars(self.cfg)["pre"] else -self.f(x))


class ReadsList(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x * self.scales[0], self.f(x) * self.scales[1])


class ReadsFunction(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x, self.act(self.f(x)))


class ReadsLayers(Configured):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        for layer in self.layers:
            y = layer(y)
        return self.plus(x, y)


class ReadsFreezing(Configured):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return self.plus(x, 2 * y if self.frozen.requires_grad else y)


CHANGES: dict[type[Configured], Callable[[Any], Any]] = {
    ReadsPre: lambda b: setattr(b.cfg, "pre", False),
    ReadsProperty: lambda b: setattr(b.cfg, "pre", False),
    ReadsDeep: lambda b: b.cfg.deep.scales.__setitem__(1, 5.0),
    ReadsVars: lambda b: setattr(b.cfg, "pre", False),
    ReadsList: lambda b: b.scales.__setitem__(1, 3.0),
    ReadsFunction: lambda b: setattr(b, "act", torch.tanh),
    ReadsLayers: lambda b: b.layers.append(nn.Linear(4, 4)),
    ReadsFreezing: lambda b: b.frozen.requires_grad_(False),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_what_is_read_of_a_module_is_followed(kind: type[Configured], scaling: str) -> None:
    gated = surgeon.apply(randomise(kind()), drop_rate=0.0, scaling=scaling, example=X)
    before = by_its_own_forward(gated, X)
    torch.testing.assert_close(gated(X), before)
    CHANGES[kind](gated)
    assert not torch.allclose(before, by_its_own_forward(gated, X))
    for training in (True, False):
        torch.testing.assert_close(gated.train(training)(X), by_its_own_forward(gated, X))


def test_what_is_not_read_of_an_object_costs_no_trace() -> None:
    gated = surgeon.apply(randomise(ReadsPre()), drop_rate=0.0, example=X)
    for step in range(4):
        gated.cfg.step = step
        gated(X)
    gating = gating_of(gated)
    assert gating is not None
    assert len(gating.runs) == 1
    assert type(gated.cfg) is Config


class AssignsToItsConfig(Configured):
    def forward(self, x: Tensor) -> Tensor:
        self.cfg.step += 1
        return x + self.f(x)


def test_a_change_of_an_object_on_a_module_stops_a_trace() -> None:
    assert "assigns self.cfg.step" in refused(AssignsToItsConfig())


# --- gradients --------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 0.1


class ScalesGradients(Branch):
    def forward(self, x: Tensor) -> Tensor:
        h = Scaled.apply(x) if x.requires_grad else x
        return x + self.f(h)  # type: ignore[no-any-return]


def test_whether_an_argument_requires_a_gradient_is_followed() -> None:
    gated = surgeon.apply(randomise(ScalesGradients()), drop_rate=0.0, example=X)
    grads = []
    for run in (gated, lambda x: by_its_own_forward(gated, x)):
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(x).square().sum(), x)
        grads.append(grad)
    torch.testing.assert_close(*grads)


class AsksOfItsOwn(Branch):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + (2 * y if y.requires_grad else y)


def test_whether_a_value_of_its_own_requires_a_gradient_stops_a_trace() -> None:
    assert "requires a gradient" in refused(AsksOfItsOwn())
