"""Gated models through deepcopy, pickle, torch.save in a fresh process, state_dict and EMA copies."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import BasicBlock, Net, Plain, Twice, case, coins, randomise, same
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import surgeon
from surgeon._gating.gated import gates_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
FORMS = [(unit, scaling) for unit in ("batch", "sample") for scaling in ("inverted", "paper")]


class Chain(nn.Sequential):
    """A stem, so that there is something to train when every branch is dropped, and two blocks."""

    def __init__(self) -> None:
        super().__init__(Plain(), nn.Linear(4, 4), Twice())


def gated(unit: str = "sample", scaling: str = "inverted", schedule: Any = "linear") -> nn.Module:
    model = randomise(Chain())
    return surgeon.apply(model, schedule, unit=unit, scaling=scaling, example=X)


def draws(model: nn.Module, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return [model(X) for _ in range(6)]


def alike(a: nn.Module, b: nn.Module) -> None:
    """The same gates, the same evaluation, the same draws under the same seed."""
    a.train(), b.train()
    assert surgeon.status(a) == surgeon.status(b)
    assert same(draws(a), draws(b))
    assert len({tuple(t.flatten().tolist()) for t in draws(b)}) > 1
    assert same(a.eval()(X), b.eval()(X))
    a.train(), b.train()


@pytest.mark.parametrize(("unit", "scaling"), FORMS)
def test_a_deepcopy_has_gates_of_its_own(unit: str, scaling: str) -> None:
    model = gated(unit, scaling)
    twin = copy.deepcopy(model)
    alike(model, twin)
    assert not {id(g) for g in gates_of(model)} & {id(g) for g in gates_of(twin)}
    before = surgeon.status(model)
    surgeon.set_drop_rate(twin, 0.1)
    assert surgeon.status(model) == before
    surgeon.remove(twin)
    assert surgeon.status(model) == before
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert copied(X).isfinite().all()
    assert any(bool(p.any()) for p in copied.parameters())


def test_a_deepcopy_of_a_part_is_gated_too() -> None:
    model = gated()
    part = copy.deepcopy(model[2])
    assert len(surgeon.status(part).gates) == 2
    assert type(surgeon.remove(part)) is Twice


@pytest.mark.parametrize(("unit", "scaling"), FORMS)
def test_pickle_keeps_everything(unit: str, scaling: str) -> None:
    model = gated(unit, scaling)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        twin = pickle.loads(pickle.dumps(model, protocol))  # noqa: S301
        alike(model, twin)
        assert isinstance(twin[0], Plain)
        surgeon.set_drop_rate(twin, 0.1)
        assert type(surgeon.remove(twin)[0]) is Plain


def test_pickle_at_every_stage() -> None:
    """Before a step, after it, after a call of a new shape, after remove."""
    model = gated("batch", "paper")
    for change in (lambda: None, lambda: model(X), lambda: model.eval()(torch.randn(5, 4)), model.train):
        change()
        alike(model, pickle.loads(pickle.dumps(model)))  # noqa: S301
    plain = pickle.loads(pickle.dumps(surgeon.remove(model)))  # noqa: S301
    assert type(plain[0]) is Plain


def halved(l: int, count: int) -> float:
    return l / count / 2


@pytest.mark.parametrize(
    "schedule", [[0.1, 0.2], halved, lambda l, count: 0.2], ids=["list", "function", "lambda"]
)
def test_any_schedule_pickles(schedule: Any) -> None:
    model = gated(schedule=schedule)
    alike(model, pickle.loads(pickle.dumps(model)))  # noqa: S301
    alike(model, copy.deepcopy(model))


FRESH = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
model = torch.load({file!r}, weights_only=False)
import surgeon
assert model.training
x = torch.load({inputs!r})
torch.manual_seed(5)
outs = [model(x).detach() for _ in range(6)]
status = str(surgeon.status(model))
evaluated = model.eval()(x).detach()
torch.manual_seed(6)
loss = model.train()(x).square().mean()
loss.backward()
grads = {{n: p.grad for n, p in model.named_parameters()}}
state = surgeon.remove(model).state_dict()
torch.save((outs, status, evaluated, grads, state, [type(m).__name__ for m in model.modules()]), {out!r})
"""


@pytest.mark.parametrize(("unit", "scaling"), [("batch", "paper"), ("sample", "inverted")])
def test_a_saved_model_goes_on_in_a_fresh_process(unit: str, scaling: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BasicBlock(), nn.Flatten(2), nn.Linear(16, 4), Twice())
    x = torch.randn(2, 3, 4, 4)
    surgeon.apply(randomise(model), "uniform", unit=unit, scaling=scaling, example=x)
    file, inputs, out = (str(tmp_path / n) for n in ("model.pt", "x.pt", "out.pt"))
    torch.save(model, file)
    torch.save(x, inputs)
    here = Path(__file__).resolve().parents[1]
    code = FRESH.format(paths=[str(here), str(here.parent)], file=file, inputs=inputs, out=out)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    outs, status, evaluated, grads, state, kinds = torch.load(out)
    torch.manual_seed(5)
    assert same([model(x).detach() for _ in range(6)], outs)
    assert str(surgeon.status(model)) == status
    assert same(model.eval()(x).detach(), evaluated)
    torch.manual_seed(6)
    model.train()(x).square().mean().backward()
    assert same({n: p.grad for n, p in model.named_parameters()}, grads)
    assert same(dict(surgeon.remove(model).state_dict()), dict(state))
    assert [type(m).__name__ for m in model.modules()] == kinds


def test_torch_save_within_a_process() -> None:
    model, file = gated("batch", "paper"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    alike(model, torch.load(file, weights_only=False))


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:resnet18"])
def test_state_dicts_go_both_ways_with_a_stock_model(name: str) -> None:
    c = case(name)
    stock, model = randomise(c.build(), 1).eval(), randomise(c.build(), 2).eval()
    surgeon.apply(model, example=c.input())
    assert list(model.state_dict()) == list(stock.state_dict())
    assert not same(model(c.input()), stock(c.input()))
    model.load_state_dict(stock.state_dict(), strict=True)
    assert same(model(c.input()), stock(c.input()))
    other = randomise(c.build(), 3).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert same(other(c.input()), stock(c.input()))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=True)


def test_weights_assigned_into_a_gated_model_are_the_ones_used() -> None:
    model, stock = gated(), randomise(Chain(), 9)
    given = stock.state_dict()
    model.load_state_dict(given, assign=True)
    assert same(model.eval()(X), stock.eval()(X))
    with coins(True):
        surgeon.set_drop_rate(model, 0.0)
        assert same(model.train()(X), stock.train()(X))


def test_resume_from_state_and_random_state_goes_on_bit_for_bit() -> None:
    x = torch.randn(6, 4)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    model = gated("batch")
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(1)
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.random.get_rng_state()
    ahead = train(model, optimizer, 5)
    again = gated("batch")
    resumed = torch.optim.AdamW(again.parameters())
    again.load_state_dict(saved[0][0])
    resumed.load_state_dict(saved[0][1])
    torch.random.set_rng_state(saved[1])
    assert train(again, resumed, 5) == ahead


def test_an_ema_copy_is_gated_and_evaluates() -> None:
    model = gated(scaling="paper")
    ema = ModelEmaV3(model, decay=0.5)
    before = surgeon.status(model)
    assert surgeon.status(ema.module) == before
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(X).square().sum().backward()
    optimizer.step()
    ema.update(model)
    for n, p in ema.module.named_parameters():
        torch.testing.assert_close(p, (start[n] + dict(model.named_parameters())[n]) / 2)
    assert not ema.module.training
    reference = randomise(Chain())
    reference.load_state_dict(ema.module.state_dict())
    surgeon.apply(reference, scaling="paper", example=X)
    assert same(ema(X), reference.eval()(X))
    assert surgeon.remove(ema.module)
    assert surgeon.status(model) == before


def test_averaged_models_work_after_apply() -> None:
    model = gated(scaling="paper")
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert same(average.eval()(X), model.eval()(X))


def test_gates_take_no_part_in_moving_a_model() -> None:
    model = gated(scaling="paper")
    before = surgeon.status(model)
    for moved in (
        model.double(),
        model.to("meta"),
        model.to_empty(device="cpu").float(),
        model.share_memory(),
    ):
        assert surgeon.status(moved) == before
    surgeon.set_drop_rate(model, 0.3)
    assert model(X).shape == X.shape


def test_the_recorded_example_keeps_no_tensor_alive() -> None:
    """A gate remembers shapes, not the user's batch."""
    import gc
    import weakref

    x = torch.randn(3, 4)
    alive = weakref.ref(x)
    model = surgeon.apply(Net(Plain()), unit="batch", scaling="paper", example=x)
    del x
    gc.collect()
    assert alive() is None
    assert len(pickle.dumps(model)) < 20_000
