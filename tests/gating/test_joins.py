"""Drop-path at joins against references written by hand, with forced draws; draws by the million."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

import surgeon
from surgeon import _recipes
from surgeon._gating import joins
from surgeon._gating.gated import gates_of
from surgeon.errors import UsageError

X = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SMALL = X[..., :2, :2].clone()
ALARM = 1e-6  # the chance that a test of this file fails by accident, each


def network(columns: int = 3, blocks: int = 2) -> nn.Module:
    """A small fractal network whose norms have statistics of their own."""
    torch.manual_seed(1)
    model = _recipes.models()["fractalnet20_wide"].func(columns, 5, widths=(4, 6)[:blocks])
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    return model


def forced(monkeypatch, kept):
    """The survivors of each join in turn: numbers of paths, or a mask for each sample."""
    turns = iter(kept)

    def survivors(gate, paths, rows):
        turn = next(turns)
        if isinstance(turn, torch.Tensor):
            return turn
        return torch.tensor([[i in turn] * rows for i in range(paths)])

    monkeypatch.setattr(joins, "_survivors", survivors)


def by_hand(block, x, first, second):
    """A fractal block of three columns, given for each of its joins which paths survive."""
    one, two, four = block.columns

    def mean(paths, kept):
        values = [path() for path, share in zip(paths, kept.unbind(), strict=True) if share.any()]
        shares = [share for share in kept.unbind() if share.any()]
        total = sum(v * s.view(-1, 1, 1, 1) for v, s in zip(values, shares, strict=True))
        return total / kept.sum(0).view(-1, 1, 1, 1)

    done = {}

    def inner():
        if "y" not in done:
            done["y"] = mean([lambda: two[0](x), lambda: four[1](four[0](x))], first.float())
        return done["y"]

    return mean(
        [lambda: one[0](x), lambda: two[1](inner()), lambda: four[3](four[2](inner()))], second.float()
    )


def reference(model, x, kept):
    for i, block in enumerate(model.blocks[::2]):
        x = model.blocks[2 * i + 1](by_hand(block, x, kept[2 * i], kept[2 * i + 1]))
    return model.fc(x.flatten(1))


def rows(kept, paths, count=1):
    return torch.tensor([[i in kept] * count for i in range(paths)])


CHOICES = [
    [(0, 1), (0, 1, 2), (0, 1), (0, 1, 2)],
    [(0,), (0,), (1,), (2,)],  # the first join of the first block is needed by none
    [(1,), (1, 2), (0, 1), (0, 2)],
    [(0, 1), (1,), (0,), (1, 2)],
]


@pytest.mark.parametrize("kept", CHOICES)
@pytest.mark.parametrize("skip", [True, False])
def test_survivors_of_the_batch_against_a_reference(kept, skip, monkeypatch):
    model = network()
    twin = copy.deepcopy(model)
    surgeon.apply(model, unit="batch", skip=skip, paths="local", example=X)
    forced(monkeypatch, kept)
    y = model(X)
    wanted = reference(twin, X, [rows(k, 2 + i % 2) for i, k in enumerate(kept)])
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None if skip else not p.grad.any(), name
        else:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    if skip:  # a layer that ran has counted the batch
        counted = [m.num_batches_tracked for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert counted == [m.num_batches_tracked for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]


def test_survivors_of_each_sample_against_a_reference(monkeypatch):
    model = network()
    twin = copy.deepcopy(model)
    surgeon.apply(model, unit="sample", example=X)
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(2 + i % 2, 6, generator=generator) < 0.5 for i in range(4)]
    for mask in masks:
        mask[0] |= ~mask.any(0)
    forced(monkeypatch, masks)
    y = model(X)
    torch.testing.assert_close(y, reference(twin, X, masks))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_one_column_for_the_whole_network(unit, column):
    model = network()
    twin = copy.deepcopy(model)
    surgeon.apply(model, unit=unit, paths="global", example=X)
    columns = gates_of(model)[0].columns
    columns._drawn = lambda gate, count: torch.full((count,), column)
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    y = model(X)
    wanted = X
    for i, block in enumerate(twin.blocks[::2]):
        wanted = twin.blocks[2 * i + 1](nn.Sequential(*block.columns[column])(wanted))
    torch.testing.assert_close(y, twin.fc(wanted.flatten(1)))
    assert surgeon.status(model).column == (column + 1,) * (6 if unit == "sample" else 1)
    if unit == "batch":
        assert len(ran) == 2 * 2**column
        assert all(f"columns.{column}." in name for name in ran)


@pytest.mark.parametrize("paths", [2, 3, 5])
@pytest.mark.parametrize("rate", [0.15, 0.5, 0.95])
def test_a_million_draws_of_a_join(paths, rate):
    count = 10**6
    numbers = torch.rand(paths + 1, count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    kept = joins.survivors(numbers, rate)
    assert kept.any(0).all()
    chance = 1 - rate + rate**paths / paths
    for path in kept:
        assert stats.binomtest(int(path.sum()), count, chance).pvalue > ALARM
    every = int(kept.all(0).sum())
    assert stats.binomtest(every, count, (1 - rate) ** paths).pvalue > ALARM
    model = network()
    surgeon.apply(model, "uniform", drop_rate=rate, paths="local", example=X)
    gate = gates_of(model)[0]
    gate.branch = replace(gate.branch, paths=paths)
    assert math.isclose(joins.survival(gate), chance)


@pytest.mark.parametrize("mode", ["local", "global", "both"])
@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_the_mean_over_draws_is_that_of_all_paths(mode, unit):
    """By a t-test of each number of a join's result, at 10^5 draws."""
    model = network(blocks=1)
    surgeon.apply(model, "uniform", drop_rate=0.4, unit=unit, paths=mode, example=SMALL)
    last = gates_of(model)[-1]
    count = 10**5 if unit == "sample" else 2000
    values = [
        torch.full((count if unit == "sample" else 1, 1), v, dtype=torch.float64) for v in (1.0, 4.0, -2.0)
    ]
    torch.manual_seed(7)
    drawn = [joins.masked_mean(last, *values) for _ in range(3 if unit == "sample" else count)]
    assert stats.ttest_1samp(torch.cat(drawn).flatten().numpy(), 1.0).pvalue > ALARM


def test_half_of_the_steps_are_global():
    model = network(blocks=1)
    surgeon.apply(model, unit="batch", example=SMALL)
    columns, lead = gates_of(model)[0].columns, gates_of(model)[0]
    torch.manual_seed(11)
    drawn = torch.cat([columns.draw(lead, 1) for _ in range(4000)])
    assert stats.binomtest(int((drawn < 0).sum()), 4000, 0.5).pvalue > ALARM
    counts = [int((drawn == c).sum()) for c in range(3)]
    assert stats.chisquare(counts).pvalue > ALARM


def test_all_joins_of_a_step_follow_the_column_of_the_first():
    model = network()
    surgeon.apply(model, unit="batch", paths="global", example=X)
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name.split(".")[3]))
    seen = set()
    for _ in range(20):
        ran.clear()
        model(X)
        assert set(ran) == {str(surgeon.status(model).column[0] - 1)}
        seen |= set(ran)
    assert seen == {"0", "1", "2"}


def test_evaluation_stays_and_gates_come_off():
    model = network().eval()
    before, keys = model(X), list(model.state_dict())
    surgeon.apply(model, scaling="paper", example=X)
    assert torch.equal(model.eval()(X), before) and list(model.state_dict()) == keys
    plain = surgeon.fold(model)
    assert torch.equal(plain(X), before)
    assert type(plain.blocks[0]) is type(network().blocks[0])
    assert torch.equal(surgeon.remove(model)(X), before)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301 - own
def test_copies_draw_for_themselves(twin):
    model = network()
    surgeon.apply(model, unit="batch", paths="global", example=X)
    model(X)
    other = twin(model)
    assert gates_of(other)[0].columns is not gates_of(model)[0].columns
    assert len({id(gate.columns) for gate in gates_of(other)}) == 1
    torch.manual_seed(0)
    y = model(X)
    torch.manual_seed(0)
    assert torch.equal(other(X), y)


def test_frozen_paths_that_survive_alone_leave_a_backward(monkeypatch):
    model = network(blocks=1)
    surgeon.apply(model, unit="batch", example=SMALL)
    for p in (*model.blocks[0].columns[0].parameters(), *model.fc.parameters()):
        p.requires_grad_(requires_grad=False)
    forced(monkeypatch, [(0,), (0,)])
    model(SMALL).sum().backward()


def test_unused_paths_get_zeros_where_asked(monkeypatch):
    model = network(blocks=1)
    surgeon.apply(model, unit="batch", unused="zero", example=SMALL)
    forced(monkeypatch, [(0,), (0,)])
    model(SMALL).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model.blocks[0].columns[2].parameters())


def test_checkpointed_blocks_repeat_their_draws():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, blocks) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model = network()
    surgeon.apply(model, unit="batch", example=X)
    for seed in range(6):
        grads = []
        for run in (Checkpointed(model.blocks), model.blocks):
            model.zero_grad()
            torch.manual_seed(seed)
            run(X).square().sum().backward()
            grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b)


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_a_rate_of_zero_never_drops(unit):
    model = network()
    twin = copy.deepcopy(model)
    surgeon.apply(model, unit=unit, paths="global", example=X)
    surgeon.set_drop_rate(model, 0.0)
    torch.testing.assert_close(model(X), twin(X))
    assert all(gate.survival == 1 for gate in surgeon.status(model).gates)


def test_global_drop_path_needs_columns():
    model = network(columns=1)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UsageError, match=r"paths='global' keeps one column.*FractalNet has one column"):
        surgeon.apply(model, unit="batch", paths="global", example=X)
    assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(UsageError, match="paths is 'globl'; known are 'both', 'local', 'global'"):
        surgeon.apply(model, paths="globl", example=X)


# --- columns ------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, None])
def test_a_column_is_a_plain_network(k):
    model = network()
    surgeon.apply(model, scaling="paper", example=X)
    before = [(type(m), m.training) for m in model.modules()]
    column = surgeon.column(model, k, example=X)
    assert [(type(m), m.training) for m in model.modules()] == before
    place = (k or 3) - 1
    twin, wanted = network().eval(), X
    for i, block in enumerate(twin.blocks[::2]):
        wanted = twin.blocks[2 * i + 1](nn.Sequential(*block.columns[place])(wanted))
    assert torch.equal(column(X), twin.fc(wanted.flatten(1)))
    assert len([m for m in column.modules() if isinstance(m, nn.Conv2d)]) == 2 * 2**place
    state = twin.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in column.state_dict().items())
    column.fc.weight.data.zero_()
    assert model.fc.weight.any()


def test_a_column_is_exported(tmp_path):
    onnx = pytest.importorskip("onnx")
    column = surgeon.column(network(), example=X)
    report = surgeon.export(column, tmp_path / "column.onnx", example=X[:1])
    assert report.parity is not None and report.parity.ok
    nodes = [node.op_type for node in onnx.load(tmp_path / "column.onnx").graph.node]
    assert nodes.count("Conv") == 8
    assert set(nodes) <= {"Conv", "Relu", "MaxPool", "Flatten", "Reshape", "Gemm", "BatchNormalization"}


def test_a_column_of_a_model_that_is_one_block():
    block = network(blocks=1).blocks[0]
    column = surgeon.column(block, 2, example=SMALL)
    assert torch.equal(column(SMALL), nn.Sequential(*block.eval().columns[1])(SMALL))


@pytest.mark.parametrize("k", [0, 4, -1, True, 1.0])
def test_columns_that_do_not_exist(k):
    with pytest.raises(UsageError, match=rf"k is {k!r}; FractalNet has the columns 1 \(the shortest\) to 3"):
        surgeon.column(network(), k, example=X)


def test_a_model_without_joins_has_no_columns():
    with pytest.raises(UsageError, match="FractalNet has one column: it has no join"):
        surgeon.column(network(columns=1), example=X)
