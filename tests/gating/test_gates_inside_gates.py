"""A sum with a gate that lies inside a branch with a gate: it moves along, coin and all."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Of, coins, drawn
from torch import Tensor, nn

import surgeon

X, M, Z = (torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))


def mlp(wide: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, 16), nn.Tanh(), nn.Linear(16, 8))


def parts(**more: nn.Module) -> dict[str, nn.Module]:
    return {"f": mlp(), "g": mlp(16), **more}


def memory(m: Any, x: Tensor, k: Tensor, _z: Tensor, a: float = 1, b: float = 1) -> Tensor:
    k = k + a * m.f(k)
    return x + b * m.g(torch.cat([x, k], -1))


def in_place(m: Any, x: Tensor, k: Tensor, _z: Tensor, a: float = 1, b: float = 1) -> Tensor:
    k = k * 2
    k += a * m.f(k * 0.5)
    return x + b * m.g(torch.cat([x, k], -1))


def two_steps(m: Any, x: Tensor, k: Tensor, _z: Tensor, a: float = 1, b: float = 1, c: float = 1) -> Tensor:
    k = k + a * m.f(k)
    k = k + b * m.h(k)
    return x + c * m.g(torch.cat([x, k], -1))


def chained(m: Any, x: Tensor, k: Tensor, z: Tensor, a: float = 1, b: float = 1, c: float = 1) -> Tensor:
    """Inside what is inside."""
    z = z + a * m.h(z)
    k = k + b * m.g(torch.cat([k, z], -1))
    return x + c * m.f(k * x)


def by_size(m: Any, x: Tensor, k: Tensor, _z: Tensor, a: float = 1, b: float = 1) -> Tensor:
    k = k.view(k.shape[0], -1) + a * m.f(k.reshape(k.shape))
    return x + b * m.g(torch.cat([x, k.reshape(x.shape)], -1))


def beside(
    m: Any, x: Tensor, k: Tensor, _z: Tensor, a: float = 1, b: float = 1, c: float = 1
) -> tuple[Tensor, Tensor]:
    """The step on the memory is read by a second stream as well, so it stays where it is."""
    k = k + a * m.f(k)
    return x + b * m.g(torch.cat([x, k], -1)), k + c * m.h(k)


def picked(m: Any, x: Tensor, k: Tensor, _z: Tensor, a: float = 1, b: float = 1) -> Tensor:
    first, second = (k * 1.5).chunk(2, -1)
    k = torch.cat([first, second], -1)
    k = k + a * m.f(torch.cat([second, first], -1)).relu()
    return x + b * m.g(torch.cat([x, k], -1))


FORMS: dict[str, tuple[Callable[..., Any], int]] = {
    f.__name__: (f, n)
    for f, n in (
        *((memory, 2), (in_place, 2), (two_steps, 3), (chained, 3)),
        *((by_size, 2), (beside, 3), (picked, 2)),
    )
}


def outcome(run: Callable[[], Any], model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What it gives, and every gradient, zeros for none."""
    for tensor in (*model.parameters(), *inputs):
        tensor.grad = None
    made = run()
    made = made if isinstance(made, tuple) else (made,)
    sum((t * torch.linspace(1, 2, 8)).sum() for t in made).backward()
    leaves = (*inputs, *model.parameters())
    return [*made, *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


@pytest.mark.parametrize(("unit", "skip"), [("batch", True), ("sample", True), ("sample", False)])
@pytest.mark.parametrize("name", FORMS)
def test_every_fall_of_the_coins(name: str, unit: Any, skip: bool) -> None:
    form, count = FORMS[name]
    torch.manual_seed(0)
    model = Of(form, **parts(h=mlp())).train()
    inputs = tuple(t.clone().requires_grad_() for t in (X, M, Z))
    surgeon.apply(model, "uniform", drop_rate=0.5, unit=unit, skip=skip, example=(X, M, Z))
    gates = [gate.name for gate in surgeon.status(model).gates]
    assert len(gates) == count
    assert all(gate.skips for gate in surgeon.status(model).gates) or not skip
    for kept in itertools.product((True, False), repeat=count):
        with coins(dict(zip(gates, kept, strict=True))):
            ours = outcome(lambda: model(*inputs), model, inputs)
        factors = [2.0 * k for k in kept]
        wanted = outcome(lambda: form(model, *inputs, *factors), model, inputs)  # noqa: B023
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_rows_of_rows() -> None:
    """The inner gate draws among the rows that survived the outer one."""
    model = Of(memory, **parts()).train()
    surgeon.apply(model, "uniform", drop_rate=0.5, unit="sample", skip=True, example=(X, M, Z))
    patch = drawn([[0, 2], [1]])
    try:
        ours = model(X, M, Z)
    finally:
        patch.undo()
    inner, outer = torch.tensor([0, 0, 2.0, 0])[:, None], torch.tensor([2.0, 0, 2, 0])[:, None]
    k = M + inner * model.f(M)
    torch.testing.assert_close(ours, X + outer * model.g(torch.cat([X, k], -1)))


def test_a_dropped_outer_branch_tosses_no_coin_inside() -> None:
    model = Of(memory, **parts()).train()
    surgeon.apply(model, drop_rate=0.5, unit="batch", example=(X, M, Z))
    with coins({"add": True, "add_1": False}) as tossed:
        assert torch.equal(model(X, M, Z), X)
    assert tossed == ["add_1"]


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_a_nested_sum_that_was_asked_for(unit: Any) -> None:
    def nested(m: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        return x + m.f(y + m.h(y))

    model = Of(nested, f=mlp(), h=mlp()).train()
    surgeon.apply(model, drop_rate=0.5, unit=unit, skip=True, example=X, include=["*", "nested"])
    assert [gate.name for gate in surgeon.status(model).gates] == ["add", "add_1"]
    y = X.tanh()
    for inner, outer in itertools.product((True, False), repeat=2):
        with coins({"add": inner, "add_1": outer}):
            rates = {gate.name: gate.survival for gate in surgeon.status(model).gates}
            wanted = X + outer / rates["add_1"] * model.f(y + inner / rates["add"] * model.h(y))
            torch.testing.assert_close(model(X), wanted)


@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_evaluation_and_the_way_out(scaling: Any) -> None:
    model = Of(chained, **parts(h=mlp())).eval()
    plain = model(X, M, Z)
    surgeon.apply(model, "uniform", drop_rate=0.25, scaling=scaling, example=(X, M, Z))
    p = 0.75 if scaling == "paper" else 1.0
    torch.testing.assert_close(model(X, M, Z), chained(model, X, M, Z, p, p, p))
    surgeon.remove(model)
    assert torch.equal(model(X, M, Z), plain)
