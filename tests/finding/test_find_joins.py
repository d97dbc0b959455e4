"""Joins: means of k paths in every spelling, and what looks like one and is none."""

import functools

import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import UsageError


def layer(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Mean(nn.Module):
    def forward(self, paths):
        return torch.stack(paths).mean(0)


class Sum(nn.Module):
    def forward(self, a, b):
        return (a + b) / 2


SPELLINGS = {
    "stack": lambda m, a, b: torch.stack([a, b]).mean(0),
    "stack last": lambda m, a, b: torch.stack((a, b), dim=-1).mean(-1),
    "function": lambda m, a, b: torch.mean(torch.stack([a, b], 1), dim=1),
    "dims": lambda m, a, b: torch.stack([a, b]).mean(dim=(0,)),
    "sum of stack": lambda m, a, b: torch.stack([a, b]).sum(0) / 2,
    "sum": lambda m, a, b: sum([a, b]) / 2,
    "half of sum": lambda m, a, b: (a + b) * 0.5,
    "halves": lambda m, a, b: 0.5 * a + 0.5 * b,
    "halves right": lambda m, a, b: a / 2 + b.mul(0.5),
    "methods": lambda m, a, b: a.add(b).div(2),
    "functions": lambda m, a, b: torch.div(torch.add(a, b), 2),
    "alpha": lambda m, a, b: torch.add(a * 0.5, b, alpha=0.5),
    "reduce": lambda m, a, b: functools.reduce(torch.add, [a, b]) / 2,
    "child": lambda m, a, b: m.sum(a, b),
    "child of a list": lambda m, a, b: m.mean([a, b]),
    "in place": lambda m, a, b: a.add_(b).div_(2),
    "in place operators": lambda m, a, b: in_place(a, b),
}


def in_place(a, b):
    a += b
    a /= 2
    return a


class Paths(nn.Module):
    """Two paths of one and of two layers, joined as `spelling` does."""

    def __init__(self, spelling) -> None:
        super().__init__()
        self.short, self.long1, self.long2 = layer(), layer(), layer()
        self.sum, self.mean = Sum(), Mean()
        self.spelling = SPELLINGS[spelling]

    def forward(self, x):
        return self.spelling(self, self.long2(self.long1(x)), self.short(x))


X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_one_join(spelling):
    found = surgeon.find(nn.Sequential(Paths(spelling)), X)
    assert [r.kind for r in found] == ["mean"]
    assert set(found.residuals[0].branch.split()) == {"short", "long1", "long2"}
    assert not found.refused


class None_(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.c = layer(), layer(), layer()
        self.plain, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.how = forward

    def forward(self, x):
        return self.how(self, x)


NO_JOIN = {
    "residual": lambda m, x: (x + m.a(x)) / 2,
    "unequal": lambda m, x: 0.25 * m.a(x) + 0.75 * m.b(x),
    "sum": lambda m, x: m.a(x) + m.b(x),
    "linear": lambda m, x: (m.plain(x) + m.other(x)) / 2,
    "projection": lambda m, x: (m.plain(x) + m.b(m.a(x))) / 2,
    "no layers": lambda m, x: (x.relu() + x.tanh()) / 2,
    "same layers": lambda m, x: (m.a(x).relu() + m.a(x).tanh()) / 2,
    "learnt": lambda m, x: (m.a(x) + m.plain.bias.view(1, 4, 1, 1)) / 2,
    "three quarters": lambda m, x: (m.a(x) + m.b(x) + m.c(x)) / 4,
    "over pixels": lambda m, x: torch.stack([m.a(x), m.b(x)]).mean(-1),
}


@pytest.mark.parametrize("name", NO_JOIN)
def test_no_join(name):
    found = surgeon.find(nn.Sequential(None_(NO_JOIN[name])), X)
    assert not [r for r in found if r.kind == "mean"]


def test_a_join_in_the_branch_of_a_residual_add_stays_whole():
    found = surgeon.find(nn.Sequential(None_(lambda m, x: x + (m.a(x) + m.b(x)) / 2)), X)
    assert [r.kind for r in found] == ["identity"]
    assert [r.code for r in found.refused] == ["nested"]


def test_paths_of_other_shapes_are_named():
    model = nn.Sequential(None_(lambda m, x: (m.a(x) + m.pool(m.b(x))) / 2))
    found = surgeon.find(model, X)
    assert [r.code for r in found.refused] == ["broadcast"]
    before = model.state_dict()
    with pytest.raises(UsageError, match=r"0.add.*or a path over others.*expand the smaller"):
        surgeon.apply(model, include=["0.add"], example=X)
    assert type(model[0]) is None_ and model.state_dict().keys() == before.keys()


def test_a_join_read_under_an_older_name_is_refused():
    def forward(m, x):
        a = m.a(x)
        view = a.view(2, -1)
        a += m.b(x)
        a /= 2
        return a, view

    found = surgeon.find(nn.Sequential(None_(forward)), X)
    assert [r.code for r in found.refused] == ["aliased"] and not found.residuals


def test_three_paths_are_one_join():
    found = surgeon.find(nn.Sequential(None_(lambda m, x: (m.c(m.b(x)) + m.a(x) + m.plain(x).relu()) / 3)), X)
    assert [(r.name, r.kind, r.branch) for r in found] == [("0.add_1", "mean", "a plain b c")]
    assert [r.code for r in found.refused] == ["join"]


class Recursive(nn.Module):
    """The paper's rule of growth as a module that hands out all of its paths; its caller joins them."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(width, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.inner = nn.ModuleList(
            [Recursive(columns - 1, width), Recursive(columns - 1, 4)] if columns > 1 else []
        )

    def forward(self, x):
        paths = [self.conv(x)]
        if self.inner:
            first, second = self.inner
            paths += second(join(first(x)))
        return paths


def join(paths):
    return torch.stack(paths).mean(0) if len(paths) > 1 else paths[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Recursive(3, 4), Recursive(3, 4)

    def forward(self, x):
        return join(self.two(join(self.one(x))))


def test_paths_that_children_hand_out():
    found = surgeon.find(Net(), X)
    assert [(r.kind, r.paths) for r in found] == [("mean", 2), ("mean", 3)] * 2
    assert {r.block for r in found} == {""} and {r.code for r in found.refused} <= {"join"}
    model = Net()
    column = surgeon.column(model, 2, example=X)
    x = torch.randn(2, 4, 8, 8)
    model.eval()
    wanted = x
    for block in (model.one, model.two):  # the second column has one layer of each half
        wanted = block.inner[1].conv(block.inner[0].conv(wanted))
    assert torch.equal(column(x), wanted)


class Pairwise(nn.Module):
    """Means of two, one inside another, each in a module of its own."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.one, self.two = (Pairwise(columns - 1) if columns > 1 else None for _ in range(2))

    def forward(self, x):
        return self.conv(x) if self.one is None else 0.5 * (self.conv(x) + self.two(self.one(x)))


def test_joins_in_the_children_of_a_path():
    model = Pairwise(3)
    assert [(r.name, r.kind) for r in surgeon.find(model, X)] == [
        *(("add", "mean"), ("one.add", "mean"), ("two.add", "mean"))
    ]
    deepest = surgeon.column(model, example=X)
    x, way = torch.randn(2, 4, 8, 8), [model.one.one, model.one.two, model.two.one, model.two.two]
    model.eval()
    assert torch.equal(deepest(x), nn.Sequential(*(part.conv for part in way))(x))
    assert len([m for m in deepest.modules() if isinstance(m, nn.Conv2d)]) == 4


def test_the_mean_of_two_heads_over_streams_that_mix_is_no_join() -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
            self.c, self.d = (nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, two = self.a(x), self.b(x)
            mixed = torch.cat([one[:, :4], two[:, 4:]], 1), torch.cat([two[:, :4], one[:, 4:]], 1)
            return torch.stack([self.c(mixed[0]), self.d(mixed[1])]).mean(0)

    found = surgeon.find(Streams(), example=torch.randn(3, 8))
    assert not found
    assert {refusal.code for refusal in found.refused} == {"fusion"}
