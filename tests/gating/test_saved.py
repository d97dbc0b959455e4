"""What autograd keeps of a batch of which a branch ran on some rows: never the same rows twice."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from blocks import drawn, grads, randomise, same, skipping
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from surgeon._gating import lifted, rowops
from surgeon._gating.gate import Gate
from surgeon._gating.gated import gated_blocks, gates_of

IMAGE = torch.zeros(2, 3, 5, 5)


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor counts as large: in small ones nothing is gained by not keeping rows twice."""
    for room in (rowops, lifted):
        monkeypatch.setattr(room, "SMALL", 0)


class Post(nn.Module):
    """A block with its activation behind the addition, as in ResNet."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu_) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 3, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv2(torch.relu(self.conv1(x))))


class WritesFirst(Post):
    """Its branch starts by writing to a tensor of its own, and saves what it wrote."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv2(self.conv1(x * 1).sigmoid_()))


def saved(run: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that autograd keeps, one of each storage."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return list(kept.values())


def shapes(model: nn.Module, rows: list[list[int]]) -> list[torch.Size]:
    patched = drawn(rows)
    found = [t.shape for t in saved(lambda: model(torch.randn(4, 3, 5, 5)))]
    patched.undo()
    return [shape for shape in found if shape[1:] == (3, 5, 5)]


def test_rows_of_what_is_kept_anyway_are_not_kept_again() -> None:
    """Three outputs of ReLU, and the first block's input rows, as nothing else keeps that input."""
    model = skipping(nn.Sequential(Post(), Post(), Post()), example=IMAGE).train()
    assert sorted(shapes(model, [[0, 1, 2]])) == [(3, 3, 5, 5), *[(4, 3, 5, 5)] * 3]


def test_rows_of_what_nothing_else_keeps_are_kept_alone() -> None:
    """Negative control: SiLU reads its input again, not its result."""
    model = skipping(nn.Sequential(*(Post(nn.functional.silu) for _ in range(3))), example=IMAGE).train()
    found = shapes(model, [[0, 1, 2]])
    assert found.count(torch.Size([3, 3, 5, 5])) == 3


def reference(model: nn.Sequential, x: Tensor, rows: list[list[int]]) -> Tensor:
    for block, kept in zip(model, rows, strict=True):
        mask = torch.zeros(len(x), 1, 1, 1, dtype=x.dtype)
        mask[kept] = 2.0
        hidden = block.conv1(x)
        hidden = hidden.sigmoid() if isinstance(block, WritesFirst) else hidden.relu()
        x = torch.relu(x + block.conv2(hidden) * mask)
    return x


@pytest.mark.parametrize("how", ["plain", "reentrant", "checkpoint", "hooks"])
@pytest.mark.parametrize("block", [Post, WritesFirst])
def test_gradients_are_those_of_a_mask(block: Any, how: str) -> None:
    plain, model = (randomise(nn.Sequential(*(block() for _ in range(3)))).double() for _ in range(2))
    skipping(model, example=IMAGE.double()).train()
    rows = [[0, 2, 3], [1, 2], [0, 3]]
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        if how in ("reentrant", "checkpoint"):
            for one in model:
                x = checkpoint(one, x, use_reentrant=how == "reentrant")
            return x
        return model(x)

    def fate(gate: Gate, *_: Any) -> list[int]:
        return rows[gates_of(model).index(gate)]

    sides = []
    for net, forward in ((plain, lambda x: reference(plain, x, rows)), (model, run)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gate, "survivors", lambda gate, _: len(fate(gate)))
            patch.setattr(Gate, "rows", lambda gate, *_: torch.tensor(fate(gate)))
            offload = saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy)
            with offload if how == "hooks" and net is model else nullcontext():
                out = forward(x)
            x.grad = None
            out.square().sum().backward()
        sides.append((out.detach(), x.grad, grads(net)))
    torch.testing.assert_close(*sides, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_goes_through_rows_taken_again() -> None:
    model = skipping(
        randomise(nn.Sequential(Post(), Post(torch.tanh))).double(), example=IMAGE.double()
    ).train()
    assert [gating.saved for _, _, gating in gated_blocks(model)] == [frozenset(), frozenset({0})]
    x = torch.rand(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        out: Tensor = model(x)
        return out

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_a_batch_that_is_written_to_before_the_backward_is_noticed() -> None:
    """As autograd does where the whole batch is saved."""
    first, second = Post(torch.relu), Post(torch.relu)
    model = skipping(nn.Sequential(first, second), example=IMAGE).train()
    hidden = []
    first.register_forward_hook(lambda *a: hidden.append(a[2]))
    patched = drawn([[0, 1]])
    out = model(torch.randn(4, 3, 5, 5))
    patched.undo()
    hidden[0].detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_functional_gradients() -> None:
    """`torch.func` forbids hooks on what is saved; there the rows are kept."""
    model = skipping(randomise(nn.Sequential(Post(), Post())), example=IMAGE).train()
    x, parameters = torch.randn(4, 3, 5, 5), dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = torch.func.functional_call(model, parameters, (x,))
        return out.square().sum()

    loss(parameters).backward()
    found = torch.func.grad(loss)(parameters)
    assert same(found, {name: p.grad for name, p in parameters.items()})


class Apart(nn.Module):
    """Its branch is a module, so that it can be compiled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(x + self.f(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own making
def test_compiled_branches() -> None:
    x, sides = torch.randn(8, 3, 5, 5), []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = randomise(nn.Sequential(Apart(), Apart()))
        for block in model if compiled else ():
            block.f.compile(backend="aot_eager", dynamic=True)
        skipping(model, example=IMAGE).train()
        torch.manual_seed(2)
        out = model(x)
        out.square().sum().backward()
        sides.append((out.detach(), grads(model)))
    torch.testing.assert_close(*sides)
