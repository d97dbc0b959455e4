"""Units that mix their branches by random factors of their own: the gate stands around the mixture."""

import copy

import pytest
import torch
from torch import nn

import surgeon
from surgeon._gating.gate import Gate


def branch():
    return nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1))


class ShakeDropModule(nn.Module):
    def forward(self, x):
        return shake_drop(x) if self.training else 0.5 * x


def shake_drop(y):
    """Yamada et al. 2018: a coin for all, and where it falls on tails another factor for each image."""
    coin = torch.bernoulli(torch.full((1,), 0.5))
    alpha = torch.rand(len(y), 1, 1, 1) * 2 - 1
    return y * (coin + alpha - coin * alpha)


def shake(a, b):
    share = torch.rand(len(a), 1, 1, 1)
    return share * a + (1 - share) * b


class Unit(nn.Module):
    def __init__(self, how, shortcut=None) -> None:
        super().__init__()
        self.a, self.b, self.drop, self.how = branch(), branch(), ShakeDropModule(), how
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + MIXTURES[self.how](self, x)


MIXTURES = {
    "shake": lambda m, x: shake(m.a(x), m.b(x)) if m.training else (m.a(x) + m.b(x)) / 2,
    "lerp": lambda m, x: torch.lerp(m.a(x), m.b(x), torch.rand(len(x), 1, 1, 1) if m.training else 0.5),
    "batch": lambda m, x: m.a(x) * (r := torch.rand(1)) + m.b(x) * (1 - r),
    "shake drop": lambda m, x: shake_drop(m.a(x)) if m.training else 0.5 * m.a(x),
    "shake drop as a module": lambda m, x: m.drop(m.a(x)),
}
X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def activated():
    """A projection of two parallel layers behind an activation: only the mixture tells it from a branch."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return torch.cat((self.one(x.relu()), self.two(x.relu())), 1)

    return Both()


@pytest.mark.parametrize("how", MIXTURES)
def test_the_gate_stands_around_the_mixture(how, monkeypatch):
    unit = Unit(how)
    twin = copy.deepcopy(unit)
    model = surgeon.apply(nn.Sequential(unit), unit="batch", example=X)
    (gate,) = surgeon.find(nn.Sequential(copy.deepcopy(twin)), X)
    assert gate.kind == "identity" and gate.replaces == ()
    monkeypatch.setattr(Gate, "survives", lambda self: True)
    torch.manual_seed(5)
    y = model(X)
    torch.manual_seed(5)
    torch.testing.assert_close(y, X + 2 * (twin(X) - X))  # the mixture's own draws, and 1 / p
    monkeypatch.setattr(Gate, "survives", lambda self: False)
    assert torch.equal(model(X), X)


@pytest.mark.parametrize("how", ["shake", "batch", "shake drop as a module"])
def test_a_mixture_tells_the_branch_from_a_projection(how):
    (found,) = surgeon.find(nn.Sequential(Unit(how, activated())), X)
    assert (found.kind, found.shortcut) == ("projection", "shortcut")


def test_without_a_mixture_neither_side_is_told():
    unit = Unit("shake", activated())
    MIXTURES["plain"] = lambda m, x: m.a(x)
    unit.how = "plain"
    found = surgeon.find(nn.Sequential(unit), X)
    assert [r.code for r in found.refused] == ["fusion"] and not found.residuals
