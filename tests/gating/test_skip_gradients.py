"""Batch norm on the rows that survive, and what a branch that did not run gives its parameters."""

from typing import Any

import pytest
import torch
from blocks import BasicBlock, Plain, coins, drawn, randomise, same, skipping
from torch import Tensor, nn

import surgeon
from surgeon._gating.gate import Gate
from surgeon._gating.gated import gates_of

# --- batch norm ---------------------------------------------------------------


def test_batch_norm_never_sees_a_single_row_of_many() -> None:
    block = skipping(BasicBlock(), 0.75, example=torch.zeros(2, 4, 6, 6))
    (g,) = gates_of(block)
    assert g.branch.statistics
    seen: list[int] = []
    block.bn1.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    for _ in range(200):
        block(torch.randn(4, 4, 1, 1))  # one value per channel and row: a single row would raise
    assert set(seen) == {2}
    block.bn1.eval(), block.bn2.eval()


def test_statistics_are_those_of_the_survivors() -> None:
    block = skipping(BasicBlock(), 0.5, example=torch.zeros(2, 4, 6, 6))
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
        model = skipping(Plain(), unit=unit, unused=unused)
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


@pytest.mark.parametrize("unit", ["sample", "batch"])
@pytest.mark.parametrize("unused", ["zero", "none"])
def test_a_step_in_which_everything_trainable_is_dropped(unused: str, unit: str) -> None:
    """Nothing but branches is trainable: the backward runs, as it does when one of them is kept."""
    model = nn.Sequential(nn.Linear(4, 4), Plain(), Plain(), nn.Linear(4, 4)).requires_grad_(False)
    model[1:3].requires_grad_(True)
    skipping(model, unit=unit, unused=unused)
    for kept in (False, True):
        with coins(kept):
            model(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is not None for p in model[1:3].parameters())
    model.zero_grad()
    with coins(False):
        model(torch.randn(3, 4)).sum().backward()
    expected = torch.zeros_like if unused == "zero" else lambda _: None
    for p in model.parameters():
        assert same(p.grad, expected(p) if p.requires_grad else None)
    with coins(False), torch.no_grad():
        assert not model(torch.randn(3, 4)).requires_grad


def test_frozen_and_shared_tensors_among_the_unused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.gain = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            gain = self.gain * 2
            x = x + self.f(x) * gain
            return x + self.f(x).tanh() * gain

    model = skipping(Shared(), unit="batch", unused="zero")
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
        model = skipping(randomise(Plain()), unit="batch", unused=unused)
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
