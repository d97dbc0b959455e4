"""Unit "sample" in one compiled graph: rows that survive run, others do not, nothing is compiled anew."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import Plain, Twice, randomise
from scipy.stats import binomtest
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.resnet import BasicBlock

import surgeon

X = torch.zeros(2, 4)
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own making


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are, and notes the rows that linear layers get."""

    def __init__(self) -> None:
        self.frames, self.rows = 0, list[int]()

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.frames += 1
        return _Watch(graph, self.rows).run


class _Watch(torch.fx.Interpreter):
    def __init__(self, graph: Any, rows: list[int]) -> None:
        super().__init__(graph)
        self.rows = rows

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "linear" in str(target):
            self.rows.append(args[0].shape[0])
        return super().call_function(target, args, kwargs)


def gated(block: nn.Module, rate: float = 0.5, **options: Any) -> nn.Module:
    return surgeon.apply(block, "uniform", drop_rate=rate, skip=True, example=X, **options)


@pytest.mark.parametrize("options", [{}, {"rounding": "fixed"}, {"scaling": "paper"}], ids=str)
def test_one_graph_runs_the_rows_that_survive(options: dict[str, Any]) -> None:
    model, backend = gated(randomise(nn.Sequential(*(Twice() for _ in range(3)))), 0.4, **options), Counting()
    compiled, x = torch.compile(model, backend=backend, fullgraph=True), torch.randn(8, 4)
    outs = {tuple(compiled(x).flatten().tolist()) for _ in range(50)}
    assert backend.frames == 1
    assert len(outs) > 45  # a frozen draw would repeat
    assert set(backend.rows) == {5}  # 0.6 * 8 = 4.8
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("rows", "rate"), [(1, 0.3), (5, 0.4), (7, 0.3), (8, 0.5), (4, 0.05)])
def test_each_row_survives_as_often_as_its_gate_says(rows: int, rate: float) -> None:
    """Binomial per row, at a false-alarm rate of 1e-7 each; survivors are divided by p."""
    model, draws = gated(Plain(), rate), 1500
    model.f = nn.Linear(4, 4)
    nn.init.zeros_(model.f.weight), nn.init.ones_(model.f.bias)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    hits, x = torch.zeros(rows), torch.zeros(rows, 4)
    with torch.no_grad():
        for _ in range(draws):
            out = compiled(x)[:, 0]
            hits += out > 0
            torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 1 / (1 - rate)))
    for row in hits.tolist():
        assert binomtest(int(row), draws, 1 - rate).pvalue > 1e-7
    assert binomtest(int(hits[0]), draws, max(0.0, 1 - rate - 0.2)).pvalue < 1e-7  # negative control


def test_numbers_and_gradients_are_those_of_the_rows_that_ran() -> None:
    """Against the plain block on the rows that changed, in float64."""
    model, plain = gated(randomise(Plain()).double(), 0.5), randomise(Plain()).double()
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 4, dtype=torch.float64)
    out = compiled(x)
    out.square().sum().backward()
    kept = (out != x).any(1)
    assert int(kept.sum()) == 3
    expected = x + kept[:, None] * 2 * plain.f(x)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_statistics_are_taken_of_two_rows_at_least() -> None:
    block = BasicBlock(4, 4)
    surgeon.apply(block, "uniform", drop_rate=0.9, skip=True, example=torch.zeros(2, 4, 6, 6))
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for _ in range(5):
        assert torch.isfinite(compiled(torch.randn(4, 4, 6, 6))).all()
    assert block.bn1.num_batches_tracked == 5


def test_a_batch_of_another_size_is_compiled_once_more_and_right() -> None:
    model, backend = gated(Plain(), 0.25), Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows, frames in ((8, 1), (12, 2), (20, 2), (16, 2)):
        x = torch.randn(rows, 4)
        changed = {int((compiled(x) != x).any(1).sum()) for _ in range(3)}
        assert changed == {rows * 3 // 4}
        assert backend.frames == frames


def test_a_ramp_compiles_a_few_times() -> None:
    """At the rates of `CELLS`, however long it takes: six times to the highest rate there is."""
    model, counter = gated(nn.Sequential(Plain(), Plain()), 0.9), CompileCounterWithBackend("eager")
    ramp = surgeon.Ramp(model, 0.9, steps=60)
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), torch.randn(16, 4)
    for _ in range(61):
        compiled(x)
        ramp.step()
    assert 1 < counter.frame_count <= 6


def test_fixed_rounding_is_for_rows_that_are_skipped() -> None:
    for options, said in (({"unit": "batch"}, "one coin for all rows"), ({"skip": False}, "a coin per row")):
        with pytest.raises(surgeon.SurgeonError, match=f"rounding='fixed' is a number of rows.*{said}"):
            surgeon.apply(Plain(), example=X, rounding="fixed", **options)  # type: ignore[arg-type]
    with pytest.raises(surgeon.SurgeonError, match="rounding is 'up'; known are 'random', 'fixed'"):
        surgeon.apply(Plain(), example=X, rounding="up")  # type: ignore[arg-type]


def test_fixed_rounding_says_that_one_row_is_never_dropped() -> None:
    model = gated(Plain(), rounding="fixed")
    with pytest.warns(UserWarning, match="a gate of a Plain never drops: rounding='fixed' keeps the one row"):
        model(torch.zeros(1, 4))


def test_fixed_rounding_keeps_the_mean() -> None:
    """Always as many rows, multiplied by B / k: the mean over the draws is the evaluation output."""
    model, x = (
        gated(randomise(Plain()).double(), 0.4, rounding="fixed"),
        torch.randn(1, 4).double().expand(4, 4),
    )
    with torch.no_grad():
        outs = torch.stack([model(x) for _ in range(2000)])
        assert {int((out != x).any(1).sum()) for out in outs} == {2}
        expected = model.eval()(x)
    error = outs[:, 0].std(0) / len(outs) ** 0.5
    assert bool(((outs[:, 0].mean(0) - expected[0]).abs() <= 6 * error).all())


# --- surgeon.compile --------------------------------------------------------------


class IntoTheBranch(Plain):
    """As ResNets write it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x)
        y += x
        return y


@pytest.mark.parametrize("block", [Plain, IntoTheBranch])
def test_whole_batches_are_compiled_by_branches_with_the_coin_outside(block: type[nn.Module]) -> None:
    """As many graphs at any depth, none anew however coins fall; gradients of what was dropped stay None."""
    frames = []
    for depth in (2, 5):
        torch._dynamo.reset()
        model, plain = (
            surgeon.apply(randomise(nn.Sequential(*(block() for _ in range(depth)))), unit="batch", example=X)
            for _ in range(2)
        )
        plain.load_state_dict(model.state_dict())
        counter, x = CompileCounterWithBackend("eager"), torch.randn(8, 4)
        assert surgeon.compile(model, backend=counter) is model
        for seed in range(12):
            results = []
            for net in (model, plain):
                net.zero_grad(set_to_none=True)
                torch.manual_seed(seed)
                out = net(x)
                if out.requires_grad:
                    out.sum().backward()
                results.append((out.detach(), [p.grad for p in net.parameters()]))
            (a, mine), (b, theirs) = results
            torch.testing.assert_close(a, b)
            assert [g is None for g in mine] == [g is None for g in theirs]
        frames.append(counter.frame_count)
        surgeon.set_drop_rate(model, 0.2)
        for _ in range(5):
            model(x)
        assert counter.frame_count == frames[-1]
    assert 0 < frames[0] == frames[1] <= 2  # the first block's input needs no gradient


def test_samples_are_compiled_as_a_whole() -> None:
    model, counter = gated(nn.Sequential(Plain(), Plain())), CompileCounterWithBackend("eager")
    assert surgeon.compile(model, backend=counter, fullgraph=True) is model
    model(torch.randn(4, 4))
    assert counter.frame_count == 1


def test_a_model_without_gates_is_not_compiled() -> None:
    with pytest.raises(surgeon.SurgeonError, match="the model has no gates"):
        surgeon.compile(Plain())


ZOO = "resnet18 convnext_atto swin_tiny_patch4_window7_224 efficientnet_b0 mobilenetv3_small_100 "
ZOO += "poolformer_s12 vit_tiny_patch16_224 regnetx_002 mixer_s32_224 levit_128s"


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO.split())
def test_models_of_the_zoos_stay_one_graph(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = randomise(timm.create_model(name, drop_rate=0.0))  # many end their branches in zeros
    surgeon.apply(model, "uniform", drop_rate=0.5, skip=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x: Tensor = torch.randn(4, 3, 224, 224)
    outs = [compiled(x) for _ in range(2)]
    outs[0] = outs[0][0] if isinstance(outs[0], tuple) else outs[0]
    outs[0].sum().backward()
    assert not torch.equal(outs[0], outs[1][0] if isinstance(outs[1], tuple) else outs[1])


def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Calls(nn.Module):
    """Runs a method of its own and a function of its file, which a compiler is not to look for."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def branch(self, x: Tensor) -> Tensor:
        return doubled(self.f(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_methods_and_functions_of_the_file_stay_in_the_one_graph() -> None:
    model = nn.Sequential(Calls(), Calls())
    surgeon.apply(model, "uniform", drop_rate=0.5, skip=True, example=torch.randn(8, 4))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outs = [compiled(torch.ones(8, 4)) for _ in range(2)]
    assert not torch.equal(*outs)
