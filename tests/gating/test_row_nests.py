"""Branches that read items of a nest which a child, an operator or the caller made: adaLN and the like."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from blocks import coins, drawn, grads, randomise, same, skipping
from torch import Tensor, nn

import surgeon


class Modulated(NamedTuple):
    """What the norm of an adaLN block gives: its result, and how both branches are to be modulated."""

    x: Tensor
    gate: Tensor
    shift: Tensor
    scale: Tensor
    gate2: Tensor


class AdaNorm(nn.Module):
    """Modulates by a condition; ``form`` says what kind of nest it gives."""

    def __init__(self, form: Callable[[Modulated], Any]) -> None:
        super().__init__()
        self.linear, self.norm, self.form = nn.Linear(4, 24), nn.LayerNorm(4, elementwise_affine=False), form

    def forward(self, x: Tensor, c: Tensor) -> Any:
        shift, scale, gate, shift2, scale2, gate2 = self.linear(nn.functional.silu(c)).chunk(6, dim=1)
        x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        return self.form(Modulated(x, gate, shift2, scale2, gate2))


class Ada(nn.Module):
    """A transformer block with an adaptive norm; the masks are those of a reference written by hand."""

    def __init__(self, form: Callable[[Modulated], Any] = tuple, read: Callable[[Any], Any] = tuple) -> None:
        super().__init__()
        self.norm1, self.norm2 = AdaNorm(form), nn.LayerNorm(4, elementwise_affine=False)
        self.attn, self.mlp = (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(2))
        self.read = read
        self.ran: list[tuple[str, int]] = []
        for name in ("attn", "mlp"):
            self.get_submodule(name).register_forward_hook(
                lambda _m, _i, out, name=name: self.ran.append((name, len(out)))
            )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        normed, gate, shift, scale, gate2 = self.read(self.norm1(x, c))
        x = x + gate[:, None] * self.attn(normed)
        return x + gate2[:, None] * self.mlp(self.norm2(x) * (1 + scale[:, None]) + shift[:, None])

    def masked(self, x: Tensor, c: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The formula, each branch times a mask."""
        normed, gate, shift, scale, gate2 = self.read(self.norm1(x, c))
        x = x + gate[:, None] * self.attn(normed) * first
        branch = self.mlp(self.norm2(x) * (1 + scale[:, None]) + shift[:, None])
        return x + gate2[:, None] * branch * second


def _named(m: Any) -> Any:
    return m.x, m.gate, m.shift, m.scale, m.gate2


def _by_key(m: Any) -> Any:
    return m["x"], m["gate"], m["shift"], m["scale"], m["gate2"]


def _deep(m: Any) -> Any:
    return m["of"][0], m["of"][1], m["mlp"][0], m["mlp"][1][0], m["mlp"][1][1]


# How a nest is made, and how the block picks items out of it.
FORMS: dict[str, tuple[Callable[[Modulated], Any], Callable[[Any], Any]]] = {
    "unpacked": (tuple, tuple),
    "numbered": (list, lambda m: (m[0], m[1], m[2], m[-2], m[-1])),
    "sliced": (tuple, lambda m: (*m[:2], *m[2:])),
    "named": (lambda m: m, _named),
    "by key": (lambda m: m._asdict(), _by_key),
    "deep": (lambda m: {"of": m[:2], "mlp": (m.shift, (m.scale, m.gate2))}, _deep),
    "unbound": (
        lambda m: (m.x, torch.stack(m[1:])),
        lambda m: (m[0], *m[1].unbind()),
    ),
}
FORM = pytest.mark.parametrize("form", FORMS)
X = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
C = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gated(form: str, **options: Any) -> Ada:
    block = randomise(Ada(*FORMS[form])).double()
    skipping(block, 0.5, example=(X[:2], C[:2]), **options)
    block.ran.clear()
    return block


def step(block: Ada, run: Callable[[Tensor, Tensor], Tensor]) -> tuple[Any, ...]:
    """Result and all gradients of one step."""
    x, c = X.clone().requires_grad_(), C.clone().requires_grad_()
    out = run(x, c)
    (out * torch.linspace(1, 2, out.numel()).view_as(out)).sum().backward()
    return out.detach(), x.grad, c.grad, grads(block)


def by_hand(form: str, first: list[int], second: list[int]) -> tuple[Any, ...]:
    """The masked formula, given the rows that survive; their branches are doubled."""
    block, masks = randomise(Ada(*FORMS[form])).double(), torch.zeros(2, 4, 1, 1, dtype=torch.float64)
    masks[0, first], masks[1, second] = 2.0, 2.0
    return step(block, lambda x, c: block.masked(x, c, *masks))


def close(a: Any, b: Any) -> bool:
    try:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    except AssertionError:
        return False
    return True


# --- rows ---------------------------------------------------------------------


@pytest.mark.parametrize("rows", [([1, 3], [0]), ([], [2]), ([0, 1], []), ([], [])], ids=str)
@FORM
def test_rows_are_those_of_the_masked_formula(form: str, rows: tuple[list[int], list[int]]) -> None:
    block = gated(form, unused="zero")
    assert [(g.skips, g.note) for g in surgeon.status(block).gates] == [(True, "")] * 2
    patched = drawn(list(rows))
    got = step(block, block)
    patched.undo()
    assert close(got, by_hand(form, *rows))
    assert not close(got, by_hand(form, [0, 2], [1]))  # other rows
    idle = [row for row in range(4) if row not in (*rows[0], *rows[1])]
    assert idle and same(got[0][idle], X[idle])
    kept = zip(("attn", "mlp"), rows, strict=True)
    assert block.ran == [(name, len(some)) for name, some in kept if some]


@FORM
def test_a_batch_is_that_of_the_masked_formula(form: str) -> None:
    everything = list(range(4))
    for first in (True, False):
        for second in (True, False):
            block = gated(form, unit="batch", unused="zero")
            fates = dict(zip((g.name for g in surgeon.status(block).gates), (first, second), strict=True))
            with coins(fates):
                got = step(block, block)
            assert close(got, by_hand(form, everything * first, everything * second))
            assert [name for name, _ in block.ran] == ["attn"] * first + ["mlp"] * second


def test_the_rate_is_that_of_masking() -> None:
    """With real draws: every row is the shortcut, one branch, the other or both, in the end all of them."""
    block, seen = gated("unpacked"), set()
    single = torch.zeros(1, 1, 1, dtype=torch.float64)
    ways = [(a, b) for a in (0, 2) for b in (0, 2)]
    with torch.no_grad():
        sums = {way: block.masked(X, C, single + way[0], single + way[1]) for way in ways}
        for _ in range(60):
            out = block(X, C)
            for row in range(4):
                fitting = [way for way in ways if torch.allclose(out[row], sums[way][row], atol=1e-12)]
                assert len(fitting) == 1
                seen.update(fitting)
    assert seen == set(ways)


# --- who made the nest --------------------------------------------------------


class Chunked(nn.Module):
    """Takes the modulation apart itself: the pieces of one operator go to two branches (PixArt, Wan)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.f, self.g = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.ran: list[int] = []
        self.g.register_forward_hook(lambda _m, _i, out: self.ran.append(len(out)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, gate, scale2, gate2 = (self.table[None] + c[:, None]).chunk(4, dim=1)
        x = x + gate * self.f(x * scale)
        return x + gate2 * self.g(x * scale2)


def test_pieces_of_an_operators_result() -> None:
    plain, sides = randomise(Chunked()).double(), []
    block = skipping(randomise(Chunked()).double(), example=(X[:2], C[:2]))
    assert all(g.skips for g in surgeon.status(block).gates)
    masks = torch.zeros(2, 4, 1, 1, dtype=torch.float64)
    masks[0, [0, 1]], masks[1, [1, 3]] = 2.0, 2.0

    def masked(x: Tensor, c: Tensor) -> Tensor:
        scale, gate, scale2, gate2 = (plain.table[None] + c[:, None]).chunk(4, dim=1)
        x = x + gate * plain.f(x * scale) * masks[0]
        return x + gate2 * plain.g(x * scale2) * masks[1]

    patched, block.ran = drawn([[0, 1], [1, 3]]), []
    for net, run in ((block, block), (plain, masked)):
        x, c = X.clone().requires_grad_(), C.clone().requires_grad_()
        run(x, c).square().sum().backward()
        sides.append((x.grad, c.grad, grads(net)))
    patched.undo()
    assert close(*sides) and block.ran == [2]


class Maker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(c), self.b(c)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = self.f(x * pair[0]) * pair[1]
        return out


class HandsOn(nn.Module):
    """A nest that another module makes goes whole to the children of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.f, self.g = Maker(), Reader(), Reader()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        pair = self.maker(c)
        x = x + self.f(x, pair)
        return x + self.g(x, pair)

    def masked(self, x: Tensor, c: Tensor, first: Tensor, second: Tensor) -> Tensor:
        pair = self.maker(c)
        x = x + self.f(x, pair) * first
        return x + self.g(x, pair) * second


def handed(c: Tensor, **options: Any) -> tuple[HandsOn, list[int]]:
    block, ran = randomise(HandsOn()).double(), []
    skipping(block, example=(X[:2], c), **options)
    block.g.f.register_forward_hook(lambda _m, _i, out: ran.append(len(out)))
    return block, ran


def test_a_nest_without_rows_goes_in_whole() -> None:
    """As the sines and cosines of positions that the model was given (Flux)."""
    table = C[:3]
    block, ran = handed(table)
    assert [(g.skips, g.note) for g in surgeon.status(block).gates] == [(True, "")] * 2
    masks = torch.zeros(2, 4, 1, 1, dtype=torch.float64)
    masks[0, [0, 1]], masks[1, [1, 3]] = 2.0, 2.0
    patched, sides = drawn([[0, 1], [1, 3]]), []
    plain = randomise(HandsOn()).double()
    for net, run in ((block, block), (plain, lambda x, c: plain.masked(x, c, *masks))):
        x, c = X.clone().requires_grad_(), table.clone().requires_grad_()
        run(x, c).square().sum().backward()
        sides.append((x.grad, c.grad, grads(net)))
    patched.undo()
    assert close(*sides) and ran == [2]


def test_a_nest_of_rows_that_goes_on_as_it_is_is_masked() -> None:
    block, ran = handed(C[:2, None])
    for state in surgeon.status(block).gates:
        assert not state.skips and "reads a nest of tensors with one entry per row" in state.note
    block(X, C[:, None])
    assert ran == [4]


@pytest.mark.parametrize("unused", ["zero", "none"])
@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_what_makes_a_nest_for_dropped_branches_gets_zeros_too(unit: str, unused: str) -> None:
    """Without them plain DDP would wait for its gradients."""
    one, two = gated("unpacked", unit=unit, unused=unused), handed(C[:3], unit=unit, unused=unused)[0]
    for block, maker, c in ((one, one.norm1, C), (two, two.maker, C[:3])):
        with coins(False):
            block(X.clone().requires_grad_(), c).sum().backward()
        for p in maker.parameters():
            assert same(p.grad, torch.zeros_like(p) if unused == "zero" else None)


class ItemItself(nn.Module):
    """The branch is an item of what two branches share."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.g = Maker(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.maker(x.tanh())
        x = x + a
        return x + self.g(x) * b


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_a_branch_that_is_an_item_of_a_shared_nest_runs_all_the_same(unit: str) -> None:
    block = skipping(ItemItself(), unit=unit, include=["add", "add_1"])
    notes = [g.note for g in surgeon.status(block).gates]
    assert "what the layers of the branch give is also used elsewhere" in notes[0] and not notes[1]
    block(torch.randn(4, 4)).sum().backward()
