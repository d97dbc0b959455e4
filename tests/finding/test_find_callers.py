"""Additions of two arguments: the caller, and so the recording, knows whether one is a shortcut."""

from typing import Any

import pytest
import timm
import torch
from blocks import coins, randomise, same
from torch import Tensor, nn

import surgeon

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Output(nn.Module):
    """The end of a branch and the addition, the shortcut handed in, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.dense(hidden) + residual


class Layer(nn.Module):
    """Calls the module that adds; ``long`` puts a residual add between the two arguments."""

    def __init__(self, *, long: bool = False, foreign: bool = False) -> None:
        super().__init__()
        self.first, self.output = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Output()
        self.inner = Layer() if long else None
        self.foreign = foreign

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.inner is not None:
            hidden = self.inner(hidden, other)
        return self.output(hidden, other if self.foreign else x)


class Body(nn.Module):
    """A whole branch and its addition, as in deep layer aggregation; ``head`` begins with a ReLU in place."""

    def __init__(self, *, head: bool = False) -> None:
        super().__init__()
        self.head = nn.ReLU(inplace=True) if head else None
        self.f = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
        )

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = x if self.head is None else self.head(x)
        return self.f(x) + shortcut


class Tree(nn.Module):
    """Makes the shortcut of `Body` from its input."""

    def __init__(self, project: nn.Module, **how: Any) -> None:
        super().__init__()
        self.project, self.body = project, Body(**how)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1  # what is handed on is no argument of the model
        return self.body(x, self.project(x))


def test_a_shortcut_handed_in_by_the_caller() -> None:
    model = Layer()
    found = surgeon.find(model, (X, X.clone()))
    assert [(r.name, r.kind, r.branch) for r in found] == [("output.add", "identity", "dense")]
    assert not found.refused
    surgeon.apply(model, example=(X, X.clone()))
    with coins(False):
        assert torch.equal(model.train()(X, X), X)


class Looks(nn.Module):
    """Looks into a mask, so that only real tensors can tell what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.all().item():
            mask = None
        x = x + 1
        for layer in self.layers:
            x = layer(x, x)
        return x


def test_a_shortcut_handed_in_where_values_decide() -> None:
    model = randomise(Looks())
    arguments = (X, torch.ones(3, dtype=torch.bool))
    expected = model.eval()(*arguments)
    found = surgeon.find(model, arguments)
    assert [(r.name, r.kind) for r in found] == [(f"layers.{i}.output.add", "identity") for i in range(2)]
    surgeon.apply(model, example=arguments, unit="batch")
    assert torch.equal(model(*arguments), expected)
    with coins(False):
        assert torch.equal(model.train()(*arguments), X + 1)


@pytest.mark.parametrize("options", [{"long": True}, {"foreign": True}], ids=str)
def test_what_is_handed_in_is_no_shortcut(options: dict[str, bool]) -> None:
    """Over another residual add it is a long skip; from elsewhere the branch is no function of it."""
    found = surgeon.find(Layer(**options), (X, X.clone()))
    assert [r.name for r in found] == (["inner.output.add"] if "long" in options else [])
    code = "long-skip" if "long" in options else "no-shortcut"
    assert ("output.add", code) in {(r.name, r.code) for r in found.refused}


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize(
    ("project", "kind"),
    [
        (nn.Identity(), "identity"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), "projection"),
        (nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 4, 1)), "projection"),
    ],
)
def test_a_shortcut_made_by_the_caller(project: nn.Module, kind: str, unit: str) -> None:
    model = randomise(Tree(project)).eval()
    found = surgeon.find(model, IMAGE)
    name = "identity" if kind == "identity" else "shortcut"
    assert [(r.name, r.kind, r.shortcut, r.branch) for r in found] == [("body.add", kind, name, "f")]
    assert not [r for r in found.refused if r.code != "bias"]
    before = model(IMAGE)
    surgeon.apply(model, unit=unit, example=IMAGE)
    assert torch.equal(model(IMAGE), before)
    with coins(False):
        assert same(model.train()(IMAGE), project.train()(IMAGE + 1))


def test_a_branch_that_writes_to_the_shortcut_it_shares() -> None:
    """The head of the branch changes the tensor that is both arguments, also when the branch is dropped."""
    model = Tree(nn.Identity(), head=True)
    surgeon.apply(model, example=IMAGE)
    with coins(False):
        assert torch.equal(model.train()(IMAGE), (IMAGE + 1).relu())


@pytest.mark.parametrize(
    "project",
    [
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)),
    ],
)
def test_a_second_branch_made_by_the_caller_is_no_shortcut(project: nn.Module) -> None:
    found = surgeon.find(Tree(project), IMAGE)
    assert not found.residuals and "no-shortcut" in {r.code for r in found.refused}


@pytest.mark.parametrize(
    "branch",
    [
        nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4)),
    ],
)
def test_two_projections_are_no_residual_add(branch: nn.Module) -> None:
    """An adapter beside the layer that the caller runs: neither side is more of a branch than the other."""
    model = Tree(nn.Conv2d(4, 4, 1))
    model.body.f = branch
    assert not surgeon.find(model, IMAGE).residuals


def test_halves_of_one_tensor_are_not_one_tensor() -> None:
    """They share memory, but neither is made of the other: the coupling of a reversible block."""

    class Coupling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = Output()

        def forward(self, x: Tensor) -> Tensor:
            return self.output(*x.tanh().chunk(2, -1))

    found = surgeon.find(Coupling(), torch.zeros(3, 8))
    assert not found.residuals and [r.code for r in found.refused] == ["no-shortcut"]


def test_a_table_that_both_sides_add_is_no_tensor_handed_in_twice() -> None:
    class Placed(Output):
        def forward(self, hidden: Tensor, residual: Tensor, table: Tensor) -> Tensor:
            return self.dense(hidden + table).tanh() + (residual + table)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = Placed()

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.output(x, other, torch.ones(3, 4))

    found = surgeon.find(Model(), (X, X.clone()))
    assert not found.residuals and "no-shortcut" in {r.code for r in found.refused}


def test_what_lies_inside_such_a_branch_is_nested() -> None:
    """Res2Net's sums of neighbouring groups would pass for residual adds if theirs did not."""
    found = surgeon.find(timm.create_model("dla60_res2net"), torch.zeros(2, 3, 64, 64))
    assert len(found) == 16 and {r.code for r in found.refused} == {"nested"}  # 2 + 4 + 8 + 2 blocks
    assert {r.kind for r in found if ".tree1.add" in r.name} == {"identity", "projection"}


def test_a_class_token_is_a_shortcut_before_it_has_seen_the_input() -> None:
    """The first block with it adds to a weight: 2 x 2 residual adds, and 24 blocks of two before them."""
    assert len(surgeon.find(timm.create_model("cait_xxs24_224"), torch.zeros(2, 3, 224, 224))) == 52
