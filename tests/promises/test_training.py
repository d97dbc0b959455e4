"""Gates in the usual surroundings of a training loop: each of these has changed what a step does, once."""

import copy
from typing import Any

import pytest
import torch
from blocks import BasicBlock, Plain, grads, randomise, same
from torch import Tensor, nn

import surgeon
from surgeon._gating.gate import Gate
from surgeon._gating.gated import gates_of

X = torch.zeros(2, 4)
FORMS = [{"unit": "batch"}, {"skip": True}, {"skip": False}]
forms = pytest.mark.parametrize("options", FORMS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))


def gated(rate: float = 0.5, blocks: int = 4, **options: Any) -> nn.Module:
    model = randomise(nn.Sequential(*(Plain() for _ in range(blocks)))).double()
    return surgeon.apply(model, "uniform", drop_rate=rate, example=X.double(), **options)


def data(rows: int = 6) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@forms
def test_accumulated_gradients_are_the_sum_of_the_micro_batches(options: dict[str, Any]) -> None:
    """Two backwards in one step, both forwards before either; against one graph under the same draws."""
    model, x = gated(unused="zero", **options), data()
    torch.manual_seed(1)
    losses = [model(part).square().sum() for part in x.chunk(2)]
    for loss in losses:
        loss.backward()
    apart = grads(model)
    model.zero_grad()
    torch.manual_seed(1)
    sum(model(part).square().sum() for part in x.chunk(2)).backward()
    torch.testing.assert_close(apart, grads(model), rtol=1e-12, atol=1e-12)
    model.zero_grad()
    torch.manual_seed(2)
    sum(model(part).square().sum() for part in x.chunk(2)).backward()
    assert not same(apart, grads(model))  # the draws matter, so the equality says something


@forms
@pytest.mark.parametrize("unused", ["zero", "none"])
def test_clipping_sees_what_ran(options: dict[str, Any], unused: str) -> None:
    """The norm is that of the gradients there are; a branch that did not run adds nothing to it."""
    model = gated(0.9, unused=unused, **options)
    for seed in range(4):
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        model(data().requires_grad_()).square().sum().backward()
        there = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        torch.testing.assert_close(norm.item(), sum(float(g.square().sum()) for g in there) ** 0.5)
        clipped = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
        assert clipped == pytest.approx(min(0.5, norm.item()), rel=1e-4)


@forms
def test_a_gradient_scaler_steps_and_skips_infinite_steps(options: dict[str, Any]) -> None:
    """Scaled and unscaled gradients agree; an overflow is found although some branches have no gradient."""
    model = gated(0.6, **options).float()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    sides = []
    for net, scaled in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = net(data().float().requires_grad_()).square().mean()
            (scaler.scale(loss) if scaled else loss).backward()
            (scaler.step(optimizer), scaler.update()) if scaled else optimizer.step()
        sides.append(list(net.parameters()))
    torch.testing.assert_close(*sides)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    first = gates_of(model)[0]
    with pytest.MonkeyPatch.context() as patch:  # the first branch runs, so that there is a gradient
        patch.setattr(Gate, "survives", lambda gate: gate is first)
        patch.setattr(Gate, "survivors", lambda gate, count: count if gate is first else 0)
        optimizer.zero_grad()
        scaler.scale(model(data().float()).square().sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(before, [p.detach() for p in model.parameters()])
    assert scaler.get_scale() < 64


@forms
def test_functional_call_runs_the_given_weights(options: dict[str, Any]) -> None:
    """Training and evaluating; gradients reach the weights that were given, and not the model's own."""
    model = gated(**options)
    given = {n: (p * 2).detach().requires_grad_() for n, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict({n: p.detach() for n, p in given.items()})
    for training in (True, False):
        model.train(training), twin.train(training)
        torch.manual_seed(5)
        out = torch.func.functional_call(model, given, (data(),))
        torch.manual_seed(5)
        torch.testing.assert_close(out, twin(data()), rtol=1e-12, atol=1e-12)
    out.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in given.values())


@forms
def test_gradients_per_sample_by_a_loop_add_up(options: dict[str, Any]) -> None:
    """Batches of one: each sample through its own draws. The mean over many is that of evaluation."""
    model = surgeon.apply(
        nn.Sequential(Linear(), Linear()).double(),
        "uniform",
        drop_rate=0.4,
        unused="zero",
        example=X.double(),
        **options,
    )
    x, found = data(1), []
    for _ in range(600):
        model.zero_grad()
        model(x).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.eval().zero_grad()
    model(x).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    outs = torch.stack(found)
    error = outs.std(0) / len(outs) ** 0.5
    assert bool(((outs.mean(0) - expected).abs() <= 6 * error + 1e-12).all())
    assert bool(((outs.mean(0) - 1.3 * expected).abs() > 6 * error).any())  # negative control


class Linear(nn.Module):
    """A branch that is linear in its input and its weights, so that one gate's mean is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(x) + (x.abs() - x.relu() - (-x).relu()))


@forms
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_an_evaluating_gated_model_exports(options: dict[str, Any], scaling: str) -> None:
    """torch.export: one graph without a random number in it, and with the numbers of the model."""
    model = gated(scaling=scaling, **options).eval()
    program = torch.export.export(model, (data(),))
    assert not any(
        "rand" in str(node.target) or "bernoulli" in str(node.target) for node in program.graph.nodes
    )
    torch.testing.assert_close(program.module()(data()), model(data()), rtol=1e-12, atol=1e-12)


@forms
def test_channels_last_stays_channels_last_through_a_step(options: dict[str, Any]) -> None:
    """Values, gradients and the layout of every output, against the same draws on plain memory."""
    sides = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = randomise(nn.Sequential(*(BasicBlock() for _ in range(3)))).double()
        surgeon.apply(
            model,
            "uniform",
            drop_rate=0.5,
            unused="zero",
            example=torch.zeros(2, 4, 6, 6).double(),
            **options,
        )
        model = model.to(memory_format=layout)
        x = torch.randn(4, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = x.to(memory_format=layout).requires_grad_()
        torch.manual_seed(3)
        out = model(x)
        assert out.is_contiguous(memory_format=layout)
        out.square().sum().backward()
        assert x.grad is not None
        sides.append((out.detach().contiguous(), x.grad.contiguous(), grads(model)))
    torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-9)


@forms
def test_a_batch_of_one_and_rates_next_to_one(options: dict[str, Any]) -> None:
    model = gated(1 - 2**-30, **options)
    with pytest.MonkeyPatch.context() as patch:
        for kept in (False, True):
            patch.setattr(Gate, "survives", lambda _, kept=kept: kept)
            patch.setattr(Gate, "survivors", lambda _, count, kept=kept: count if kept else 0)
            for rows in (1, 3):
                x = data(rows).requires_grad_()
                out = model(x)
                out.sum().backward()
                assert bool(out.isfinite().all() and x.grad.isfinite().all())
                if not kept and options != {"skip": False}:
                    assert same(out.detach(), x.detach())
