"""Which inputs of a branch have one entry per row, where the example's sizes alone do not tell."""

import pytest
import torch
from torch import Tensor, nn

import surgeon


class Block(nn.Module):
    """``x + f(x, c)``, and how many rows f was run on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.ran: list[int] = []
        self.inner.register_forward_hook(lambda _m, _i, out: self.ran.append(len(out)))

    def branch(self, x: Tensor, c: Tensor) -> Tensor:
        return self.outer((self.inner(x) * c).relu())

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.branch(x, c)


class Pooled(Block):
    """On one entry for all every row is for itself; on one entry per row none is."""

    def branch(self, x: Tensor, c: Tensor) -> Tensor:
        return self.outer((self.inner(x) * c.mean(0)).relu())


class InATuple(Block):
    def forward(self, x: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return x + self.outer((self.inner(x) * c[0] + c[1]).relu())


class Affine(nn.Module):
    def forward(self, x: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        return x * c[0] + c[1]


class HandsOn(Block):
    def __init__(self) -> None:
        super().__init__()
        self.affine = Affine()

    def forward(self, x: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return x + self.outer(self.affine(self.inner(x), c).relu())


class Positions(nn.Module):
    """A model that makes what its block gets, of the input's shape alone."""

    def __init__(self, block: Block, spread: str) -> None:
        super().__init__()
        self.block, self.spread = block, spread

    def condition(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        made = torch.arange(1.0, 1 + x.shape[1])[:, None].expand(-1, 4)
        if self.spread == "table":
            return made
        made = made[None].expand(x.shape[0], -1, -1)
        if self.spread == "numbered":
            return made * torch.arange(1.0, 1 + x.shape[0])[:, None, None]
        return (made, made.cos()) if self.spread == "tuple" else made

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.condition(x))


def check(model: nn.Module, block: Block, given: tuple[Tensor, ...], *, skips: bool) -> None:
    """Each row gets its shortcut, or twice what the plain branch adds to it; and that many rows ran."""
    model.train()
    seen, x = set(), given[0]
    with torch.no_grad():
        plain = model.eval()(*given) - x
        model.train()
        for _ in range(12):
            block.ran.clear()
            got = model(*given) - x
            kept = [torch.allclose(a, 2 * b, atol=1e-6) for a, b in zip(got, plain, strict=True)]
            assert all(k or not a.any() for k, a in zip(kept, got, strict=True))
            assert sum(block.ran) == (sum(kept) if skips else len(x))
            seen.update(kept)
    assert seen == {True, False}


def gate(model: nn.Module, *given: Tensor) -> nn.Module:
    return surgeon.apply(model, "uniform", drop_rate=0.5, skip=True, example=given)


@pytest.mark.parametrize("spread", ["expanded", "numbered", "table"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_what_the_model_makes_for_each_row_is_taken_by_rows(batch: int, spread: str) -> None:
    """Whatever the example's batch was; three is also how many positions there are."""
    block = Block()
    model = gate(Positions(block, spread), torch.zeros(batch, 3, 4))
    assert surgeon.status(model).gates[0].skips
    for rows in (8, 3):
        check(model, block, (torch.randn(rows, 3, 4),), skips=True)


@pytest.mark.parametrize("handed_on", [False, True])
def test_positions_in_a_tuple_are_seen_to_have_become_one_per_row(handed_on: bool) -> None:
    """Items that the block picks are taken by rows; a tuple that it hands on would have to be made anew."""
    block = HandsOn() if handed_on else InATuple()
    model = gate(Positions(block, "tuple"), torch.zeros(1, 3, 4))
    assert surgeon.status(model).gates[0].skips
    check(model, block, (torch.randn(8, 3, 4),), skips=not handed_on)


def test_a_condition_for_all_may_become_one_per_row() -> None:
    block = gate(Block(), torch.zeros(4, 4), torch.zeros(1, 4))
    x = torch.randn(8, 4)
    check(block, block, (x, torch.randn(1, 4)), skips=True)  # type: ignore[arg-type]
    check(block, block, (x, torch.randn(8, 4)), skips=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("spread", [1, 8])
def test_a_condition_that_rows_share_is_masked_once_it_has_rows(spread: int) -> None:
    block = gate(Pooled(), torch.zeros(4, 4), torch.zeros(1, 4))
    assert surgeon.status(block).gates[0].skips
    check(block, block, (torch.randn(8, 4), torch.randn(spread, 4)), skips=spread == 1)  # type: ignore[arg-type]


class Looked(nn.Module):
    """Looks up a table that it is given; with as many entries as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + nn.functional.embedding((self.f(x) > 0).long().sum(-1), table).relu()


def test_a_table_is_no_input_with_rows() -> None:
    block = gate(Looked(), torch.zeros(1, 4), torch.zeros(1, 4))
    x, table = torch.randn(8, 4), torch.randn(8, 4)
    for _ in range(5):
        added = block(x, table) - x
        assert all(not a.any() or (a - 2 * table.relu()).abs().sum(-1).min() < 1e-5 for a in added)
