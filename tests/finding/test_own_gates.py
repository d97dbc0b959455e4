"""Stochastic depth that a model brings along decides what is a branch, and is never doubled."""

import io

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import surgeon

EXAMPLE = torch.zeros(4, 8)


def layers(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), *more)


class Parallel(nn.Module):
    """Two branches side by side, each a module that ends in stochastic depth."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.ways = nn.ModuleList([layers(DropPath(rate)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([way(x) for way in self.ways]).sum(0)


class Inner(nn.Module):
    """A residual block with stochastic depth of its own, as a step of another's branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop = layers(), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.f(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Inner(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.inner(x))


class Linear(nn.Module):
    """Two linear paths, which training keeps apart and deployment merges."""

    def __init__(self, rate: float, on: str = "branch") -> None:
        super().__init__()
        self.scale, self.f = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.drop = DropPath(rate) if rate else nn.Identity()
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        branch, shortcut = self.f(x), self.scale(x)
        return shortcut + self.drop(branch) if self.on == "branch" else self.drop(shortcut) + branch


class Heads(nn.Module):
    """The sum of what two heads read at two depths of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Inner(), Inner()
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        return self.heads[0](a) + self.heads[1](b) + b.mean()


class Streams(nn.Module):
    """Pixels and patches; what the one hands to the other has that one's shape, and nothing else of it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.inner, self.outer, self.across = layers(), layers(), nn.Linear(16, 8)
        self.drop = DropPath(rate) if rate else nn.Identity()

    def forward(self, pixels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixels + self.drop(self.inner(pixels))
        rows, count, _ = patches.shape
        inside = self.across(pixels.reshape(rows, count - 1, 16))
        patches = torch.cat([patches[:, :1], patches[:, 1:] + inside], 1)
        return pixels, patches + self.drop(self.outer(patches))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_shape_ties_no_streams_together(rate: float) -> None:
    """With stochastic depth on the pixels, their whole branch once was one of the patches' sum."""
    findings = surgeon.find(Streams(rate), (torch.zeros(6, 2, 8), torch.zeros(2, 4, 8)))
    assert [(r.name, r.branch.split()[0]) for r in findings] == [("add", "inner"), ("add_2", "outer")]
    assert [r.replaces for r in findings] == [("drop",) if rate else ()] * 2
    assert [(r.name, r.code) for r in findings.refused] == [("add_1", "no-shortcut")]


@pytest.mark.parametrize("unit", ["sample", "batch"])
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_depth_inside_a_branch_module_is_stood_in_for(unit: str, scaling: str) -> None:
    model, x = Parallel(), torch.randn(4, 8)
    residual = surgeon.find(model, EXAMPLE).residuals[0]
    assert residual.replaces == ("ways.0.3", "ways.1.3")
    expected = model.eval()(x)
    surgeon.apply(model, drop_rate=0.5, unit=unit, scaling=scaling, example=EXAMPLE)
    if scaling == "inverted":
        assert torch.equal(model(x), expected)
    surgeon.set_drop_rate(model, 0.0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (model, torch.load(file, weights_only=False)):
        trained = one.train()(x)
        scale = 0.5 if scaling == "paper" else 1.0
        torch.testing.assert_close(trained, x + scale * (expected - x))  # no coin of the model's own falls
    surgeon.remove(model)
    assert any(not torch.equal(model(x), expected) for _ in range(20))  # they fall again


def test_depth_of_a_block_inside_a_branch_stays_its_own() -> None:
    findings = surgeon.find(Outer(), EXAMPLE)
    assert [r.name for r in findings] == ["add"]
    assert findings.residuals[0].replaces == ()


@pytest.mark.parametrize(("rate", "gates"), [(0.3, 1), (0.0, 0)])
def test_a_linear_branch_is_one_if_its_author_drops_it(rate: float, gates: int) -> None:
    findings = surgeon.find(Linear(rate), EXAMPLE)
    assert [(r.branch, r.replaces) for r in findings] == [("f", ("drop",))] * gates
    assert gates or findings.refused[0].code == "linear"


def test_such_a_branch_keeps_its_side_in_every_mode() -> None:
    model, x = Linear(0.3), torch.randn(4, 8)
    model.eval()
    expected = model(x)
    surgeon.apply(model, drop_rate=0.5, scaling="paper", unit="batch", example=EXAMPLE)
    shortcut = model.scale(x)
    torch.testing.assert_close(model(x), shortcut + 0.5 * (expected - shortcut))
    folded = surgeon.fold(model)
    torch.testing.assert_close(folded(x), model(x))


def test_two_heads_at_two_depths_are_no_residual() -> None:
    findings = surgeon.find(Heads(), EXAMPLE)
    assert [r.name for r in findings] == ["first.add", "second.add"]
    assert findings.refused[0].code == "fusion"
