"""What a traced forward reads from modules and leaves on them: noticed, kept in the key, or refused."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocks import Branch, Net, Plain, coins, randomise, same
from torch import Tensor, nn

import surgeon

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


# --- values left behind ---------------------------------------------------------------------------


class AppendsToItself(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.cache.append(x)
        return x + self.f(x)


class StoresInItsDict(AppendsToItself):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["last"] = x
        return x + self.f(x)


class AssignsABuffer(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x + self.f(x)


class AssignsOnAChild(Branch):
    def forward(self, x: Tensor) -> Tensor:
        self.f.last = x
        return x + self.f(x)


@pytest.mark.parametrize(
    ("block", "where"),
    [
        (AppendsToItself, "self.cache"),
        (StoresInItsDict, "self.seen"),
        (AssignsABuffer, "self.mean"),
        (AssignsOnAChild, "self.f.last"),
    ],
)
def test_values_kept_on_a_module_stop_its_trace(block: type[nn.Module], where: str) -> None:
    model = nn.Sequential(block(), Plain())
    findings = surgeon.find(model, X)
    assert [r.name for r in findings] == ["1.add"]
    (refusal,) = (r for r in findings.refused if r.code == "untraceable")
    assert refusal.block == "0"
    assert where in refusal.reason


class KeepsInADeque(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.last: deque[Tensor] = deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(y := self.f(x))
        return x + y


class KeepsInAnObject(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.cache = SimpleNamespace(last=None, all=[])

    def forward(self, x: Tensor) -> Tensor:
        self.cache.last = y = self.f(x)
        self.cache.all.append(y)
        return x + y


def test_nothing_of_the_analysis_stays_in_what_modules_hold() -> None:
    model = nn.Sequential(
        AppendsToItself(), StoresInItsDict(), AssignsABuffer(), KeepsInADeque(), KeepsInAnObject(), Plain()
    )
    surgeon.apply(model, example=X)
    assert model[0].cache == []
    assert model[1].seen == {}
    assert torch.equal(model[2].mean, torch.zeros(4))
    assert len(model[3].last) == 0
    assert model[4].cache == SimpleNamespace(last=None, all=[])


class Frozen(dict[str, int]):
    """As diffusers keeps its configuration."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("frozen")

    __setitem__ = __delitem__ = clear = update = pop = setdefault = _refuse


def test_a_dict_that_cannot_be_written_to_is_no_hindrance() -> None:
    model = Plain()
    model.config = Frozen(width=4)
    surgeon.remove(surgeon.apply(model, example=X, scaling="paper", keep_eval=True))
    assert model.config == {"width": 4}


class Shared(Branch):
    """Reads from a list what it appended before, in the order of its lines."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        b = self.f(cache[-1])
        cache.append(2 * x)
        return x + b


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Shared()
        self.plain = Plain()

    def forward(self, x: Tensor) -> Tensor:
        cache = [x]
        return self.plain(self.block(x, cache)) + 0 * cache[-1].sum()


def test_a_list_that_is_handed_in_and_changed_is_refused() -> None:
    findings = surgeon.find(Caller(), X)
    assert [r.name for r in findings] == ["plain.add"]
    refusal = next(r for r in findings.refused if r.name == "block.add")
    assert refusal.code == "untraceable"
    assert "changes a list that it was given" in refusal.reason


@dataclass
class Details:
    """What x-transformers' attention hands on beside its result."""

    features: Tensor
    kind: str = ""


class Detailed(Branch):
    def forward(self, x: Tensor) -> tuple[Tensor, Details]:
        y = self.f(x)
        return y, Details(y)


class NamesDetails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Detailed(), Plain().f

    def forward(self, x: Tensor) -> Tensor:
        y, details = self.f(x)
        details.kind = "first"
        x = x + y
        if details.kind == "first":
            x = x + self.g(x)
        return x


def test_a_word_may_be_written_into_what_a_child_has_made() -> None:
    model = NamesDetails()
    gates = surgeon.status(surgeon.apply(model, unit="batch", drop_rate=0.5, example=X, skip=True)).gates
    assert [gate.name for gate in gates] == ["add", "add_1"]
    for kept in (True, False):
        with coins(kept):
            expected = (X + 2 * model.f.f(X)) if kept else X
            expected = expected + 2 * model.g(expected) if kept else expected
            assert same(model(X), expected)


class NamesItsArgument(Branch):
    def forward(self, x: Details) -> Tensor:
        x.kind = "seen"
        return x.features + self.f(x.features)


def test_nothing_may_be_written_into_an_argument() -> None:
    given = Details(X)
    with pytest.raises(surgeon.SurgeonError, match="assigns the attribute kind of a Details"):
        surgeon.apply(NamesItsArgument(), example=(given,))
    assert given.kind == ""


# --- plain attributes of children -------------------------------------------------------------------


class Rate(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.double = rate, False

    def scaled(self, x: Tensor) -> Tensor:
        return x * (2 * self.rate if self.double else self.rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)


class ReadsAChild(Branch):
    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.child = nn.ModuleList([Rate(rate)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.child[0].rate


class InlinesAChild(ReadsAChild):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.child[0].scaled(self.f(x))


class CallsAChild(ReadsAChild):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.child[0](self.f(x))


@pytest.mark.parametrize("kind", [ReadsAChild, InlinesAChild, CallsAChild])
def test_a_number_of_a_child_may_change_after_apply(kind: Callable[..., Any]) -> None:
    model = randomise(Net(kind()))
    gated = surgeon.apply(model, "uniform", drop_rate=0.0, example=X)
    block = next(m for m in gated.modules() if isinstance(m, kind))
    for rate, double in ((0.5, False), (3.0, False), (3.0, True)):
        block.child[0].rate, block.child[0].double = rate, double
        expected = by_its_own_forward(gated, block)
        with coins(True):
            assert same(gated(X), expected)


def by_its_own_forward(model: nn.Module, block: nn.Module) -> Tensor:
    """The model's result with the block's own forward."""
    cls = type(block)
    block.__class__ = cls._ungated
    try:
        return model(X)
    finally:
        block.__class__ = cls


def test_blocks_that_differ_in_a_number_that_is_read_do_not_share_a_trace() -> None:
    model = randomise(nn.Sequential(ReadsAChild(0.5), ReadsAChild(2.0), ReadsAChild(0.5)))
    expected = model(X)
    gated = surgeon.apply(model, "uniform", drop_rate=0.0, example=X)
    with coins(True):
        assert same(gated(X), expected)


class Steps(Branch):
    """The number decides which code runs."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if self.rate < 1 else torch.cat([self.f(x)[:1], x[1:]])


def test_blocks_on_different_paths_do_not_share_a_trace() -> None:
    findings = surgeon.find(nn.Sequential(Steps(0.5), Steps(2.0), Steps(0.5), Steps(0.25)), X)
    assert [r.name for r in findings] == ["0.add", "2.add", "3.add"]
