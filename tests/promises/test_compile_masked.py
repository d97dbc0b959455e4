"""The masked form under torch.compile: one graph, fresh draws, no recompilation when the rate changes."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from blocks import Plain, Twice, case, randomise, same
from torch import nn

import surgeon

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def _compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "scaling"),
    [
        ("eager", "inverted"),
        ("eager", "paper"),
        ("aot_eager", "inverted"),
        pytest.param("aot_eager", "paper", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("_compiler")
def test_the_masked_form_compiles_whole_with_fresh_draws(backend: str, scaling: str) -> None:
    model = randomise(nn.Sequential(*(Twice() for _ in range(6))))
    surgeon.apply(model, "linear", drop_rate=0.5, scaling=scaling, example=X)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(8, 4)
    outs = [compiled(x) for _ in range(10)]
    assert counter.frame_count == 1
    assert len({tuple(o.flatten().tolist()) for o in outs}) == 10  # a frozen draw would repeat
    outs[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for rate in (0.4, 0.3, 0.21, 0.1, 0.05):
        surgeon.set_drop_rate(model, rate)
        compiled(x)
    assert counter.frame_count == 1
    frames = counter.frame_count
    assert same(compiled(x).shape, x.shape)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= frames + 1


@pytest.mark.usefixtures("_compiler")
def test_compiled_draws_follow_the_rate() -> None:
    """Rates that change between steps reach the compiled graph; false alarm below 1e-6."""
    from scipy.stats import binomtest

    model = surgeon.apply(Plain(), "uniform", drop_rate=0.5, example=X)
    model.f = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model.f[0].weight), nn.init.ones_(model.f[0].bias)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.zeros(4000, 4)
    for rate in (0.5, 0.2, 0.7, 0.01):
        surgeon.set_drop_rate(model, rate)
        out = compiled(x)[:, 0].detach()
        assert binomtest(int((out > 0).sum()), 4000, 1 - rate).pvalue > 1e-7
        torch.testing.assert_close(out[out > 0].unique(), torch.tensor([1 / (1 - rate)]))


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
def test_inductor_compiles_the_masked_form() -> None:
    c = case("timm:resnet18")
    model = surgeon.apply(randomise(c.build()), drop_rate=0.5, example=c.input())
    compiled = torch.compile(model, fullgraph=True)
    outs = [compiled(c.input()) for _ in range(4)]
    assert len({tuple(o.flatten().tolist()) for o in outs}) == 4
    outs[-1].sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own making
@pytest.mark.usefixtures("_compiler")
def test_the_skipping_form_compiles_in_pieces_with_fresh_draws() -> None:
    model = surgeon.apply(randomise(nn.Sequential(Plain(), Plain())), "uniform", unit="batch", example=X)
    compiled = torch.compile(model, backend="eager")
    outs = {tuple(compiled(X).flatten().tolist()) for _ in range(40)}
    assert len(outs) == 4  # both coins, each way
