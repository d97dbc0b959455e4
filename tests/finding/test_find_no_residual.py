"""Sums that look like residual adds and are none: noise, losses, rounding, activations, recurrences.

Each comes with one that differs in the decisive point alone and is a residual add.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import Of
from torch import Tensor, nn

import surgeon

ROWS = torch.zeros(4, 8)
STEPS = torch.zeros(4, 5, 8)
IMAGES = torch.zeros(2, 4, 16, 16)


def layers(*names: str, width: int = 8) -> dict[str, nn.Module]:
    return {name: nn.Linear(width, width) for name in names}


def convs(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Conv2d(4, 4, 3, padding=1) for name in names}


def loss(m: Any, x: Tensor, to: Tensor) -> Tensor:
    hidden = m.a(x).relu()
    return F.mse_loss(m.c(m.b(hidden).relu()), to) + 0.4 * F.mse_loss(m.d(hidden), to)


def of_rows(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x)
    return m.c(m.b(hidden).relu()).square().mean(-1) + m.d(hidden).mean(-1)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    z = m.a(x)
    with torch.no_grad():
        change = m.codes[torch.cdist(z, m.codes).argmin(-1)] - z
    return m.b(z + change)


def quantised(m: Any, x: Tensor) -> Tensor:
    z = m.a(x)
    codes = m.codes[torch.cdist(z, m.codes).argmin(-1)]
    return m.b(z + (codes - z).detach())


def distance(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = m.a(x)
    return m.b(z), (m.c(z).relu() - z.detach()).square().mean()


def straight_through(m: Any, x: Tensor) -> Tensor:
    soft = m.a(x).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return m.b(hard - soft.detach() + soft)


def recurrent(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    for step in range(x.shape[1]):
        state = torch.tanh(m.a(x[:, step]) + m.b(state))
    return m.c(state)


def leaky(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    for step in range(x.shape[1]):
        state = 0.9 * state + 0.1 * torch.tanh(m.a(x[:, step]))
    return m.b(state)


def experts(m: Any, x: Tensor) -> Tensor:
    weights = m.gate(x).softmax(-1)
    return sum(weights[:, i : i + 1] * one(x) for i, one in enumerate((m.a, m.b, m.c, m.d)))


def pyramid(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    fine = m.a(x).relu()
    coarse = m.b(F.max_pool2d(fine, 2)).relu()
    top = m.c(coarse)
    return m.d(fine) + F.interpolate(top, scale_factor=2.0), top


def gathered(m: Any, x: Tensor, edges: Tensor) -> Tensor:
    """Messages along the edges of a graph, as GraphSAGE sums them up."""
    return m.a(torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]])) + m.b(x)


NONE: dict[str, tuple[nn.Module, tuple[Tensor, ...], set[str]]] = {
    "drawn from a mean and a spread": (
        Of(lambda m, x: m.a(x) + torch.randn_like(x) * (0.5 * m.b(x)).exp(), **layers("a", "b")),
        (ROWS,),
        {"fusion"},
    ),
    "shallower than the projection": (
        Of(lambda m, x: m.b(m.a(x)) + m.c(x).relu(), **layers("a", "b", "c")),
        (ROWS,),
        {"fusion"},
    ),
    "two losses": (Of(loss, **layers("a", "b", "c", "d")), (ROWS, ROWS), {"arithmetic"}),
    "two losses of each row": (Of(of_rows, **layers("a", "b", "c", "d")), (ROWS,), {"arithmetic"}),
    "nearest code": (Of(quantised, **layers("a", "b"), codes=torch.randn(5, 8)), (ROWS,), {"detached"}),
    "rounded": (
        Of(lambda m, x: m.b((z := m.a(x)) + (z.round() - z).detach()), **layers("a", "b")),
        (ROWS,),
        {"detached"},
    ),
    "a loss of its own": (Of(distance, **layers("a", "b", "c")), (ROWS,), {"arithmetic"}),
    "without a gradient": (
        Of(without_gradient, **layers("a", "b"), codes=torch.randn(5, 8)),
        (ROWS,),
        {"detached"},
    ),
    "straight through": (Of(straight_through, **layers("a", "b")), (ROWS,), {"detached"}),
    "activation with a weight": (
        Of(lambda m, x: x + (m.a * x).sin().square() / m.a, a=torch.ones(8)),
        (ROWS,),
        {"arithmetic"},
    ),
    "polynomial": (Of(lambda m, x: x + 0.04 * x**3, **layers("a")), (ROWS,), {"arithmetic"}),
    "modulation": (
        Of(lambda m, x, c: m.n(x) * (1 + m.g(h := m.a(c).relu())) + m.b(h), **layers("a", "g", "b", "n")),
        (ROWS, ROWS),
        {"gating"},
    ),
    "modulation by halves": (
        Of(
            lambda m, x, c: m.n(x) * (both := m.a(c).chunk(2, -1))[0] + both[1],
            n=nn.Linear(8, 4),
            a=nn.Linear(8, 8),
        ),
        (ROWS, ROWS),
        {"gating"},
    ),
    "recurrence": (Of(recurrent, **layers("a", "b", "c")), (STEPS,), {"fusion", "bias"}),
    "leaky integration": (Of(leaky, **layers("a", "b")), (STEPS,), {"fusion", "bias"}),
    "messages of neighbours": (
        Of(gathered, **layers("a", "b")),
        (ROWS, torch.zeros(2, 6, dtype=torch.long)),
        {"linear"},
    ),
    "linear experts": (Of(experts, **layers("a", "b", "c", "d"), gate=nn.Linear(8, 4)), (ROWS,), {"fusion"}),
    "like terms": (
        Of(lambda m, x: m.a(x).relu() + m.b(x).relu() + m.c(x).relu(), **convs("a", "b", "c")),
        (IMAGES,),
        {"fusion"},
    ),
    "pyramid": (Of(pyramid, **convs("a", "b", "c", "d")), (IMAGES,), {"fusion"}),
}


@pytest.mark.parametrize("case", NONE)
def test_no_branch(case: str) -> None:
    model, example, codes = NONE[case]
    found = surgeon.find(model, example)
    assert not list(found)
    assert found.refused and {r.code for r in found.refused} <= codes


def weighed(m: Any, x: Tensor) -> Tensor:
    """A map of weights, made at half the size and resized, as GhostNetV2 has it."""
    hidden = m.b(x)
    weights = F.interpolate(m.c(F.avg_pool2d(hidden, 2)), scale_factor=2.0).sigmoid()
    return m.a(x) + m.d(hidden.relu() * weights)


RESIDUAL: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "without the noise": (
        Of(lambda m, x: m.a(x) + (0.5 * m.b(x)).exp(), **layers("a", "b")),
        (ROWS,),
        "projection",
    ),
    "a difference that a layer reads": (
        Of(lambda m, x: m.b((z := m.a(x)) - m.c(z).relu()).square().mean(-1, keepdim=True), **layers(*"abc")),
        (ROWS,),
        "identity",
    ),
    "a correction that learns": (
        Of(lambda m, x: m.b((z := m.a(x)) + m.c(z).round() - z.detach()), **layers("a", "b", "c")),
        (ROWS,),
        "identity",
    ),
    "mixing without a weight": (
        Of(lambda m, x: x + torch.fft.fft(x).real, **layers("a")),
        (ROWS,),
        "identity",
    ),
    "a branch gated by a condition": (
        Of(lambda m, x, c: m.a(x) + m.c(m.b(x).relu()) * m.g(c), **layers("a", "b", "c", "g")),
        (ROWS, ROWS),
        "projection",
    ),
    "two branches on a projection": (
        Of(lambda m, x: m.a(x) + m.c(m.b(x).relu()), **convs("a", "b", "c")),
        (IMAGES,),
        "projection",
    ),
    "resized for its weights alone": (Of(weighed, **convs("a", "b", "c", "d")), (IMAGES,), "projection"),
    "both sides resized": (
        Of(
            lambda m, x: (
                m.a(F.interpolate(x, scale_factor=2.0)) + m.c(F.interpolate(m.b(x).relu(), scale_factor=2.0))
            ),
            **convs("a", "b", "c"),
        ),
        (IMAGES,),
        "projection",
    ),
    "a vector without a batch": (
        Of(lambda m, x: x + m.b(m.a(x).relu()), **layers("a", "b")),
        (torch.zeros(8),),
        "identity",
    ),
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_a_branch(case: str) -> None:
    model, example, kind = RESIDUAL[case]
    assert [r.kind for r in surgeon.find(model, example)] == [kind]


def test_the_user_has_the_last_word() -> None:
    """What is refused for its branch comes in by name."""
    model, example, _ = NONE["rounded"]
    assert "add" in {r.name for r in surgeon.find(model, example).refused}
    assert [r.kind for r in surgeon.find(model, example, include=["add"])] == ["identity"]
