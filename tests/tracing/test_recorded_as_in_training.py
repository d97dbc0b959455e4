"""A recording runs as training does; what it cannot see is named, what is surgeon's own fault is raised."""

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from blocks import Branch, Plain, X
from torch import Tensor, nn
from torch.distributions import Bernoulli
from torch.fx import _symbolic_trace
from torch.utils.checkpoint import checkpoint

import surgeon
from surgeon._tracing import record as recording
from surgeon.errors import SurgeonError


class Of(Branch):
    """A block with the forward of a test, between two layers."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.rng = body, torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def between(body: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Of(body), Plain())


def refusal(body: Callable[[Any, Tensor], Tensor]) -> str:
    """Why the block takes no gate; the plain one behind it does."""
    findings = surgeon.find(between(body), X)
    assert [r.name for r in findings] == ["2.add"]
    return next(r.reason for r in findings.refused if r.block == "1")


# --- gradients --------------------------------------------------------------------------------------

CHECKPOINTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the whole": lambda s, x: (
        checkpoint(lambda v: v + s.f(v), x, use_reentrant=False) if x.requires_grad else x + s.f(x)
    ),
    "the branch": lambda s, x: x + (checkpoint(s.f, x, use_reentrant=False) if x.requires_grad else s.f(x)),
    "reentrant": lambda s, x: x + (checkpoint(s.f, x, use_reentrant=True) if x.requires_grad else s.f(x)),
    "in training": lambda s, x: (
        x + (checkpoint(s.f, x, use_reentrant=False) if s.training and x.requires_grad else s.f(x))
    ),
    "in grad mode": lambda s, x: (
        x + (checkpoint(s.f, x, use_reentrant=False) if torch.is_grad_enabled() else s.f(x))
    ),
}


@pytest.mark.parametrize("body", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_what_needs_a_gradient_in_training_needs_one_in_the_recording(
    body: Callable[[Any, Tensor], Tensor],
) -> None:
    findings = surgeon.find(between(body), X)
    told = [r.code for r in findings.refused if r.block == "1"]
    # A checkpoint around the branch takes a gate; one around the sum is named.
    assert [r.name for r in findings] == ["1.add", "2.add"] or told == ["untraceable"]
    assert not told or "torch.utils.checkpoint" in refusal(body)


def test_the_other_way_than_the_checkpoint_is_gated() -> None:
    """Only what training runs counts: a checkpoint for inputs without a gradient never runs."""
    body = CHECKPOINTS["the branch"]
    model = between(lambda s, x: x + s.f(x) if x.requires_grad else body(s, x.detach().requires_grad_()))
    surgeon.apply(model, "uniform", drop_rate=0.5, unit="batch", example=X)
    for _ in range(4):
        model(X).sum().backward()


# --- coins ------------------------------------------------------------------------------------------

COINS: dict[str, Callable[[Any, Tensor], bool]] = {
    "item": lambda s, x: torch.rand(1).item() < 0.5,
    "tensor": lambda s, x: bool(torch.rand(1) < 0.5),
    "float": lambda s, x: float(torch.rand(())) < 0.5,
    "int": lambda s, x: int(torch.randint(0, 2, (1,))) == 1,
    "tolist": lambda s, x: torch.rand(2).tolist()[0] < 0.5,
    "bernoulli": lambda s, x: not torch.bernoulli(torch.tensor(0.5)),
    "uniform_": lambda s, x: bool(torch.empty(1).uniform_() < 0.5),
    "new_empty": lambda s, x: bool(x.new_empty(1).bernoulli_(0.5)),
    "like": lambda s, x: bool(torch.rand_like(x)[0, 0] < 0.5),
    "distribution": lambda s, x: bool(Bernoulli(0.5).sample()),
    "own generator": lambda s, x: torch.rand(1, generator=s.rng).item() < 0.5,
    "any of a mask": lambda s, x: bool((torch.rand(3) < 0.5).any()),
}


@pytest.mark.parametrize("coin", COINS.values(), ids=COINS)
def test_a_coin_of_its_own_is_named(coin: Callable[[Any, Tensor], bool]) -> None:
    reason = refusal(lambda s, x: x if s.training and coin(s, x) else x + s.f(x))
    assert re.search("coin of its own|draws random numbers from self.rng", reason), reason


class Coin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(1).item() < 0.5 else 2 * x


def test_a_coin_of_a_layer_is_named() -> None:
    block = Of(lambda s, x: x + s.coin(s.f(x)))
    block.coin = Coin()
    findings = surgeon.find(nn.Sequential(nn.Linear(4, 4), block, Plain()), X)
    assert "coin of its own" in findings.refused[0].reason


def test_other_questions_for_numbers_are_no_coin() -> None:
    reason = refusal(lambda s, x: x + s.f(x) if x.sum() > 0 else x - s.f(x))
    assert "looks at the numbers in a tensor" in reason


# --- sparse and nested tensors ----------------------------------------------------------------------

ADJACENCY = torch.tensor([[0.0, 1, 0], [1, 0, 2], [0, 3, 1]])
SPARSE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor, Any], Tensor]]] = {
    "coo": (Tensor.to_sparse, lambda s, x, a: torch.sparse.mm(a, s.f(x))),
    "csr": (Tensor.to_sparse_csr, lambda s, x, a: a @ s.f(x)),
    "csc": (Tensor.to_sparse_csc, lambda s, x, a: torch.mm(a, s.f(x))),
    "transposed": (Tensor.to_sparse, lambda s, x, a: torch.sparse.mm(a.coalesce().t(), s.f(x))),
    "made dense": (Tensor.to_sparse, lambda s, x, a: a.to_dense() @ s.f(x)),
    "made sparse": (Tensor.clone, lambda s, x, a: torch.sparse.mm(a.to_sparse(), s.f(x))),
    "in a tuple": (lambda a: (a.to_sparse(),), lambda s, x, a: torch.sparse.mm(a[0], s.f(x))),
}


class Graph(Branch):
    def __init__(self, product: Callable[[Any, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor, a: Any) -> Tensor:
        return x + self.product(self, x, a)


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize(("make", "product"), SPARSE.values(), ids=SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")
def test_sparse_products_are_no_hindrance(make: Any, product: Any, unit: Any) -> None:
    model, adjacency = Graph(product), make(ADJACENCY)
    expected = model(X, adjacency)
    surgeon.apply(model, drop_rate=0.0, unit=unit, example=(X, adjacency))
    torch.testing.assert_close(model(X, adjacency), expected)
    surgeon.set_drop_rate(model, 0.999)
    torch.manual_seed(0)
    torch.testing.assert_close(model(X, adjacency), X)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_named(layout: torch.layout) -> None:
    given = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=layout)
    with pytest.raises(SurgeonError, match=r"Plain is given a nested tensor.*padded batch and a mask"):
        surgeon.apply(Plain(), example=(given,))


# --- whose fault it is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (_symbolic_trace, "_orig_module_getattr"),
        (torch, "is_autocast_enabled"),
        (recording, "storage"),
    ],
)
def test_a_name_that_is_gone_is_no_finding(place: Any, name: str) -> None:
    """A version of PyTorch without one of its private names, say."""
    with mock.patch.object(place, name):
        if isinstance(place, type):
            delattr(place, name)
        else:
            del place.__dict__[name]
        with pytest.raises((AttributeError, NameError, KeyError), match=name):
            surgeon.find(Plain(), X)
    assert len(surgeon.find(Plain(), X)) == 1


def test_a_name_that_a_forward_misses_is_its_own_fault() -> None:
    assert "AttributeError" in refusal(lambda s, x: x + s.f(x) * (s.absent if s.training else 1))
