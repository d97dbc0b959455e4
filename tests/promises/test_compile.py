"""Gates that toss a coin in Python under torch.compile: how many graphs, fresh draws, branches alone.

Unit "sample" in one graph is in test_compile_rows.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import Plain, randomise, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import surgeon
from surgeon._gating.gated import gates_of

X = torch.zeros(2, 4)
FORMS = [{"unit": "batch"}, {"unit": "sample"}]
forms = pytest.mark.parametrize("options", FORMS, ids=lambda o: o["unit"])
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own making


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gated(**options: Any) -> nn.Module:
    model = randomise(nn.Sequential(*(Plain() for _ in range(3))))
    return surgeon.apply(model, "uniform", drop_rate=0.5, skip=True, example=X, **options)


@pytest.mark.slow
@forms
def test_the_number_of_graphs_is_bounded_and_draws_are_fresh(options: dict[str, Any]) -> None:
    """After a while nothing is compiled any more, however the coins fall; the numbers are those without."""
    model, counter = gated(**options), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    x, frames = torch.randn(8, 4), []
    torch.manual_seed(0)
    outs = []
    for _ in range(40):
        outs.append(compiled(x))
        frames.append(counter.frame_count)
    assert frames[-1] == frames[25]
    assert frames[-1] <= 12 * len(gates_of(model))
    assert len({tuple(out.flatten().tolist()) for out in outs}) >= 7  # a frozen draw would repeat one
    if options["unit"] == "batch":  # in one graph the rows are drawn in another order
        torch.manual_seed(0)
        assert same([model(x) for _ in range(40)], outs)


class Shared(nn.Module):
    """Two branches read what one layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.f, self.g = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.made(x).tanh().chunk(2, dim=-1)
        x = x + self.f(torch.cat((a, a), -1)).relu()
        return x + self.g(torch.cat((b, a), -1)).relu()


@pytest.mark.slow
@forms
def test_what_a_dropped_branch_would_have_read_compiles_nothing_anew(options: dict[str, Any]) -> None:
    """Every step reads other tensors; a graph that knew them by identity would hold for one."""
    model, counter = Shared(), CompileCounterWithBackend("eager")
    surgeon.apply(model, "uniform", drop_rate=0.8, skip=True, unused="zero", example=X, **options)
    compiled, frames = torch.compile(model, backend=counter), []
    torch.manual_seed(0)
    for _ in range(30):
        compiled(torch.randn(2, 4)).sum().backward()
        frames.append(counter.frame_count)
    assert frames[-1] == frames[15] <= 8


@pytest.mark.slow
@forms
def test_a_changed_rate_compiles_little(options: dict[str, Any]) -> None:
    model, counter = gated(**options), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(8, 4)
    for _ in range(30):
        compiled(x)
    frames = counter.frame_count
    for rate in (0.45, 0.4, 0.35, 0.3, 0.25, 0.2):
        surgeon.set_drop_rate(model, rate)
        for _ in range(3):
            compiled(x)
    assert counter.frame_count <= frames + 2 * len(gates_of(model))


@forms
def test_branches_compiled_by_themselves_keep_the_saving(options: dict[str, Any]) -> None:
    """The way the documentation shows: whole graphs inside, the coin outside, no row too many."""
    model, counter, rows = gated(**options), CompileCounterWithBackend("eager"), list[int]()

    def backend(graph: Any, inputs: Any) -> Any:
        run = counter(graph, inputs)

        def counted(*args: Any) -> Any:
            rows.extend(
                a.shape[0]
                for a in args
                if isinstance(a, Tensor)
                and a.shape[1:] == (4,)
                and a is not None
                and not isinstance(a, nn.Parameter)
            )
            return run(*args)

        return counted

    reference = gated(**options)
    for block in model:
        block.f.compile(backend=backend, fullgraph=True)
    x, steps = torch.randn(8, 4), 40
    for net in (model, reference):
        torch.manual_seed(0)
        outs = [net(x) for _ in range(steps)]
        if net is model:
            kept = outs
    assert same(kept, outs)
    assert counter.frame_count <= 3
    assert 0 < sum(rows) < 0.7 * 3 * 8 * steps  # half of the rows, and some noise
