"""What goes into a branch whole, and when every row is computed and masked."""

from typing import Any

import pytest
import torch
from blocks import Around, Branch, Plain, drawn, randomise, same, skipping
from torch import Tensor, nn

import surgeon
from surgeon._gating.cost import ACCELERATOR, Cost, pays
from surgeon._gating.gated import gates_of

X = torch.zeros(2, 4)


# --- what goes in whole -------------------------------------------------------


class Attends(nn.Module):
    """Attention with a mask per row, a bias for all, and a table that comes as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x + table).reshape(b, n, 3, c).unbind(2)
        scores = q @ k.transpose(1, 2) + self.bias + mask[:, None]
        return x + self.out(scores.softmax(-1) @ v)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.table = Attends(), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x * 1, mask, self.table)


@pytest.mark.parametrize("rows", [1, 3, 6])  # three rows, as many as the table has
def test_masks_follow_their_rows_and_tables_go_in_whole(rows: int) -> None:
    plain = randomise(Attending())
    model = randomise(Attending())
    skipping(model, 0.5, example=(torch.zeros(2, 3, 4), torch.zeros(2, 3)))
    assert surgeon.status(model).gates[0].skips
    x, mask = torch.randn(rows, 3, 4), torch.randn(rows, 3)
    full = plain(x, mask)
    for shared in (mask, mask[:1]):
        full = plain(x, shared)
        for lived in ([], [0], list(range(0, rows, 2))):
            patched = drawn([lived])
            out = model(x, shared)
            patched.undo()
            expected = x.clone()
            expected[lived] = x[lived] + 2 * (full - x)[lived]
            torch.testing.assert_close(out, expected)


# --- when it masks ------------------------------------------------------------


class MeanOverBatch(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x - x.mean(0, keepdim=True))


class RowsWithRows(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f((x @ x.T).softmax(-1) @ x)


class AlongTheBatch(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x.cumsum(0))


class FixedSize(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x.reshape(2, 4))


class Escapes(Branch):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.f(x)
        return x + out, out


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.transpose(0, 1) * 1).transpose(0, 1)


@pytest.mark.parametrize(
    ("block", "shape", "reason"),
    [
        (MeanOverBatch, (2, 4), "mixes the rows of a batch"),
        (RowsWithRows, (2, 4), "mixes the rows of a batch"),
        (AlongTheBatch, (2, 4), "works along the dimension of the rows (cumsum)"),
        (FixedSize, (2, 4), "does not run on another number of rows"),
        (Escapes, (2, 4), "is also used elsewhere in the block"),
        (TokensFirst, (2, 3, 4), "its samples lie along dimension 1 of [3, 2, 4]"),
    ],
)
def test_branches_that_need_the_whole_batch_are_masked_and_say_so(
    block: type[nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    model = skipping(block(), example=torch.zeros(shape))
    status = surgeon.status(model)
    assert not status.gates[0].skips
    assert reason in status.gates[0].note
    assert status.expected_flops == 1
    model(torch.randn(shape))


def test_auto_skips_where_the_arithmetic_outweighs_the_moving_of_rows() -> None:
    wide, narrow = Plain(512), Plain(4)
    for block, x, gains in ((wide, torch.zeros(2, 512), True), (narrow, X, False)):
        surgeon.apply(block, "uniform", drop_rate=0.5, example=x)
        status = surgeon.status(block)
        assert (status.gates[0].skips, status.gates[0].note) == (gains, "")
        assert (status.expected_flops < 1) == gains
    (g,) = gates_of(wide)
    assert (g.branch.flops, g.branch.moved) == (
        2 * 2 * 512 * 512,
        2 * 512 * 4,
    )  # two layers; the shortcut is what it reads
    seen: list[int] = []
    wide.f.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    for rows, rate in ((1000, 0.5), (4, 0.5), (1000, 0.001)):  # it follows the batch, and a ramp
        surgeon.set_drop_rate(wide, rate)
        wide(torch.randn(rows, 512))
    assert not surgeon.status(wide).gates[0].skips
    assert seen == [500, 4, 1000]


def test_what_pays() -> None:
    """More rows, FLOPs and dropping speak for skipping, bytes against it; no FLOPs never pay."""
    cost = Cost(per_call=5e-4, per_byte=1e-10, per_flop=2e-11)
    given = {"drop_rate": 0.2, "rows": 16, "flops": 5_000_000, "moved": 40_000, "statistics": False}
    assert pays(cost, **given)
    for change in ({"drop_rate": 0.02}, {"rows": 4}, {"flops": 500_000}, {"moved": 4_000_000}):
        assert not pays(cost, **{**given, **change})
    assert not pays(cost, 1 - 1e-9, 1e9, 0, 0, statistics=False)
    assert not pays(ACCELERATOR, **given)  # a gate must be larger there
    assert pays(ACCELERATOR, 0.2, 64, 2_000_000_000, 400_000, statistics=False)


def test_where_all_rows_run_or_none_nothing_is_lost_by_skipping() -> None:
    """One row, or two of which statistics are taken: no row is ever gathered."""
    cost = Cost(per_call=1.0, per_byte=1.0, per_flop=1e-15)
    for rows, statistics, gains in ((1, False, True), (2, True, True), (2, False, False), (3, True, False)):
        assert pays(cost, 0.5, rows, 10, 10, statistics=statistics) == gains
    assert not pays(cost, 0.0, 1, 10, 10, statistics=False)


def test_skip_false_masks_in_both_units() -> None:
    for unit in ("sample", "batch"):
        model, seen = skipping(Plain(), skip=False, unit=unit), []
        model.f.register_forward_hook(lambda _, args, out, seen=seen: seen.append(len(args[0])))
        outs = [model(torch.ones(4, 4)) for _ in range(10)]
        assert seen == [4] * 10
        assert surgeon.status(model).expected_flops == 1
        assert any(same(out, torch.ones(4, 4)) for out in outs) == (unit == "batch")


def test_an_unknown_choice_is_named() -> None:
    for wrong in ({"skip": "sometimes"}, {"unused": "maybe"}):
        with pytest.raises(surgeon.SurgeonError, match=next(iter(wrong.values()))):
            surgeon.apply(Plain(), example=X, **wrong)  # type: ignore[arg-type]


# --- what layers keep -----------------------------------------------------------


class Router(nn.Module):
    """Keeps a loss of its own for the training loop to collect."""

    def __init__(self, keeps: str) -> None:
        super().__init__()
        self.score, self.keeps = nn.Linear(4, 4), keeps
        self.loss: Any = [] if keeps == "list" else None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(-1)
        if self.keeps == "tensor":
            self.loss = weights.square().sum()
        elif self.keeps == "dict":
            self.loss = {"router": weights.square().sum()}
        elif self.keeps == "list":
            self.loss.append(weights.square().sum())
        elif self.keeps == "table" and self.loss is None:  # the same in every step
            self.loss = torch.arange(4.0)
        return x * weights


@pytest.mark.parametrize("unit", ["sample", "batch"])
@pytest.mark.parametrize("how", ["tensor", "dict", "list", "table", ""])
def test_what_a_layer_keeps_is_of_this_step(unit: str, how: str) -> None:
    """A dropped router would leave the loss of an earlier step, whose graph is gone."""
    block = Branch()
    block.f = nn.Sequential(nn.Linear(4, 4), Router(how))
    keeps = how in ("tensor", "dict", "list")
    model = randomise(nn.Sequential(Plain(), Around(block.f)))
    surgeon.apply(model, "uniform", drop_rate=0.9, unit=unit, skip=True, example=X)  # type: ignore[arg-type]
    first, second = surgeon.status(model).gates
    assert first.skips
    assert second.skips != keeps
    assert (second.note == "computed also when dropped: it keeps a value in f.1.loss") == keeps
    for _ in range(20 if keeps else 0):
        out, router = model(torch.randn(3, 4)), model[1].f[1]  # type: ignore[index]
        loss = router.loss if how == "tensor" else router.loss["router" if how == "dict" else -1]
        (out.sum() + loss).backward()
