"""Code that is exchanged after ``apply``: the new one runs with gates, or a call says that it cannot.

The drop rate is zero, so that what a gated block gives must be what the new code gives.
"""

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import X, coins, randomise
from torch import Tensor, nn

import surgeon
from surgeon.errors import UnseenCallError


def helper(h: Tensor) -> Tensor:
    return h


class Parent(nn.Module):
    def inherited(self, h: Tensor) -> Tensor:
        return h


def fresh() -> type[nn.Module]:
    """A class of its own, so that a test may change it."""

    class Base(Parent):
        def of_base(self, h: Tensor) -> Tensor:
            return h

    class Block(Base):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.held: Callable[[Tensor], Tensor] = helper

        @property
        def factor(self) -> float:
            return 1.0

        @staticmethod
        def static(h: Tensor) -> Tensor:
            return h

        @classmethod
        def of_class(cls, h: Tensor) -> Tensor:
            return h

        def method(self, h: Tensor) -> Tensor:
            return h

        def forward(self, x: Tensor) -> Tensor:
            h = self.inherited(self.of_base(self.method(helper(self.f(x)))))
            return x + self.held(self.static(self.of_class(h))) * self.factor

        def fused(self, x: Tensor) -> Tensor:
            return x + 3 * self.f(x)

    return Block


def thrice(*given: Any) -> Tensor:
    found: Tensor = 3 * given[-1]
    return found


CHANGES: dict[str, Callable[[Any, type], None]] = {
    "the forward": lambda m, cls: setattr(cls, "forward", lambda s, x: x + 3 * s.f(x)),
    "a method": lambda m, cls: setattr(cls, "method", thrice),
    "a method of a base": lambda m, cls: setattr(cls.__mro__[1], "of_base", thrice),
    "a method that hides one": lambda m, cls: setattr(cls, "inherited", thrice),
    "a static method": lambda m, cls: setattr(cls, "static", staticmethod(thrice)),
    "a class method": lambda m, cls: setattr(cls, "of_class", classmethod(thrice)),
    "a property": lambda m, cls: setattr(cls, "factor", property(lambda s: 3.0)),
    "a function that it holds": lambda m, cls: setattr(m, "held", thrice),
    "a function of the file": lambda m, cls: globals().__setitem__("helper", thrice),
    "a method of the instance": lambda m, cls: setattr(m, "method", thrice),
    "the instance's forward": lambda m, cls: setattr(m, "forward", m.fused),
    "the instance's, a new one": lambda m, cls: setattr(
        m, "forward", types.MethodType(lambda s, x: x + 3 * s.f(x), m)
    ),
    "the instance's, a partial": lambda m, cls: setattr(m, "forward", functools.partial(cls.fused, m)),
}


@pytest.mark.parametrize("scaling", ["inverted", "paper"])
@pytest.mark.parametrize("what", CHANGES)
def test_the_new_code_runs(what: str, scaling: Any) -> None:
    cls, old = fresh(), helper
    model = randomise(nn.Sequential(cls()))
    surgeon.apply(model, drop_rate=0.0, unit="batch", scaling=scaling, example=X)
    model(X)
    try:
        CHANGES[what](model[0], cls)
        for training in (True, False):
            torch.testing.assert_close(model.train(training)(X), X + 3 * model[0].f(X))
    finally:
        globals()["helper"] = old


def test_gates_act_on_the_new_forward() -> None:
    model = randomise(fresh()())
    surgeon.apply(model, drop_rate=0.5, unit="batch", example=X)
    model.forward = model.fused
    for kept in (True, False):
        with coins(kept):
            torch.testing.assert_close(model(X), X + (2 * 3 * model.f(X) if kept else 0))


def test_a_forward_around_the_gated_one_runs_as_it_is() -> None:
    """As accelerate puts its hooks on."""
    model = randomise(fresh()())
    surgeon.apply(model, drop_rate=0.5, unit="batch", example=X)
    inner, seen = model.forward, []

    def around(module: nn.Module, x: Tensor) -> Tensor:
        seen.append(module)
        found: Tensor = inner(x)
        return found

    model.forward = functools.update_wrapper(functools.partial(around, model), inner)
    with coins(False):
        torch.testing.assert_close(model(X), X)
    assert seen == [model]
    model.forward = inner
    with coins(False):
        torch.testing.assert_close(model(X), X)
    assert len(seen) == 1


def test_a_forward_that_passes_the_gates_by_is_told() -> None:
    model = randomise(fresh()())
    surgeon.apply(model, drop_rate=0.5, unit="batch", example=X)
    model.forward = lambda x: x + model.f(x)
    with pytest.raises(UnseenCallError, match=r"replaced on the instance after.*surgeon.remove"):
        model(X)
    torch.testing.assert_close(model.eval()(X), X + model.f(X))  # nothing is lost there
    del model.forward
    model.train()(X)


@pytest.mark.parametrize("fold", [False, True])
def test_it_stays_when_the_gates_go(fold: bool) -> None:
    model: Any = randomise(fresh()())
    surgeon.apply(model, drop_rate=0.5, unit="batch", scaling="paper", example=X)
    model.forward = model.fused
    expected = model.eval()(X)
    ended: Any = surgeon.fold(model, example=X) if fold else surgeon.remove(copy.deepcopy(model))
    torch.testing.assert_close(ended(X), expected if fold else X + 3 * ended.f(X))


class Pickled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def fused(self, x: Tensor) -> Tensor:
        return x + 3 * self.f(x)


@pytest.mark.parametrize("kept", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_copies_have_it_too(kept: Callable[[nn.Module], nn.Module]) -> None:
    model = surgeon.apply(randomise(Pickled()), drop_rate=0.0, unit="batch", example=X)
    model.forward = model.fused
    twin = kept(model)
    with torch.no_grad():
        twin.f[2].bias.add_(1)  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(twin(X), X + 3 * twin.f(X))  # type: ignore[operator]


# --- hooks that write in place ----------------------------------------------------------------------


class Skips(nn.Module):
    """What the block gets is read again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.inner, self.next = nn.Linear(4, 4), nn.Sequential(Pickled()), nn.Identity()
        self.d = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        e = self.e(x)
        found: Tensor = self.d(torch.cat([e, self.next(self.inner(e))], -1))
        return found


def doubles(*given: Any) -> None:
    given[-1].mul_(2)


def doubles_first(_: Any, given: tuple[Tensor]) -> None:
    given[0].mul_(2)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "of the block": lambda m: m.inner[0].register_forward_hook(doubles),
    "in every case": lambda m: m.inner[0].register_forward_hook(doubles, always_call=True),
    "with keywords": lambda m: m.inner[0].register_forward_hook(doubles, with_kwargs=True),
    "around the block": lambda m: m.inner.register_forward_hook(doubles),
    "before what follows": lambda m: m.next.register_forward_pre_hook(doubles_first),
    "after what follows": lambda m: m.next.register_forward_hook(doubles),
    "of every module": lambda m: nn.modules.module.register_module_forward_hook(
        lambda module, _, out: out.mul_(2) if module is m.inner[0] else None
    ),
}


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_writes_to_no_shortcut(hook: str, unit: Any) -> None:
    model = randomise(Skips())
    surgeon.apply(model, schedule=[0.999], unit=unit, skip=True, example=X)
    handle = HOOKS[hook](model)
    try:
        with torch.no_grad(), coins(False):
            e = model.e(X)
            torch.testing.assert_close(model(X), model.d(torch.cat([e, 2 * e], -1)))
    finally:
        handle.remove()


def test_what_was_handed_in_is_not_handed_out() -> None:
    model = randomise(Pickled())
    surgeon.apply(model, drop_rate=0.5, unit="batch", example=X)
    given = X.clone()
    with torch.no_grad(), coins(False):
        model(given).mul_(2)
    assert torch.equal(given, X)


# --- what no look tells -----------------------------------------------------------------------------


def test_retrace_forgets() -> None:
    outside = {"factor": 1.0}

    class Hidden:
        def __getattr__(self, name: str) -> float:
            return outside["factor"]

    class Block(Pickled):
        hidden = tuple(Hidden() for _ in range(100))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * self.hidden[7].k

    model = randomise(nn.Sequential(Block()))
    surgeon.apply(model, drop_rate=0.0, unit="batch", example=X)
    model(X)
    outside["factor"] = 3.0
    assert surgeon.retrace(model) is model
    torch.testing.assert_close(model(X), X + 3 * model[0].f(X))
    assert surgeon.retrace(nn.Linear(4, 4)) is not None
