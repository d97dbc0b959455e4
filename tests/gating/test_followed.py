"""More of what a forward reads, writes and gives back: followed call after call, or no gate goes in."""

import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blocks import Branch, Of, X, coins
from torch import Tensor, nn

import surgeon
from surgeon.errors import SurgeonError

ACTIVATIONS = {"a": torch.tanh, "b": torch.relu}


def branch() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def activated(m: Any, x: Tensor) -> Tensor:
    return x + (m.f(x) if m.act is None else m.act(m.f(x)))


def scaled(m: Any, x: Tensor) -> Tensor:
    return x + (m.f(x) if m.gain is None else m.gain * m.f(x))


def by_class(m: Any, x: Tensor) -> Tensor:
    return x + m.f(x) * (1.0 if type(m.f[1]).__name__ == "Tanh" else 3.0)


def by_table(m: Any, x: Tensor) -> Tensor:
    return x + ACTIVATIONS["a"](m.f(x))


FOLLOWED: dict[str, tuple[Callable[..., Tensor], dict[str, Any], Callable[[Any], object]]] = {
    "a child that goes": (activated, {"act": nn.ReLU()}, lambda m: setattr(m, "act", None)),
    "a weight that goes": (scaled, {"gain": torch.full((4,), 2.0)}, lambda m: setattr(m, "gain", None)),
    "the class of an item": (by_class, {}, lambda m: m.f.__setitem__(1, nn.ReLU())),
    "a function in a table": (by_table, {}, lambda _: ACTIVATIONS.update(a=torch.relu)),
}


@pytest.mark.parametrize("what", FOLLOWED)
def test_a_change_is_followed(what: str) -> None:
    function, parts, change = FOLLOWED[what]
    model = Of(function, f=branch(), **parts)
    before = function(model, X)
    surgeon.apply(model, drop_rate=0.0, unit="batch", example=X)
    torch.testing.assert_close(model(X), before)
    change(model)
    expected = function(model, X)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(model(X), expected)
    ACTIVATIONS.update(a=torch.tanh)


class Queues(nn.Module):
    """Changes a list that it shares with its caller, and a number of its caller's."""

    def __init__(self, caller: Any) -> None:
        super().__init__()
        self.f, self.queue, self.callers = branch(), caller.queue, [caller]

    def forward(self, x: Tensor) -> Tensor:
        self.queue.append(1)
        self.callers[0].calls += 1
        result: Tensor = self.f(x)
        return result


class Counts(Branch):
    """Reads in its forward what ``how`` says."""

    def __init__(self, how: Callable[[Any], float]) -> None:
        super().__init__()
        self.how, self.queue, self.calls = how, [1], 0
        self.numbers, self.bytes = np.zeros(2), bytearray(2)
        self.child = Queues(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(x)
        return x + y * self.how(self)


def counted(held: Any) -> float:
    held[0] += 1
    return float(held[0])


CHANGED: dict[str, tuple[Callable[[Any], float], str]] = {
    "an array": (lambda m: counted(m.numbers), "changes self.numbers"),
    "bytes": (lambda m: counted(m.bytes), "changes self.bytes"),
    "a list that a child has, too": (lambda m: len(m.queue), "reads self.queue, which a layer changes"),
    "a number that a child changes": (lambda m: m.calls, "reads self.calls, which a layer changes"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_forward_that_reads_what_changes_takes_no_gate(what: str) -> None:
    how, message = CHANGED[what]
    block = Counts(how)
    found = surgeon.find(nn.Sequential(nn.Linear(4, 4), block), X)
    assert not len(found)
    assert message in found.refused[0].reason
    assert (block.queue, block.calls) == ([1], 0)
    assert not block.numbers.any() and block.bytes == bytearray(2)


def test_what_a_child_changes_unread_is_no_hindrance() -> None:
    block = Counts(lambda _: 2.0)
    surgeon.apply(nn.Sequential(block), drop_rate=0.0, unit="batch", example=X)
    torch.testing.assert_close(block(X), X + block.child.f(X) * 2)
    assert block.calls == 1


class Logs(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.log = io.StringIO()

    def forward(self, x: Tensor) -> Tensor:
        self.log.write("called ")
        result: Tensor = self.f(x)
        return result


def test_a_log_that_a_child_writes_is_no_hindrance() -> None:
    model = Of(lambda m, x: x + m.g(x), g=Logs())
    assert len(surgeon.find(model, X)) == 1
    own = surgeon.find(Of(lambda m, x: x + m.f(x) * bool(m.g.log.write("")), f=branch(), g=Logs()), X)
    assert "takes from self.g.log, a StringIO" in own.refused[0].reason


def test_a_norm_that_looks_at_its_count_is_no_hindrance() -> None:
    """``momentum=None`` takes the mean of all batches: its forward reads a number that no fake tensor has."""
    model = Of(lambda m, x: x + m.f(x), f=nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4, momentum=None)))
    surgeon.apply(model, drop_rate=0.0, unit="batch", example=X)
    expected = X + model.f(X)
    model.f[1].reset_running_stats()
    torch.testing.assert_close(model(X), expected)
    assert model.f[1].num_batches_tracked == 1


def test_a_check_of_sizes_is_made_in_each_call() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch._check(x.shape[-1] == 4 and len(x) < 5, lambda: "too many rows")
        return x + m.f(x)

    model = Of(forward, f=branch())
    surgeon.apply(model, drop_rate=0.0, unit="batch", example=X)
    torch.testing.assert_close(model(X), forward(model, X))
    with pytest.raises((RuntimeError, SurgeonError), match="too many rows"):
        model(torch.randn(9, 4))


class Result(OrderedDict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Pieces(list[Any]):
    pass


class Both(tuple[Any, ...]):
    __slots__ = ()


class Kept(dict[str, Any]):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize("kind", [Result, Pieces, Both])
def test_a_nest_of_a_class_of_its_own_is_given_back_as_such(kind: Callable[[Any], Any]) -> None:
    named = kind is Result

    def forward(m: Any, x: Tensor) -> Any:
        y = x + m.f(x)
        return kind({"out": y, "extra": (y, 2)} if named else [y, (y, 2)])

    model = Of(forward, f=branch())
    surgeon.apply(model, drop_rate=0.0, unit="batch", example=X)
    out = model(X)
    assert type(out) is kind
    torch.testing.assert_close(out.out if named else out[0], X + model.f(X))


def test_a_nest_that_cannot_be_made_anew_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        out = Kept()
        out["y"] = x + m.f(x)
        return out

    [refused] = surgeon.find(Of(forward, f=branch()), X).refused
    assert "hands on a Kept" in refused.reason


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("unit", "skip"), [("batch", True), ("sample", True), ("sample", False)])
@pytest.mark.parametrize("onto", [False, True])
def test_a_sum_lies_in_memory_as_it_did(unit: Any, skip: bool, kept: bool, onto: bool) -> None:
    """A shortcut may lie otherwise: a view of the sum, which is fine without gates, must not fail then."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        y = m.f(x.contiguous())
        if onto:
            y += x
        else:
            y = y + x
        return y.view(len(x), -1)

    model, x = Of(forward, f=branch()), torch.randn(3, 4, 5)
    surgeon.apply(model, "uniform", drop_rate=0.5, unit=unit, skip=skip, scaling="paper", example=x)
    turned = x.transpose(1, 2)
    for factor in (float(kept), 0.5):
        with coins(kept):
            torch.testing.assert_close(model(x), (factor * model.f(turned) + turned).reshape(3, -1))
        model.eval()
