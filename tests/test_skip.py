"""Skipping by rows: who survives, what it costs, what stays whole, and when a gate masks instead.

Random quantities are tested with exact binomial tests or by enumeration, on fixed seeds; the stated
false-alarm rate is that of a fresh seed.
"""

import itertools
from typing import Any

import pytest
import timm
import torch
from blocks import BasicBlock, Branch, Linear, Plain, Twice, grads, randomise, same
from scipy.stats import binomtest, chi2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgeon
from surgeon._gating.cost import pays
from surgeon._gating.gate import Gate, Origin
from surgeon._surgery import gates_of

X = torch.zeros(2, 4)
ALARM = 1e-7  # of one test of a frequency


def gate(rate: float, *, statistics: bool = False) -> Gate:
    origin = Origin("uniform", (), (), {})
    return Gate(
        "g", "identity", 0, 0, "sample", "inverted", rate, 1.0, 0.1, origin, True, statistics=statistics
    )


def gated(model: nn.Module, rate: float = 0.5, **options: Any) -> nn.Module:
    options = {"example": X, "skip": True, **options}
    return surgeon.apply(model, "uniform", drop_rate=rate, **options)


# --- who survives -------------------------------------------------------------


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(("count", "rate"), [(1, 0.3), (2, 0.5), (3, 0.75), (5, 0.9), (8, 0.3), (64, 0.01)])
def test_every_row_survives_as_often_as_its_gate_says(count: int, rate: float, statistics: bool) -> None:
    """Binomial per row, at a false-alarm rate of 1e-7 each."""
    g, draws = gate(rate, statistics=statistics), 6000
    hits = torch.zeros(count)
    for _ in range(draws):
        kept = g.survivors(count)
        assert not (statistics and kept == 1 < count)
        hits[g.rows(count, kept, torch.device("cpu"))] += 1
    for row in hits.tolist():
        assert binomtest(int(row), draws, 1 - rate).pvalue > ALARM


def test_the_test_of_frequencies_can_fail() -> None:
    """Negative control: rounding the number of rows always down (as with a fixed share) is noticed."""
    g, draws = gate(0.3), 6000
    hits = sum(0 in g.rows(5, int(0.7 * 5), torch.device("cpu")) for _ in range(draws))
    assert binomtest(hits, draws, 0.7).pvalue < ALARM


@pytest.mark.parametrize(("count", "rate"), [(4, 0.5), (5, 0.4), (7, 0.11)])
def test_the_number_of_rows_is_exact_on_average(count: int, rate: float) -> None:
    """By enumeration: over a fine grid of the uniform number behind it the mean is ``p B``."""
    seen, grid = [], 2000
    with pytest.MonkeyPatch.context() as patch:
        for i in range(grid):
            patch.setattr(torch, "rand", lambda *_, i=i, **__: torch.tensor([(i + 0.5) / grid, 0.0]).double())
            seen.append(gate(rate).survivors(count))
    assert abs(sum(seen) / grid - (1 - rate) * count) <= 1 / grid
    assert max(seen) - min(seen) <= 1


def test_every_set_of_rows_is_equally_likely() -> None:
    """Chi-squared over the ten pairs of five rows; false alarm 1e-7."""
    g, draws = gate(0.6), 5000
    pairs = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for _ in range(draws):
        rows = g.rows(5, 2, torch.device("cpu")).tolist()
        assert rows == sorted(rows)
        pairs[tuple(rows)] += 1
    expected = draws / len(pairs)
    assert chi2.sf(sum((n - expected) ** 2 / expected for n in pairs.values()), len(pairs) - 1) > ALARM


def test_gates_are_independent() -> None:
    """Chi-squared on the joint fates of one row at two gates; false alarm 1e-7."""
    model, draws = gated(Twice()), 4000
    model.f, model.g = Ones(), Tens()
    with torch.no_grad():
        out = [float(model(torch.zeros(4, 4))[2, 0]) for _ in range(draws)]
    counts = [out.count(v) for v in (0.0, 2.0, 20.0, 22.0)]
    assert sum(counts) == draws
    assert chi2.sf(sum((n - draws / 4) ** 2 / (draws / 4) for n in counts), 3) > ALARM


class Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class Tens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 10)


@pytest.mark.parametrize("scaling", ["inverted", "paper"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_mean_training_output_is_the_evaluation_output(rows: int, scaling: str) -> None:
    """Over many draws of a chain linear in its branches; six standard errors, false alarm 2e-9 each."""
    model = gated(
        randomise(nn.Sequential(*(Linear() for _ in range(3)))).double(),
        0.4,
        scaling=scaling,
        example=X.double(),
    )
    surgeon.set_drop_rate(model, 0.3)
    x = torch.randn(1, 4, dtype=torch.float64).expand(rows, 4)
    with torch.no_grad():
        outs = torch.stack([model(x)[-1] for _ in range(4000)])
        expected = model.eval()(x)[-1]
    error = outs.std(0) / len(outs) ** 0.5
    assert bool(((outs.mean(0) - expected).abs() <= 6 * error + 1e-12).all())
    assert bool(((outs.mean(0) - 1.3 * expected).abs() > 6 * error).any())  # negative control


# --- what is computed ---------------------------------------------------------


def drawn(rows: list[list[int]]) -> pytest.MonkeyPatch:
    """Lets the given rows survive, one list per draw, over and over."""
    patch, order = pytest.MonkeyPatch(), itertools.cycle(rows)
    chosen: list[list[int]] = []

    def survivors(gate: Gate, count: int) -> int:
        chosen.append(next(order))
        return len(chosen[-1])

    patch.setattr(Gate, "survivors", survivors)
    patch.setattr(Gate, "rows", lambda *_: torch.tensor(chosen[-1]))
    return patch


class Project(Branch):
    """A branch beside a projection, that reads another tensor than the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.f(x)


class IntoShortcut(Branch):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x += self.f(x * 1)
        return x.relu_()


class IntoBranch(Branch):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x
        return out.relu_()


class Sizes(Branch):
    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape
        return x + self.f(x.reshape(n * 2, c // 2).reshape(n, c))


class InPlaceHead(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x.mul(1).relu_())


def by_hand(block: nn.Module, x: Tensor, rows: list[int], factor: float) -> Tensor:
    """The same block, its branch run on every row and masked by hand."""
    mask = torch.zeros(len(x), 1, dtype=x.dtype)
    mask[rows] = factor
    if isinstance(block, InPlaceHead):
        return x + block.f(x.relu()) * mask
    out = (block.down(x) if isinstance(block, Project) else x) + block.f(x) * mask
    return out.relu() if isinstance(block, (IntoShortcut, IntoBranch)) else out


BLOCKS = [Plain, Project, IntoShortcut, IntoBranch, Sizes, InPlaceHead]


@pytest.mark.parametrize("rows", [[], [0], [1, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_outputs_and_gradients_are_those_written_by_hand(block: Any, scaling: str, rows: list[int]) -> None:
    plain, model = randomise(block()).double(), randomise(block()).double()
    gated(model, 0.25, scaling=scaling, unused="zero", example=X.double())
    (state,) = surgeon.status(model).gates
    assert (state.skips, state.note) == (True, "")
    sides = []
    for net, run in (
        (plain, lambda x: by_hand(plain, x, rows, 1 / 0.75 if scaling == "inverted" else 1.0)),
        (model, model),
    ):
        x = torch.randn(
            4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        patched = drawn([rows])
        out = run(x)
        patched.undo()
        (out * torch.linspace(1, 2, 16).view_as(out)).sum().backward()
        sides.append((out.detach(), x.grad, grads(net)))
    torch.testing.assert_close(*sides, rtol=1e-12, atol=1e-12)
    if 0 < len(rows) < 4 and block is Plain:
        lost = [i for i in range(4) if i not in rows]
        assert same(
            sides[1][0][lost],
            torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[lost],
        )


def test_dropped_rows_are_computed_neither_forward_nor_backward() -> None:
    model, seen = gated(Plain(), 0.5), []
    model.f.register_forward_hook(lambda _, args, out: seen.append(("forward", len(args[0]))))
    model.f.register_full_backward_hook(lambda _, before, after: seen.append(("backward", len(after[0]))))
    patched = drawn([[1, 2], [], [0]])
    for _ in range(3):
        model(torch.randn(4, 4, requires_grad=True)).sum().backward()
    patched.undo()
    assert seen == [("forward", 2), ("backward", 2), ("forward", 1), ("backward", 1)]


def test_a_second_derivative_exists() -> None:
    model = gated(randomise(nn.Sequential(Linear(), nn.Tanh(), Linear())).double(), example=X.double())
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = model(x)
        return out

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_rows(reentrant: bool) -> None:
    model = gated(randomise(nn.Sequential(*(Plain() for _ in range(6)))))
    x = torch.randn(5, 4, requires_grad=True)
    sides = []
    for replay in (False, True):
        model.zero_grad()
        torch.manual_seed(4)
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant) if replay else block(y)
        y.square().sum().backward()
        sides.append((y, grads(model), torch.random.get_rng_state()))
    assert same(*sides)


def test_the_same_seed_gives_the_same_step() -> None:
    model, x = gated(nn.Sequential(*(Plain() for _ in range(4)))), torch.randn(6, 4)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert same(outs[0], outs[1])
    assert not same(outs[0], outs[2])


def test_autocast() -> None:
    for block in (Plain(), IntoBranch(), Project()):
        model, x = gated(block), torch.randn(6, 4)
        for seed in range(6):
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(x).float().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(layout: torch.memory_format) -> None:
    model = gated(BasicBlock(), example=torch.zeros(2, 4, 6, 6)).to(memory_format=layout)
    seen: list[Tensor] = []
    model.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    patched = drawn([[0, 2]])
    out = model(torch.randn(4, 4, 6, 6).to(memory_format=layout))
    patched.undo()
    assert seen[0].shape[0] == 2
    assert all(t.is_contiguous(memory_format=layout) for t in (out, *seen))


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
    gated(model, 0.5, example=(torch.zeros(2, 3, 4), torch.zeros(2, 3)))
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
    model = gated(block(), example=torch.zeros(shape))
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
    assert (g.flops, g.moved) == (2 * 2 * 512 * 512, 2 * 512 * 4)  # two layers; the shortcut is what it reads
    seen: list[int] = []
    wide.f.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    for rows, rate in ((1000, 0.5), (4, 0.5), (1000, 0.001)):  # it follows the batch, and a ramp
        surgeon.set_drop_rate(wide, rate)
        wide(torch.randn(rows, 512))
    assert not surgeon.status(wide).gates[0].skips
    assert seen == [500, 4, 1000]


def test_what_pays() -> None:
    """More rows, FLOPs and dropping speak for skipping, bytes against it; no FLOPs never pay."""
    given = {"drop_rate": 0.2, "rows": 16, "flops": 5_000_000, "moved": 40_000, "device": "cpu"}
    assert pays(**given)
    for change in ({"drop_rate": 0.02}, {"rows": 1}, {"flops": 500_000}, {"moved": 4_000_000}):
        assert not pays(**{**given, **change})
    assert not pays(1 - 1e-9, 1e9, 0, 0, "cpu")
    assert not pays(**{**given, "device": "cuda"})  # a gate must be larger there
    assert pays(0.2, 64, 2_000_000_000, 400_000, "cuda")


def test_skip_false_masks_in_both_units() -> None:
    for unit in ("sample", "batch"):
        model, seen = gated(Plain(), skip=False, unit=unit), []
        model.f.register_forward_hook(lambda _, args, out, seen=seen: seen.append(len(args[0])))
        outs = [model(torch.ones(4, 4)) for _ in range(10)]
        assert seen == [4] * 10
        assert surgeon.status(model).expected_flops == 1
        assert any(same(out, torch.ones(4, 4)) for out in outs) == (unit == "batch")


def test_an_unknown_choice_is_named() -> None:
    for wrong in ({"skip": "sometimes"}, {"unused": "maybe"}):
        with pytest.raises(surgeon.SurgeonError, match=next(iter(wrong.values()))):
            surgeon.apply(Plain(), example=X, **wrong)  # type: ignore[arg-type]


# --- batch norm ---------------------------------------------------------------


def test_batch_norm_never_sees_a_single_row_of_many() -> None:
    block = gated(BasicBlock(), 0.75, example=torch.zeros(2, 4, 6, 6))
    (g,) = gates_of(block)
    assert g.statistics
    seen: list[int] = []
    block.bn1.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    for _ in range(200):
        block(torch.randn(4, 4, 1, 1))  # one value per channel and row: a single row would raise
    assert set(seen) == {2}
    block.bn1.eval(), block.bn2.eval()


def test_statistics_are_those_of_the_survivors() -> None:
    block = gated(BasicBlock(), 0.5, example=torch.zeros(2, 4, 6, 6))
    reference = BasicBlock()
    reference.load_state_dict(block.state_dict())
    x = torch.randn(4, 4, 6, 6)
    patched = drawn([[1, 2]])
    block(x)
    patched.undo()
    reference(x[[1, 2]])
    assert same(block.state_dict(), reference.state_dict())


# --- gradients of what did not run --------------------------------------------


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_unused_parameters_get_zeros_or_nothing(unit: str) -> None:
    for unused in ("zero", "none", "auto"):
        model = gated(Plain(), unit=unit, unused=unused)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gate, "survives", lambda _: False)
            patch.setattr(Gate, "survivors", lambda *_: 0)
            x = torch.randn(3, 4, requires_grad=True)
            out = model(x)
            assert out.data_ptr() != x.data_ptr()  # the user may write to what a model returns
            out.sum().backward()
        assert same(x.grad, torch.ones(3, 4))
        if unused == "zero":
            assert all(same(p.grad, torch.zeros_like(p)) for p in model.parameters())
        else:
            assert all(p.grad is None for p in model.parameters())
        surgeon.remove(model)


def test_frozen_and_shared_tensors_among_the_unused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.gain = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            gain = self.gain * 2
            x = x + self.f(x) * gain
            return x + self.f(x).tanh() * gain

    model = gated(Shared(), unit="batch", unused="zero")
    model.f[0].bias.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gate, "survives", lambda _: False)
        model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert model.f[0].bias.grad is None
    assert same(model.gain.grad, torch.zeros(4))
    assert same(model.f[0].weight.grad, torch.zeros(4, 4))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_the_optimizer_makes_of_it(kind: str) -> None:
    """Zeros: momentum and weight decay go on, as in the paper's code. None: the weights stand still."""
    moved = {}
    for unused in ("zero", "none"):
        model = gated(randomise(Plain()), unit="batch", unused=unused)
        parameters = list(model.parameters())
        optimizer: Any = (
            torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1)
            if kind == "sgd"
            else torch.optim.AdamW(parameters, 0.1, weight_decay=0.1)
        )
        with pytest.MonkeyPatch.context() as patch:
            for kept in (True, False):
                patch.setattr(Gate, "survives", lambda _, kept=kept: kept)
                before = model.f[0].weight.detach().clone()
                optimizer.zero_grad(set_to_none=True)
                model(torch.randn(3, 4, requires_grad=True)).square().sum().backward()
                if kept:
                    gradient = model.f[0].weight.grad.clone()
                optimizer.step()
        if kind == "sgd" and unused == "zero":  # v = g + w d; then v' = 0.9 v + w' d
            velocity = 0.9 * (gradient + 0.1 * randomise(Plain()).f[0].weight) + 0.1 * before
            torch.testing.assert_close(model.f[0].weight, before - 0.1 * velocity)
        moved[unused] = not same(before, model.f[0].weight)
    assert moved == {"zero": True, "none": False}


# --- published models ---------------------------------------------------------

REAL = {
    "resnet18": 64,
    "vit_tiny_patch16_224": 224,
    "convnext_atto": 64,
    "swin_tiny_patch4_window7_224": 224,
    "beit_base_patch16_224": 224,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n[:4] in ("swin", "beit") else []) for n in REAL],
)
def test_published_models_train_on_some_rows(name: str) -> None:
    """All gates skip, gradients are finite everywhere, and all rows give the plain model's numbers."""
    size = REAL[name]
    x = torch.randn(3, 3, size, size)
    model = randomise(timm.create_model(name, num_classes=3))
    plain = randomise(timm.create_model(name, num_classes=3, drop_path_rate=0.0))  # Swin has 0.1 of its own
    gated(model, 0.4, example=x[:2], scaling="paper", unused="zero")
    status = surgeon.status(model)
    assert all(g.skips for g in status.gates), [g.note for g in status.gates]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gate, "survivors", lambda _, count: count)
        assert same(model(x), plain(x))
    model(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_some_rows_of_a_vit_are_what_masking_gives() -> None:
    """Every block runs on rows 0 and 2 of three; a masked model with the same rows agrees."""
    x, sides = torch.randn(3, 3, 64, 64), []
    for skip in (True, False):
        model = randomise(
            timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=3)
        ).double()
        gated(model, 0.4, skip=skip, example=x[:2].double())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gate, "survivors", lambda *_: 2)
            patch.setattr(Gate, "rows", lambda *_: torch.tensor([0, 2]))
            patch.setattr(Gate, "mask", lambda g, b: torch.tensor([1.0, 0, 1]).double().view(3, 1, 1) / 0.6)
            out = model(x.double())
        out.square().sum().backward()
        sides.append((out.detach(), grads(model)))
    torch.testing.assert_close(*sides)
