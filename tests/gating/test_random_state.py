"""Random blocks with Python state: gated and plain agree call after call, or no gate goes in.

Every block is written anew: where a number lies, how the forward gets at it, who changes it and when. At a
drop rate of zero the gated model has to give what the plain one gives, in each call, with the state that the
calls before have left.
"""

import random
import sys
import types
from collections import deque
from contextvars import ContextVar
from functools import partial
from itertools import count, cycle
from threading import local
from typing import Any
from weakref import ref

import pytest
import torch
from blocks import X
from torch import Tensor, nn

import surgeon
from surgeon.errors import SurgeonError


class Box:
    def __init__(self, k: float) -> None:
        self.k = k

    def grow(self) -> float:
        self.k += 1
        return self.k

    def __call__(self, x: float) -> float:
        return x * self.k


class Slotted:
    __slots__ = ("k",)

    def __init__(self, k: float) -> None:
        self.k = k


class Ticks(nn.Module):
    """Counts its own calls."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.seen = 1.0, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        self.seen[0] += 1
        return x * self.n


# How a number is put somewhere, how it is read, how it is changed. "{v}" is the new one.
PLACES: dict[str, tuple[str, str, str]] = {
    "attribute": ("self.n = 1.0", "self.n", "self.n = {v}"),
    "by getattr": ("self.n = 1.0", "getattr(self, 'n')", "setattr(self, 'n', {v})"),
    "list": ("self.n = [1.0, 2.0]", "self.n[0]", "self.n[0] = {v}"),
    "dict": ("self.n = {'k': 1.0}", "self.n['k']", "self.n['k'] = {v}"),
    "list in a dict": ("self.n = {'k': [1.0]}", "self.n['k'][0]", "self.n['k'][0] = {v}"),
    "deque": ("self.n = deque([1.0, 2.0])", "self.n[0]", "self.n.appendleft({v})"),
    "set": ("self.n = set()", "1.0 + len(self.n)", "self.n.add({v})"),
    "object": ("self.n = Box(1.0)", "self.n.k", "self.n.k = {v}"),
    "method of an object": ("self.n = Box(1.0)", "self.n.k", "self.n.grow()"),
    "slots": ("self.n = Slotted(1.0)", "self.n.k", "self.n.k = {v}"),
    "namespace": ("self.n = SimpleNamespace(k=1.0)", "self.n.k", "self.n.k = {v}"),
    "object in a list": ("self.n = [Box(1.0)]", "self.n[0].k", "self.n[0].k = {v}"),
    "object in an object": ("self.n = Box(Box(1.0))", "self.n.k.k", "self.n.k.k = {v}"),
    "callable": ("self.n = Box(1.0)", "self.n(1.0)", "self.n.k = {v}"),
    "partial": ("self.n = partial(pow, [1.0].__getitem__(0))", "self.n(1)", "self.n = partial(pow, {v})"),
    "weak reference": ("self.o = Box(1.0); self.n = ref(self.o)", "self.n().k", "self.n().k = {v}"),
    "module in a list": ("self.n = [nn.ReLU()]; self.n[0].k = 1.0", "self.n[0].k", "self.n[0].k = {v}"),
    "slice": ("self.n = slice(1, 9)", "self.n.start", "self.n = slice(int({v}), 9)"),
    "child": ("self.f.n = 1.0", "self.f.n", "self.f.n = {v}"),
    "child's list": ("self.f[0].n = [1.0]", "self.f[0].n[0]", "self.f[0].n[0] = {v}"),
    "class": ("type(self).n = 1.0", "self.n", "type(self).n = {v}"),
    "class's list": ("type(self).n = [1.0]", "self.n[0]", "type(self).n[0] = {v}"),
    "global": ("env['G'] = 1.0", "G", "env['G'] = {v}"),
    "global dict": ("T['k'] = 1.0", "T['k']", "T['k'] = {v}"),
    "global object": ("S.k = 1.0", "S.k", "S.k = {v}"),
    "function's attribute": ("helper.k = 1.0", "helper.k", "helper.k = {v}"),
    "a function's global": ("env['G'] = 1.0", "reads()", "env['G'] = {v}"),
    "function": ("env['given'] = lambda: 1.0", "given()", "env['given'] = lambda v={v}: v"),
    "context variable": ("VAR.set(1.0)", "VAR.get()", "VAR.set({v})"),
    "thread": ("LOCAL.k = 1.0", "LOCAL.k", "LOCAL.k = {v}"),
    "import": ("MOD.k = 1.0", "imported()", "MOD.k = {v}"),
    "closure": ("cell[0] = 1.0", "cell[0]", "cell[0] = {v}"),
    "default": ("default[0] = 1.0", "given_list[0]", "default[0] = {v}"),
    "method": ("self.n = self.one", "self.n()", "self.n = self.three"),
    "counter": ("self.n = count(1)", "next(self.n)", "self.n = count(3)"),
    "cycle in a list": ("self.n = [cycle([1.0, 5.0])]", "next(self.n[0])", "self.n[0] = cycle([3.0])"),
    "generator": ("self.n = (float(i) for i in range(99))", "next(self.n)", "pass"),
    "global counter": ("env['IDS'] = count(1)", "next(IDS)", "pass"),
    "a layer's count": ("pass", "self.t.n", "self.t.n = {v}"),
    "a layer's list": ("pass", "self.t.seen[0]", "self.t.seen[0] = {v}"),
}
USES = ("* ({k})", "* (2.0 if {k} > 2 else 1.0)", "* len(range(int({k}) + 1))")


def source(place: str, use: str, when: str, layer: bool) -> str:
    """A block whose forward uses the number, and changes it itself before or after, or does not."""
    init, read, write = PLACES[place]
    change = write.format(v=f"{read} + 1") if "next" not in read else "pass"
    lines = [change if when == "before" else "pass", f"h = {'self.t(self.f(x))' if layer else 'self.f(x)'}"]
    lines += [f"y = x + h {use.format(k=read)}", change if when == "after" else "pass", "return y"]
    body = "\n            ".join(lines)
    return f"""
def made(cell):
    default = [1.0]
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.t = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), Ticks()
            {init}
        def one(self): return 1.0
        def three(self): return 3.0
        def forward(self, x, given_list=default):
            {body}
    def change(self, v):
        {write.format(v="v")}
    return Block, change
def reads(): return G
def helper(): return 1.0
def imported():
    from module_of_a_test import k
    return k
"""


def outputs(text: str, gated: bool, changes: bool) -> list[Tensor] | None:
    """What four calls give, from a fresh start; None if no gate goes in."""
    module = types.ModuleType("module_of_a_test")
    sys.modules[module.__name__] = module
    env: dict[str, Any] = {"MOD": module, "VAR": ContextVar("v"), "LOCAL": local(), "T": {}, "S": Box(1.0)}
    env |= {"Box": Box, "Slotted": Slotted, "Ticks": Ticks, "nn": nn, "__name__": "written_by_a_test"}
    env |= {"deque": deque, "count": count, "cycle": cycle, "partial": partial, "ref": ref}
    env |= {"SimpleNamespace": types.SimpleNamespace, "env": env}
    exec(text, env)  # noqa: S102 - a program of this file
    torch.manual_seed(0)
    kind, change = env["made"]([1.0])
    model = nn.Sequential(nn.Linear(4, 4), kind())
    if gated:
        try:
            surgeon.apply(model, drop_rate=0.0, unit="batch", example=X)
        except SurgeonError:
            return None
    found = []
    for call in range(4):
        if changes and call:
            change(model[1], float(call + 1))
        try:
            found.append(model(X).detach())
        except SurgeonError:  # refused later, by name
            return None
    return found


def agree(place: str, text: str, changes: bool) -> bool:
    """Whether a gate went in; fails if it changed what a call gives."""
    plain, gated = outputs(text, False, changes), outputs(text, True, changes)
    assert plain is not None
    for call, (a, b) in enumerate(zip(plain, gated or plain, strict=True)):
        assert torch.allclose(a, b, atol=1e-6), f"{place}, call {call}, changed outside: {changes}\n{text}"
    return gated is not None


def check(seed: int) -> bool:
    """`agree`, of a block written at random."""
    rng = random.Random(seed)  # noqa: S311
    place = list(PLACES)[seed % len(PLACES)]
    text = source(
        place, rng.choice(USES), rng.choice(("never", "never", "before", "after")), rng.random() < 0.3
    )
    return agree(place, text, rng.random() < 0.5)


@pytest.mark.parametrize("place", PLACES)
def test_a_change_from_outside_is_followed_wherever_the_number_lies(place: str) -> None:
    agree(place, source(place, USES[0], "never", False), changes=True)


@pytest.mark.filterwarnings("ignore:.*has been traced for")
@pytest.mark.parametrize("part", range(4))
def test_gated_and_plain_agree_call_after_call(part: int) -> None:
    seeds = range(part * 40, part * 40 + 40)
    gates = [check(seed) for seed in seeds]
    assert 10 < sum(gates) < 35  # both ends of the promise are tried


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_more_agree(part: int) -> None:
    for seed in range(1000 + part * 100, 1100 + part * 100):
        check(seed)
