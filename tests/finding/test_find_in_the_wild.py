"""Residual adds as real code writes them, each beside a sum that differs in one point alone and is none."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import Of, coins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgeon

X, S, I = torch.randn(4, 8), torch.randn(4, 8, 20), torch.randn(4, 8, 16, 16)


def mlp(wide: int = 8, out: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, 16), nn.Tanh(), nn.Linear(16, out))


def conv(wide: int, out: int, k: int = 3, *, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(wide, out, k, padding=k // 2), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


def shrinking(step: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(8, 8, 3, step), nn.ReLU(), nn.Conv1d(8, 8, 1))


class Tripled(torch.autograd.Function):
    """The identity, with a gradient that shows that this ran."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 3


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, by: float) -> Tensor:
        return x * by

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * 2, None


OPS = {"triple": Tripled.apply}


def ema(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return x + m.f(x)


def ema_of_the_branch(m: Any, x: Tensor) -> Tensor:
    y = m.f(x)
    with torch.no_grad():
        m.mean.lerp_(y.mean(0), 0.1)
    return x + y


@torch.no_grad()
def remembered(mean: Tensor, x: Tensor) -> Tensor:
    return mean.copy_(x.mean(0)).clone()


def teacher(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.g(x)
    return x + m.f(x) * target


def cast(m: Any, x: Tensor, on: bool) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        y = m.f(x) @ m.w
    return x + y.to(x.dtype)


@torch.autocast("cpu", dtype=torch.bfloat16)
def all_cast(m: Any, x: Tensor) -> Tensor:
    return x + m.f(x) * 2


def slices(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    x[:, :4] += m.f(x * 1)
    return x


def position(m: Any, x: Tensor, k: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    k = m.g(torch.cat([k, at], -1))
    return x + m.h(torch.cat([x, k + at], -1)), k


def a_step(m: Any, x: Tensor, k: Tensor) -> Tensor:
    k = k + m.f(k)
    return x + m.g(torch.cat([x, k], -1))


class Preactivated(nn.Module):
    def __init__(self, how: Callable[..., Any]) -> None:
        super().__init__()
        self.norm, self.first, self.second, self.how = (
            nn.BatchNorm1d(8),
            nn.Linear(8, 12),
            nn.Linear(12, 12),
            how,
        )

    def forward(self, x: Tensor) -> Any:
        p = self.norm(x).relu()
        return self.how(self.second(self.first(p).relu()), p)


def crop(m: Any, x: Tensor) -> Tensor:
    y = m.f(x)
    return x[..., : y.shape[-1]] + y


FOUND: dict[str, tuple[Callable[..., Any], dict[str, Any], int, tuple[Tensor, ...]]] = {
    "a function at a name": (lambda m, x: x + m.op(m.f(x)), {"f": mlp(), "op": Tripled.apply}, 1, (X,)),
    "a function in a table": (lambda m, x: x + OPS["triple"](m.f(x)), {"f": mlp()}, 1, (X,)),
    "a function of the new style": (lambda m, x: x + Halved.apply(m.f(x), 0.5), {"f": mlp()}, 1, (X,)),
    "an average in a no_grad region": (ema, {"f": mlp(), "mean": nn.Buffer(torch.zeros(8))}, 1, (X,)),
    "an average of the branch": (ema_of_the_branch, {"f": mlp(), "mean": nn.Buffer(torch.zeros(8))}, 1, (X,)),
    "a decorated helper": (
        lambda m, x: x + m.f(x) * remembered(m.mean, x),
        {"f": mlp(), "mean": nn.Buffer(torch.zeros(8))},
        1,
        (X,),
    ),
    "a checkpointed child": (lambda m, x: x + checkpoint(m.f, x, use_reentrant=False), {"f": mlp()}, 1, (X,)),
    "a checkpointed method": (
        lambda m, x: x + checkpoint(m.f.forward, x, use_reentrant=False),
        {"f": mlp()},
        1,
        (X,),
    ),
    "a child without gradients": (teacher, {"f": mlp(), "g": mlp()}, 1, (X,)),
    "autocast, off": (partial(cast, on=False), {"f": mlp(), "w": torch.randn(8, 8)}, 1, (X,)),
    "autocast, on": (partial(cast, on=True), {"f": mlp(), "w": torch.randn(8, 8)}, 1, (X,)),
    "all under autocast": (all_cast, {"f": mlp()}, 1, (X,)),
    "a module made there": (lambda m, x: nn.ReLU()(x + m.f(x)), {"f": mlp()}, 1, (X,)),
    "a pool made there": (lambda m, x: nn.AvgPool1d(3, 2)(x) + m.f(x), {"f": shrinking(2)}, 1, (S,)),
    "a difference": (lambda m, x: x - m.f(x), {"f": mlp()}, 1, (X,)),
    "a difference, the other way": (lambda m, x: torch.rsub(m.f(x), x), {"f": mlp()}, 1, (X,)),
    "a difference in place": (lambda m, x: operator.isub(x * 1, m.f(x)), {"f": mlp()}, 1, (X,)),
    "a difference of a linear path": (lambda m, x: x - m.f(x), {"f": nn.Linear(8, 8)}, 0, (X,)),
    "a mean taken off": (lambda m, x: m.f(x - x.mean(-1, keepdim=True)), {"f": mlp()}, 0, (X,)),
    "an interpolation": (lambda m, x: torch.lerp(x, m.f(x), 0.3), {"f": mlp()}, 0, (X,)),
    "rows added to": (lambda m, x: x.index_add(0, torch.arange(4), m.f(x)), {"f": mlp()}, 0, (X,)),
    "lists added": (lambda m, x: torch._foreach_add([x], [m.f(x)])[0], {"f": mlp()}, 0, (X,)),
    "a product and a sum": (
        lambda m, x: torch.addmm(x, m.f(x), m.w, alpha=0.5),
        {"f": mlp(), "w": torch.randn(8, 8)},
        1,
        (X,),
    ),
    "a slice in place": (slices, {"f": mlp(8, 4)}, 1, (X,)),
    "an unbound method": (lambda m, x: Tensor.add(x, m.f(x)), {"f": mlp()}, 1, (X,)),
    "one value for all places": (lambda m, x: x + m.f(x.mean(-1))[:, :, None], {"f": mlp()}, 1, (S,)),
    "a shortcut spread over the branch": (
        lambda m, x: x.mean(-1, keepdim=True) + m.f(x.transpose(1, 2)).transpose(1, 2),
        {"f": mlp()},
        0,
        (S,),
    ),
    "cropped to the branch": (crop, {"f": shrinking()}, 1, (S,)),
    "cropped to a linear branch": (crop, {"f": nn.Conv1d(8, 8, 3)}, 0, (S,)),
    "narrowed": (lambda m, x: x.narrow(-1, 0, (y := m.f(x)).size(-1)) + y, {"f": shrinking()}, 1, (S,)),
    "padded by less than nothing": (
        lambda m, x: F.pad(x, (0, (y := m.f(x)).shape[-1] - x.shape[-1])) + y,
        {"f": shrinking()},
        1,
        (S,),
    ),
    "pooled to the branch": (
        lambda m, x: F.adaptive_max_pool1d(x, (y := m.f(x)).shape[-1]) + y,
        {"f": shrinking(2)},
        1,
        (S,),
    ),
    "normalised weights": (
        lambda m, x: (
            F.avg_pool1d(x, 3, 1, 1) + F.conv1d(F.conv1d(x, m.a / m.a.norm()).relu(), m.b / m.b.norm())
        ),
        {"a": torch.randn(8, 8, 1), "b": torch.randn(8, 8, 1)},
        1,
        (S,),
    ),
    "no weights": (lambda _, x: F.avg_pool1d(x, 3, 1, 1) + x.relu().cumsum(-1), {}, 0, (S,)),
    "a residual layer": (
        lambda m, x: m.n(x + m.c(x)).relu(),
        {"c": nn.Conv2d(8, 8, 3, 1, 1), "n": nn.BatchNorm2d(8)},
        1,
        (I,),
    ),
    "without an activation": (
        lambda m, x: m.n(x + m.c(x)),
        {"c": nn.Conv2d(8, 8, 3, 1, 1), "n": nn.BatchNorm2d(8)},
        0,
        (I,),
    ),
    "two linear paths": (
        lambda m, x: (x + (m.c(x) + m.d(x))).relu(),
        {"c": nn.Conv2d(8, 8, 3, 1, 1), "d": nn.Conv2d(8, 8, 1)},
        0,
        (I,),
    ),
    "a path of each dress": (
        lambda m, x: (x + m.c(x) + m.d(x)).relu(),
        {"c": nn.Conv2d(8, 8, 3, 1, 1), "d": nn.Conv2d(8, 8, 1)},
        0,
        (I,),
    ),
    "a position, activated": (
        lambda m, x: (x + m.c(x)).relu(),
        {"c": nn.Conv2d(8, 8, 3, 1, 1, groups=8)},
        0,
        (I,),
    ),
    "a projection with an activation": (
        lambda m, x: m.f(x) + m.p(x),
        {
            "f": nn.Sequential(conv(8, 8), conv(8, 8), conv(8, 8, act=False)),
            "p": nn.Sequential(conv(8, 8), conv(8, 8, 1, act=False)),
        },
        1,
        (I,),
    ),
    "two features": (
        lambda m, x: m.f(x) + m.p(x),
        {
            "f": nn.Sequential(conv(8, 8), conv(8, 8), conv(8, 8)),
            "p": nn.Sequential(conv(8, 8), conv(8, 8, 1)),
        },
        0,
        (I,),
    ),
    "a context, resized": (
        lambda m, x: m.f(x) + F.interpolate(m.p(F.adaptive_avg_pool2d(x, 1)), size=x.shape[2:]),
        {"f": nn.Sequential(conv(8, 8), conv(8, 8)), "p": conv(8, 8, 1)},
        0,
        (I,),
    ),
    "the same, not pooled": (
        lambda m, x: m.f(x) + m.p(x),
        {"f": nn.Sequential(conv(8, 8), conv(8, 8)), "p": conv(8, 8, 1)},
        1,
        (I,),
    ),
    "a position for one branch": (position, {"g": mlp(16), "h": mlp(16)}, 1, (X, X, X)),
    "a step that one branch reads": (a_step, {"f": mlp(), "g": mlp(16)}, 2, (X, X)),
    "both sides from a child": (
        lambda m, x: (y := m.body(x))[0] + m.p(y[1]),
        {"body": Preactivated(lambda y, p: (y, p)), "p": nn.Linear(8, 12)},
        1,
        (X,),
    ),
    "both sides from a child, by name": (
        lambda m, x: (y := m.body(x))["out"] + m.p(y["pre"]),
        {"body": Preactivated(lambda y, p: {"out": y, "pre": p}), "p": nn.Linear(8, 12)},
        1,
        (X,),
    ),
    "halves": (
        lambda m, x: torch.cat([(c := x[:, :4] + m.f(x[:, 4:])), x[:, 4:] + m.g(c)], 1),
        {"f": mlp(4, 4), "g": mlp(4, 4)},
        2,
        (X,),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_how_many_gates(name: str) -> None:
    function, parts, count, example = FOUND[name]
    model = Of(function, **{k: nn.Parameter(v) if type(v) is Tensor else v for k, v in parts.items()})
    found = surgeon.find(model, example)
    assert len(found) == count
    assert count or found.refused


@pytest.mark.parametrize("name", [name for name, (_, _, count, _) in FOUND.items() if count])
def test_open_gates_change_nothing(name: str) -> None:
    """Outputs and gradients, buffers too; and with gates that fall a step still runs."""
    function, parts, _, example = FOUND[name]
    model = Of(function, **{k: nn.Parameter(v) if type(v) is Tensor else v for k, v in parts.items()}).train()
    inputs = tuple(t.clone().requires_grad_() for t in example)

    def step() -> list[Tensor]:
        for tensor in (*inputs, *model.parameters()):
            tensor.grad = None
        for buffer in model.buffers():
            buffer.zero_()
        out = model(*inputs)
        out = torch.cat([t.flatten() for t in out]) if isinstance(out, tuple) else out
        out.square().sum().backward()
        return [
            out.detach(),
            *(t.grad.clone() for t in (*inputs, *model.parameters()) if t.grad is not None),
            *map(torch.clone, model.buffers()),
        ]

    wanted = step()
    for unit in ("batch", "sample"):
        surgeon.apply(model, "uniform", drop_rate=0.0, unit=unit, skip=True, example=example)
        for a, b in zip(step(), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        surgeon.set_drop_rate(model, 0.5)
        step()
        surgeon.remove(model)


class Next(nn.Module):
    """Adds what the block before made of the stream (add, norm, mixer)."""

    def __init__(self, mixer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer

    def forward(self, hidden: Tensor, stream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        stream = hidden if stream is None else hidden + stream
        return self.mixer(self.norm(stream)), stream


def chain(m: Any, x: Tensor) -> Tensor:
    hidden, stream = m.stem(x), None
    for block in m.blocks:
        hidden, stream = block(hidden, stream)
    total: Tensor = m.head(hidden + stream)
    return total


def layer() -> nn.Module:
    return nn.Linear(8, 8)


def norm() -> nn.Module:
    return nn.LayerNorm(8)


@pytest.mark.parametrize(
    ("mixer", "norm", "gates"), [(mlp, norm, 3), (layer, norm, 3), (layer, nn.Identity, 0)]
)
def test_a_sum_made_by_the_next_block(
    mixer: Callable[[], nn.Module], norm: Callable[[], nn.Module], gates: int
) -> None:
    """Like ``x + layer(norm(x))`` in one block: a layer is a linear path, one behind a norm is a step."""
    model = Of(
        chain,
        stem=nn.Linear(8, 8),
        head=nn.Linear(8, 3),
        blocks=nn.ModuleList(Next(mixer(), norm()) for _ in range(3)),
    )
    found = surgeon.find(model, X)
    assert [r.name for r in found] == ["blocks.1.add", "blocks.2.add", "add"][:gates]


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_its_gate_drops_the_block_before(unit: Any) -> None:
    model = Of(
        chain,
        stem=nn.Linear(8, 8),
        head=nn.Linear(8, 3),
        blocks=nn.ModuleList(Next(mlp(), norm()) for _ in range(3)),
    )
    surgeon.apply(model, "uniform", drop_rate=0.5, unit=unit, example=X)
    names = ["blocks.1.add", "blocks.2.add", "add"]
    for dropped in names:
        with coins(lambda name, dropped=dropped: name != dropped):
            x = model.stem(X)
            for name, block in zip(names, model.blocks, strict=True):
                x = x + (2.0 * (name != dropped)) * block.mixer(block.norm(x))
            torch.testing.assert_close(model.train()(X), model.head(x))


class Coupled(nn.Module):
    def __init__(self, how: Callable[..., Any]) -> None:
        super().__init__()
        self.f, self.g, self.how = mlp(), mlp(), how

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.how(self, a, b)


def both(m: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a = a + m.f(b)
    return a, b + m.g(a)


def one(m: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return b, m.f(b) + a


def never(m: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a + m.f(b), b


@pytest.mark.parametrize(("how", "gates"), [(both, 6), (one, 3), (never, 0)])
def test_two_streams_that_take_turns(how: Callable[..., Any], gates: int) -> None:
    """Every coupling; where one stream only ever reads the other, neither is a stream for sure."""

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.stem(x).chunk(2, 1)
        for block in m.blocks:
            a, b = block(a, b)
        return torch.cat([a, b], 1)

    model = Of(run, stem=nn.Linear(8, 16), blocks=nn.ModuleList(Coupled(how) for _ in range(3)))
    assert len(surgeon.find(model, X)) == gates


def test_what_stands_in_the_way_is_named_by_its_line() -> None:
    def own(m: Any, x: Tensor) -> Tensor:
        return x + checkpoint(lambda v: m.f(v) * 2, x, use_reentrant=False)

    [refused] = surgeon.find(Of(own, f=mlp()), X).refused
    line = own.__code__.co_firstlineno + 1
    assert refused.code == "untraceable"
    assert f"a function of its own (test_find_in_the_wild.py:{line})" in refused.reason


def test_a_sum_in_a_region_without_gradients_is_listed_as_such() -> None:
    def aside(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = (x.exp() + x).mean()
        return x + m.f(x) * weight

    found = surgeon.find(Of(aside, f=mlp()), X)
    assert [r.name for r in found] == ["add_1"]
    assert [r.code for r in found.refused] == ["detached"]
