"""Forwards that nobody here thought of when the rules were made, each with what must come out, by hand."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from blocks import Branch, Plain, coins, randomise, same
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import surgeon

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


def block(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    made = type("Block", (Branch,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


class State(NamedTuple):
    hidden: Tensor
    extra: Tensor


def named_tuple(self: Any, x: Tensor) -> Tensor:
    def step(state: State) -> State:
        return state._replace(hidden=state.hidden + self.f(state.hidden))

    return step(State(x, x.sin())).hidden


def through_dict(self: Any, x: Tensor) -> Tensor:
    state = {"hidden": x, "extra": x}
    state = {**state, "hidden": state["hidden"] + self.f(state["hidden"])}
    return state["hidden"]


def module_dict(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers.values():
        x = x + layer(x)
    return x


def scan(self: Any, x: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = state * 0.5 + x[:, t].tanh()
        states.append(state)
    return x + self.f(torch.stack(states, 1))


def mixture(self: Any, x: Tensor) -> Tensor:
    weights = self.router(x).softmax(-1)
    return x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def scattered(self: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, 4)
    out = rows.clone()
    out[:, ::2] += self.f(rows)[:, ::2]
    return x + out.reshape(x.shape).tanh()


def heads(self: Any, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = self.qkv(x).reshape(b, t, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def gated(self: Any, x: Tensor) -> Tensor:
    value, gate = self.wide(x).chunk(2, -1)
    return x + value * gate.sigmoid()


def partials(self: Any, x: Tensor) -> Tensor:
    inner = functools.partial(F.linear, weight=self.w)
    return x + inner(inner(x).relu())


def loose(self: Any, *args: Tensor, **kwargs: Any) -> Tensor:
    (x,) = args
    return x + self.f(x) * kwargs.get("scale", 2.0)


def squares(self: Any, x: Tensor) -> Tensor:
    """A number in a tensor's place: PyTorch's parser must not look into a proxy."""
    return x + self.f(torch.pow(x, 2))


def remainders(self: Any, x: Tensor) -> Tensor:
    return x + self.f(torch.remainder(x, 2)) * torch.xlogy(x.abs() + 1, 2.0)


def layer(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.GELU(), *more)


def doubled() -> nn.Module:
    made = Plain()
    made.f.register_forward_hook(lambda _module, _args, out: out * 2)
    return made


@dataclass(frozen=True)
class Case:
    """A block, how many residual adds it has, and the codes of its other additions."""

    make: Callable[[], nn.Module]
    count: int = 1
    refused: tuple[str, ...] = ()
    x: Tensor = X
    dropped: Callable[[Tensor], Tensor] = lambda x: x


def _layers(count: int) -> nn.ModuleList:
    return nn.ModuleList([layer() for _ in range(count)])


CASES: dict[str, Case] = {
    "where": Case(lambda: block(lambda self, x: torch.where(x > 0, x + self.f(x), x))),
    "where and a number": Case(lambda: block(lambda self, x: x + torch.where(x > 0, self.f(x), 0))),
    "a power": Case(lambda: block(squares)),
    "a remainder": Case(lambda: block(remainders)),
    "a dict of modules": Case(
        lambda: block(module_dict, layers=nn.ModuleDict({"a": layer(), "b": layer()})), count=2
    ),
    "reduce": Case(
        lambda: block(
            lambda self, x: functools.reduce(lambda a, f: a + f(a), self.layers, x), layers=_layers(2)
        ),
        count=2,
    ),
    "a named tuple": Case(lambda: block(named_tuple)),
    "a dict": Case(lambda: block(through_dict)),
    "a list of parameters": Case(
        lambda: block(
            lambda self, x: x + (x @ self.w[0]).relu() @ self.w[1],
            w=nn.ParameterList([torch.ones(4, 4), torch.ones(4, 4)]),
        )
    ),
    "partial functions": Case(lambda: block(partials, w=nn.Parameter(torch.ones(4, 4)))),
    "a hook on the branch": Case(doubled),
    "any arguments": Case(lambda: block(loose)),
    "a spectrum": Case(
        lambda: block(
            lambda self, x: x + torch.fft.irfft(torch.fft.rfft(x) * self.w, n=4),
            w=nn.Parameter(torch.ones(3)),
        )
    ),
    "a recurrent net": Case(
        lambda: block(lambda self, x: x + self.rnn(x)[0], rnn=nn.GRU(4, 4, batch_first=True)),
        refused=("nested",),
        x=TOKENS,
    ),
    "a scan": Case(lambda: block(scan), refused=("bias", "nested"), x=TOKENS),
    "a low-rank path in the branch": Case(
        lambda: block(
            lambda self, x: x + (self.f(x.relu()) + self.b(self.a(x.relu()))),
            a=nn.Linear(4, 1),
            b=nn.Linear(1, 4),
        ),
        refused=("nested",),
    ),
    "experts": Case(lambda: block(mixture, router=nn.Linear(4, 2), experts=_layers(2)), refused=("nested",)),
    "a write into columns": Case(lambda: block(scattered), refused=("nested",), x=TOKENS),
    "attention written out": Case(lambda: block(heads, qkv=nn.Linear(4, 12), out=nn.Linear(4, 4)), x=TOKENS),
    "a gated unit": Case(lambda: block(gated, wide=nn.Linear(4, 8))),
    "splines": Case(
        lambda: block(
            lambda self, x: x + (torch.exp(-((x[..., None] - self.grid) ** 2)) * self.w).sum((-1,)),
            grid=nn.Buffer(torch.linspace(-1, 1, 5)),
            w=nn.Parameter(torch.ones(4, 5)),
        )
    ),
    "normed weights": Case(
        lambda: block(
            lambda self, x: x + self.g(x),
            g=nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU()),
        )
    ),
    "names for the operands": Case(
        lambda: block(lambda self, x: torch.add(other=self.f(x), input=x)),
    ),
    "a product added": Case(
        lambda: block(
            lambda self, x: torch.addcmul(x, self.f(x), self.gamma), gamma=nn.Parameter(torch.ones(4))
        )
    ),
    "one block twice": Case(lambda: nn.Sequential(*[Plain()] * 2)),
    "a concatenation": Case(
        lambda: block(lambda self, x: torch.cat([x[:, :2], self.f(x)[:, 2:]], -1)), count=0
    ),
    "an interpolation": Case(
        lambda: block(lambda self, x: torch.lerp(x, self.f(x), 0.5)), count=0, refused=("form",)
    ),
    "a low-rank layer": Case(
        lambda: block(
            lambda self, x: self.c(x) + self.b(self.a(x)),
            a=nn.Linear(4, 1),
            b=nn.Linear(1, 4),
            c=nn.Linear(4, 4),
        ),
        count=0,
        refused=("linear",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_forward_that_nobody_thought_of(name: str) -> None:
    case = CASES[name]
    model = randomise(nn.Sequential(nn.Linear(4, 4), case.make()))
    kinds = [type(m) for m in model.modules()]
    findings = surgeon.find(model, case.x)
    codes = tuple(dict.fromkeys(r.code for r in findings.refused))
    assert (len(findings), codes) == (case.count, case.refused)
    if not case.count:
        return
    trained, expected = model(case.x), model.eval()(case.x)
    surgeon.apply(model, "uniform", drop_rate=0.5, unit="batch", example=case.x)
    assert same(model(case.x), expected)
    surgeon.remove(model)
    surgeon.apply(model, "uniform", drop_rate=0.5, unit="batch", scaling="paper", example=case.x)
    model.train()
    with coins(True):
        torch.testing.assert_close(model(case.x), trained)
    with coins(False):
        assert same(model(case.x), case.dropped(model[0](case.x)))
    surgeon.remove(model)
    assert [type(m) for m in model.modules()] == kinds
    assert same(model.eval()(case.x), expected)


def test_a_coin_that_falls_in_place() -> None:
    """With a gate in the place of the block's own coins, none of them falls."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            coin = torch.rand(len(x), 1) + 0.5
            coin.floor_()
            y = y * coin
        return x + y

    model = randomise(nn.Sequential(block(forward)))
    expected = model.eval()(X)
    surgeon.apply(model, "uniform", drop_rate=0.0, example=X)
    assert same(model.train()(X), expected)
