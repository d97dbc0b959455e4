"""What a forward reads without asking its module decides what runs as well: changes are followed."""

import argparse
import copy
import pickle
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from blocks import Branch, X, randomise
from torch import Tensor, nn

import surgeon

THREE = False
SETTINGS = types.SimpleNamespace(three=False)
ARGUMENTS = argparse.Namespace(three=False)
TABLE = {"three": False}


class Settings:
    three = False


class Nested:
    inner = Settings


class Helper:
    @staticmethod
    def amount() -> int:
        return 3 if THREE else 1


HELPERS = types.ModuleType("helpers_of_a_test")
HELPERS.amount = Helper.amount  # type: ignore[attr-defined]
RENEWED = types.SimpleNamespace(three=False)
COUNTED = 0


def times_three() -> bool:
    return THREE


class Base(Branch):
    def scaled(self, x: Tensor) -> Tensor:
        return self.f(x) * (3 if THREE else 1)  # type: ignore[no-any-return]


class Block(Base):
    three, settings = False, Settings

    def scaled(self, x: Tensor) -> Tensor:
        return super().scaled(x)

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("gain", None)
        self.register_buffer("mask", None)
        self.ask: Callable[[], bool] = lambda: TABLE["three"]

    @property
    def asked(self) -> bool:
        return THREE

    def amount(self) -> int:
        return 3 if self.asked else 1


def held_in_a_cell() -> tuple[type[nn.Module], Callable[[], None]]:
    three = False

    class Closed(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return x + (self.f(x) * 3 if three else self.f(x))

    def change() -> None:
        nonlocal three
        three = True

    return Closed, change


def file(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda _: setattr(sys.modules[__name__], name, value)


Body = Callable[[Any, Tensor], Tensor]
CHANGES: dict[str, tuple[Body, Callable[[Any], None]]] = {
    "a global": (lambda s, x: s.f(x) * (3 if THREE else 1), file("THREE", True)),
    "a global in a function": (lambda s, x: s.f(x) * (3 if times_three() else 1), file("THREE", True)),
    "a global in a property": (lambda s, x: s.f(x) * s.amount(), file("THREE", True)),
    "a namespace": (
        lambda s, x: s.f(x) * (3 if SETTINGS.three else 1),
        lambda _: setattr(SETTINGS, "three", True),
    ),
    "arguments": (
        lambda s, x: s.f(x) * (3 if ARGUMENTS.three else 1),
        lambda _: setattr(ARGUMENTS, "three", True),
    ),
    "a dict": (lambda s, x: s.f(x) * (3 if TABLE["three"] else 1), lambda _: TABLE.update(three=True)),
    "a class of settings": (
        lambda s, x: s.f(x) * (3 if Settings.three else 1),
        lambda _: setattr(Settings, "three", True),
    ),
    "settings in settings": (
        lambda s, x: s.f(x) * (3 if Nested.inner.three else 1),
        lambda _: setattr(Settings, "three", True),
    ),
    "settings of its class": (
        lambda s, x: s.f(x) * (3 if s.settings.three else 1),
        lambda _: setattr(Settings, "three", True),
    ),
    "settings put in place of others": (
        lambda s, x: s.f(x) * (3 if RENEWED.three else 1),
        file("RENEWED", types.SimpleNamespace(three=True)),
    ),
    "a function of another file": (lambda s, x: s.f(x) * HELPERS.amount(), file("THREE", True)),
    "a static method": (lambda s, x: s.f(x) * Helper.amount(), file("THREE", True)),
    "a method of its base": (lambda s, x: s.scaled(x), file("THREE", True)),
    "a class attribute": (
        lambda s, x: s.f(x) * (3 if s.three else 1),
        lambda block: setattr(Made.of(block), "three", True),
    ),
    "a class attribute hidden by the block's": (
        lambda s, x: s.f(x) * (3 if s.three else 1),
        lambda block: setattr(block, "three", True),
    ),
    "its class": (
        lambda s, x: s.f(x) * (3 if type(s).three else 1),
        lambda block: setattr(Made.of(block), "three", True),
    ),
    "a function that it holds": (
        lambda s, x: s.f(x) * (3 if s.ask() else 1),
        lambda _: TABLE.update(three=True),
    ),
    "a parameter that was none": (
        lambda s, x: s.f(x) if s.gain is None else s.f(x) * s.gain,
        lambda block: setattr(block, "gain", nn.Parameter(torch.full((4,), 3.0))),
    ),
    "a buffer that was none": (
        lambda s, x: s.f(x) if s.mask is None else s.f(x) * s.mask,
        lambda block: setattr(block, "mask", torch.tensor([1.0, 0, 3, 1])),
    ),
    "a module that was missing": (
        lambda s, x: s.post(s.f(x)) if hasattr(s, "post") else s.f(x),
        lambda block: setattr(block, "post", nn.Linear(4, 4)),
    ),
    "the class of a child": (
        lambda s, x: s.f(x) * (1 if isinstance(s.f, nn.Sequential) else 3),
        lambda block: setattr(block, "f", nn.Linear(4, 4)),
    ),
    "a bias that a child had not": (
        lambda s, x: s.f(x) * (1 if s.f[0].bias is not None else 3),
        lambda block: setattr(block.f[0], "bias", nn.Parameter(torch.ones(4))),
    ),
}


class Made:
    """Blocks whose class is their own, so that a test may change it."""

    @staticmethod
    def block(body: Body) -> nn.Module:
        def forward(self: Any, x: Tensor) -> Tensor:
            return x + body(self, x)

        made: nn.Module = type("Own", (Block,), {"forward": forward, "three": False})()
        if "bias" in str(body.__code__.co_names):
            made.f[0].bias = None  # type: ignore[index]
        return made

    @staticmethod
    def of(block: nn.Module) -> type:
        return next(cls for cls in type(block).__mro__ if "three" in vars(cls))


@pytest.fixture(autouse=True)
def as_they_were() -> Iterator[None]:
    yield
    file("THREE", False)(nn.Identity())
    file("RENEWED", types.SimpleNamespace(three=False))(nn.Identity())
    SETTINGS.three = ARGUMENTS.three = TABLE["three"] = Settings.three = False


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_a_change_after_apply_is_followed(what: str, scaling: Any) -> None:
    body, change = CHANGES[what]
    block = randomise(Made.block(body))
    gated = surgeon.apply(block, drop_rate=0.0, scaling=scaling, example=X)
    before = gated(X)
    torch.manual_seed(0)
    change(gated)
    for training in (True, False):
        gated.train(training)
        torch.testing.assert_close(gated(X), gated._ungated_forward(X))  # type: ignore[operator]
        assert not torch.equal(gated(X), before)


def test_a_closure_is_followed() -> None:
    made, change = held_in_a_cell()
    gated = surgeon.apply(randomise(made()), drop_rate=0.0, example=X)
    gated(X)
    change()
    torch.testing.assert_close(gated(X), gated._ungated_forward(X))  # type: ignore[operator]


class Plainly(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * (3 if THREE else 1)


@pytest.mark.parametrize("kept", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_follow_as_well(kept: Callable[[nn.Module], nn.Module]) -> None:
    twin = kept(surgeon.apply(randomise(Plainly()), drop_rate=0.0, example=X))
    twin(X)
    file("THREE", True)(twin)
    torch.testing.assert_close(twin(X), twin._ungated_forward(X))  # type: ignore[operator]


class Tasks(nn.Module):
    """Which layer runs is for an attribute of its class to say."""

    task = "a"

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.a if self.task == "a" else self.b)(x.tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("both", [True, False])
def test_weights_that_an_attribute_chose_before_are_not_forgotten_by_a_fold(both: bool) -> None:
    model = surgeon.apply(randomise(Tasks()), drop_rate=0.5, scaling="paper", example=X).eval()
    if both:
        model.task = "b"  # type: ignore[assignment]
        model(X)
        model.task = "a"  # type: ignore[assignment]
        with pytest.warns(UserWarning, match="other values of its attributes, which run other weights"):
            folded = surgeon.fold(model)
    else:
        folded = surgeon.fold(model)
    for task in ("a", "b") if both else ("a",):
        model.task = folded.task = task  # type: ignore[assignment]
        torch.testing.assert_close(folded.eval()(X), model(X))


class Counting(Branch):
    def forward(self, x: Tensor) -> Tensor:
        global COUNTED  # noqa: PLW0603 - what is refused
        COUNTED += 1
        return x + self.f(x) * (3 if COUNTED % 2 else 1)


class CountingInItsClass(Branch):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).count += 1
        return x + self.f(x)


@pytest.mark.parametrize(("block", "what"), [(Counting, "COUNTED"), (CountingInItsClass, r"self\.count")])
def test_a_forward_that_changes_them_is_refused(block: type[nn.Module], what: str) -> None:
    """The generated forward would not."""
    findings = surgeon.find(nn.Sequential(Plainly(), block()), X)
    assert [r.name for r in findings] == ["0.add"]
    assert [r.code for r in findings.refused] == ["untraceable"]
    assert re.search(f"its forward changes {what}, which is not its own", findings.refused[0].reason)


ELSEWHERE = """
KINDS = {}
def kind(x):
    if type(x) not in KINDS:
        KINDS[type(x)] = object()
    return KINDS[type(x)]
COUNT = 0
def count():
    global COUNT
    COUNT += 1
    return COUNT
"""


@pytest.mark.parametrize(("what", "gates"), [("kind", 1), ("count", 0)])
@pytest.mark.parametrize("package", ["of_somebody_else", __name__])
def test_what_another_package_notes_for_itself_is_no_hindrance(what: str, gates: int, package: str) -> None:
    """Such as which kinds of tensors there are. A count is no such note, nor is what is one's own."""
    there: dict[str, Any] = {"__name__": package}
    exec(ELSEWHERE, there)  # noqa: S102 - a file of another package

    function = there[what]

    class Uses(Branch):
        def forward(self, x: Tensor) -> Tensor:
            factor = (function(x) and 2.0) if what == "kind" else function()
            return x + self.f(x) * factor

    found = surgeon.find(Uses(), X)
    assert len(found) == (gates if package != __name__ else 0)


class Odd(dict):  # type: ignore[type-arg]
    def values(self) -> Any:
        raise RuntimeError("not now")


ODD = Odd(a=1)


class NamesOddThings(Branch):
    def forward(self, x: Tensor) -> Tensor:
        if self.training is None:
            mock.call(ODD)
        return x + self.f(x)


def test_odd_things_in_the_file_are_left_alone() -> None:
    """An object that answers every attribute, one whose values are not to be had."""
    assert len(surgeon.find(NamesOddThings(), X)) == 1
