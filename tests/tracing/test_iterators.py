"""Iterators: a look at a model takes nothing from them, and a forward that takes from one takes no gate."""

from collections.abc import Callable, Iterator
from itertools import chain, count, cycle
from typing import Any

import pytest
import torch
from blocks import Branch, Plain, X
from torch import Tensor, nn

import surgeon
from surgeon.errors import SurgeonError

IDS = count(1)
INNER = iter([float(i) for i in range(1000)])


class Box:
    def __init__(self, held: Any) -> None:
        self.held = held


class Takes(Branch):
    """Multiplies its branch by what it takes from somewhere."""

    of_the_class = count(1)

    def __init__(self, held: Any, take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.held, self.take = held, take

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.take(self)


def closed() -> Callable[[Any], Any]:
    own = count(1)
    return lambda _: next(own)


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "counter": (lambda: count(1), lambda s: next(s.held)),
    "cycle": (lambda: cycle([1.0, 2.0, 3.0]), lambda s: next(s.held)),
    "list iterator": (lambda: iter([1.0] * 99), lambda s: next(s.held)),
    "zip": (lambda: zip(range(99), range(99), strict=True), lambda s: next(s.held)[0]),
    "enumerate": (lambda: enumerate(range(99)), lambda s: next(s.held)[0]),
    "map": (lambda: map(float, range(99)), lambda s: next(s.held)),
    "chain": (lambda: chain([1.0] * 9, [2.0] * 9), lambda s: next(s.held)),
    "in a list": (lambda: [count(1)], lambda s: next(s.held[0])),
    "in a dict": (lambda: {"ids": count(1)}, lambda s: next(s.held["ids"])),
    "in an object": (lambda: Box(count(1)), lambda s: next(s.held.held)),
    "of the class": (lambda: None, lambda s: next(s.of_the_class)),
    "of the file": (lambda: None, lambda s: next(IDS)),
    "in a closure": (lambda: None, closed()),
    "in a loop": (
        lambda: iter([1.0] * 99),
        lambda s: next(k for k, _ in zip(s.held, range(1), strict=False)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_forward_that_takes_from_an_iterator_takes_no_gate(case: str) -> None:
    make, take = CASES[case]
    held = make()
    block = Takes(held, take)
    before = [repr(thing) for thing in (IDS, Takes.of_the_class, held, getattr(held, "held", None))]
    findings = surgeon.find(nn.Sequential(nn.Linear(4, 4), block, Plain()), X)
    assert [r.name for r in findings] == ["2.add"]
    reason = next(r.reason for r in findings.refused if r.block == "1")
    assert "which each call moves on" in reason or "decides what runs" in reason
    assert block.held is held
    assert [repr(thing) for thing in (IDS, Takes.of_the_class, held, getattr(held, "held", None))] == before


def test_nothing_is_taken_from_an_iterator() -> None:
    """Also of those whose state no repr tells."""
    ids = iter(range(10))
    surgeon.find(nn.Sequential(nn.Linear(4, 4), Takes(ids, lambda s: next(s.held)), Plain()), X)
    assert list(ids) == list(range(10))


def numbers() -> Iterator[float]:
    yield from (float(i) for i in range(9))


def test_a_generator_cannot_be_put_back() -> None:
    ids = numbers()
    block = Takes(ids, lambda s: next(s.held))
    with pytest.raises(SurgeonError, match=r"takes from self.held, a generator"):
        surgeon.apply(block, example=X)
    assert next(ids) == 0
    assert block.held is ids


def test_a_generator_that_no_forward_takes_from_is_no_hindrance() -> None:
    ids = numbers()
    block = Takes(ids, lambda s: 1.0)
    surgeon.apply(block, drop_rate=0.0, example=X)
    torch.testing.assert_close(block(X), X + block.f(X))
    assert next(block.held) == 0
