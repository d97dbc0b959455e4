"""Residual adds, and sums that are none, in forms that nobody writes twice."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from blocks import Around, Branch, Plain, coins, randomise, same
from torch import Tensor, nn

import surgeon

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Gather(Branch):
    """The branch runs on some columns, which are written back into zeros."""

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([[2, 0, 1, 3]]).expand(len(x), 4)
        return x + torch.zeros_like(x).scatter(1, index, self.f(x.gather(1, index)))


class Concatenated(Branch):
    """The shortcut is put together from its halves."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.f(x) + torch.cat([a, b], -1)


class Loop(nn.Module):
    """The root adds, once per layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Alpha(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x), alpha=0.5)


class Closure(Branch):
    def forward(self, x: Tensor) -> Tensor:
        def around(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda value: value + function(value)

        return around(self.f)(x)


class Summed(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.f(x)])


class Stacked(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.f(x)]).sum(0)


class Einsum(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("bi,ij->bj", torch.tanh(x), self.w)


class Halves(Branch):
    """The mean of shortcut and branch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x)) / 2


class MeanOfAStack(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.f(x)], 1).mean(1)


class InDict(Branch):
    def forward(self, x: Tensor) -> Tensor:
        out = {"sum": x + self.f(x), "input": x}
        return out["sum"]


@dataclass
class Output:
    hidden: Tensor
    extra: tuple[Tensor, ...]


class InDataclass(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.made(x).hidden

    def made(self, x: Tensor) -> Output:
        return Output(hidden=x + self.f(x), extra=(x,))


class ThroughAView(Branch):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        rows = x.view(-1, 2, 2)
        rows += self.f(x).view(-1, 2, 2)
        return rows.flatten(1)


class Keyword(Branch):
    def forward(self, *, hidden: Tensor) -> Tensor:
        return hidden + self.f(hidden)


class CallsByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Keyword()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(hidden=x)


class State(Branch):
    """Nested states go through; the first is the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        state = (x, (x.detach(), [x]))
        return state[1][1][0] + self.f(state[0])


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(x, x)
        return (z + torch.tanh(z * self.w)).real


FOUND: list[tuple[type[nn.Module], int]] = [
    (Gather, 1),
    (Concatenated, 1),
    (ThroughAView, 1),
    (Loop, 3),
    (Alpha, 1),
    (Closure, 1),
    (Summed, 1),
    (Stacked, 1),
    (Einsum, 1),
    (Halves, 1),
    (MeanOfAStack, 1),
    (InDict, 1),
    (InDataclass, 1),
    (CallsByKeyword, 1),
    (State, 1),
]


@pytest.mark.parametrize(("kind", "count"), FOUND)
def test_residual_adds_in_odd_forms_are_found_and_right(kind: type[nn.Module], count: int) -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 4), kind()))
    expected = model(X)
    assert len(surgeon.find(model, X)) == count
    surgeon.apply(model, "uniform", drop_rate=0.5, unit="batch", scaling="paper", example=X)
    with coins(True):
        assert same(model(X), expected)
    x = model[0](X)
    with coins(False):
        kept = model(X)
    torch.testing.assert_close(kept, x / 2 if kind in (Halves, MeanOfAStack) else x)


class ByMatrix(Branch):
    """The sum hides in a product: no addition runs, so there is nothing to list."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("kbi,k->bi", torch.stack([x, self.f(x)]), torch.ones(2))


def test_a_sum_that_takes_no_gate_is_listed() -> None:
    findings = surgeon.find(nn.Sequential(nn.Linear(4, 4), Complex()), X)
    assert len(findings) == 0
    assert [(r.name, r.code) for r in findings.refused] == [("1.add", "form")]


def test_a_product_is_no_addition() -> None:
    findings = surgeon.find(nn.Sequential(nn.Linear(4, 4), ByMatrix()), X)
    assert not findings.residuals
    assert not findings.refused


def test_a_sum_over_what_was_not_stacked_is_no_addition() -> None:
    class Over(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x, self.f(x)]).sum(-1)

    assert not surgeon.find(nn.Sequential(nn.Linear(4, 4), Over()), X).refused


class Listed(nn.Module):
    """The sum of a list that its caller made; ``x`` itself is a term."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, terms: list[Tensor]) -> Tensor:
        return torch.stack(tensors=[torch.stack(terms).sum(dim=0), self.f(terms[0])]).sum(0)


def test_a_list_of_terms_handed_in() -> None:
    terms = [torch.randn(2, 4), torch.randn(2, 4)]
    model = Listed().eval()
    findings = surgeon.find(model, (terms,))
    if torch.__version__.startswith("2.6."):  # whose `torch.stack` takes no stand-in for the list
        assert {r.code for r in findings.refused} == {"untraceable"}
        return
    assert [r.branch for r in findings] == ["f"]
    assert [r.code for r in findings.refused] == ["linear"]
    expected = model(terms)
    surgeon.apply(model, scaling="paper", drop_rate=0.5, example=(terms,))
    torch.testing.assert_close(model(terms), expected - 0.5 * model.f(terms[0]))
    model.train()(terms).sum().backward()


class Constrained(nn.Linear):
    """Gives its weight other memory whenever it runs, as layers with a bound on their norm do."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class Centred(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        self.running_mean.data = self.running_mean.data * 0.5
        return super().forward(x)


class Itself(Branch):
    def forward(self, x: Tensor) -> Tensor:
        self.f[0].weight.data = self.f[0].weight.data.clamp(-0.1, 0.1)
        return x + self.f(x)


@pytest.mark.parametrize("block", [Constrained, Centred, Itself])
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_memory_that_a_forward_gives_its_weights_stays(block: type[nn.Module], scaling: str) -> None:
    inner = {Constrained: lambda: Constrained(4, 4), Centred: lambda: Centred(4), Itself: Itself}[block]()
    around = Branch()
    around.f = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), inner)
    model = randomise(nn.Sequential(Plain(), inner if block is Itself else Around(around.f)))
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    surgeon.find(model, X)
    surgeon.apply(model, scaling=scaling, example=X)  # type: ignore[arg-type]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0]), name
        assert value.data_ptr() == before[name][1], name
    assert torch.isfinite(model.eval()(X)).all()


def test_a_forward_that_fx_wrote_is_refused() -> None:
    """It may be written anew (`recompile`, a change of mode), and would lose the gates."""
    made = torch.fx.symbolic_trace(Plain())
    findings = surgeon.find(nn.Sequential(Plain(), made), X)
    assert [r.name for r in findings] == ["0.add"]
    assert [r.code for r in findings.refused] == ["untraceable"]
    assert "torch.fx wrote its forward" in findings.refused[0].reason
