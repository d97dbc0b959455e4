"""Rows of small tensors go by PyTorch's own operators, those of large ones by functions: the same bits."""

import copy

import pytest
import torch
from blocks import Plain, Twice, grads, randomise, same
from torch import nn

import surgeon
from surgeon._gating import lifted, rowops


@pytest.mark.parametrize("block", [Plain, Twice])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_give_the_same_bits(
    block: type[nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise(nn.Sequential(*(block() for _ in range(4)))).to(dtype)
    surgeon.apply(model, "uniform", drop_rate=0.4, skip=True, example=torch.zeros(2, 4, dtype=dtype))
    joined, sides, x = [], [], torch.randn(8, 4, dtype=dtype)
    original = rowops.Join.forward

    def count(*args: object) -> object:
        joined.append(1)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(rowops.Join, "forward", staticmethod(count))
    for small in (0, rowops.SMALL):
        for room in (rowops, lifted):
            monkeypatch.setattr(room, "SMALL", small)
        net = copy.deepcopy(model)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        out = net(leaf)
        out.square().sum().backward()
        sides.append((out, leaf.grad, grads(net), len(joined)))
    (out, grad, own, functions), (other, others_grad, others, all_functions) = sides
    assert same(out, other)
    assert same(grad, others_grad)
    assert own.keys() == others.keys()
    assert all(a is b is None or same(a, b) for a, b in zip(own.values(), others.values(), strict=True))
    assert functions == all_functions > 0  # only the first went by functions


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_graph_takes_and_spreads_rows_as_indexing_does(kept: int) -> None:
    order = torch.randperm(5)
    rows, places = order[:kept], order.argsort()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    part = torch.randn(kept, 2, 3, dtype=torch.float64, requires_grad=True)
    assert same(rowops.Taken.apply(x, rows, places), x[rows])
    assert same(rowops.Spread.apply(part, rows, places), torch.zeros_like(x).index_add(0, rows, part))
    assert torch.autograd.gradcheck(lambda t: rowops.Taken.apply(t, rows, places), x)
    assert torch.autograd.gradcheck(lambda t: rowops.Spread.apply(t, rows, places), part)
