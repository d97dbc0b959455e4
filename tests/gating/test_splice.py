"""Gated forwards against hand-written ones, hazard by hazard.

Each hazard is a block with its own forward and the same block written by hand with a gate: ``g`` multiplies
the branch, and with ``g = 0`` the branch is not computed. Both must agree in training with every coin, in
both units and scalings, outputs and gradients, and in evaluation.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import BasicBlock, Branch, Net, Plain, Twice, X, coins, grads, randomise, same, step
from hazards import HAZARDS, G, ReluAfterInPlaceAdd, fresh
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgeon


def pair(hazard: type[Any]) -> tuple[nn.Module, nn.Module]:
    """The same network twice, with the same weights."""
    return tuple(randomise(Net(hazard())) for _ in range(2))  # type: ignore[return-value]


def with_zeros(given: dict[str, Tensor | None], like: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if given[n] is None else given[n] for n, p in like.named_parameters()}


def by_hand(model: Net, g: G) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        out = model.block.by_hand(model.stem(x), g)
        return model.head(out) if isinstance(out, Tensor) else out

    return run


def hand_gate(factor: float | None) -> G:
    def g(branch: Callable[[], Tensor]) -> Tensor | None:
        if factor is None:
            return None
        return branch() if factor == 1 else branch() * factor

    return g


@pytest.mark.parametrize("scaling", ["inverted", "paper"])
@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda h: h.__name__)
def test_hazards_against_their_hand_written_gates(hazard: type[Any], unit: str, scaling: str) -> None:
    gated, plain = pair(hazard)
    surgeon.apply(gated, drop_rate=0.25, unit=unit, scaling=scaling, example=X)
    (status,) = surgeon.status(gated).gates
    assert status.skips == (hazard.skips and unit == "batch")
    assert bool(status.note) == (unit == "batch" and not hazard.skips)
    for kept in (True, False):
        factor = (1 / 0.75 if scaling == "inverted" else 1) if kept else None
        with coins(kept) as tossed:
            out, dx, dw = step(gated, gated, X)
        assert tossed == [status.name]
        ref, ref_dx, ref_dw = step(plain, by_hand(plain, hand_gate(factor)), X)
        if unit == "sample" or not hazard.skips:  # computed and multiplied by zero: zero gradients, not none
            ref_dw, dw = with_zeros(ref_dw, plain), with_zeros(dw, gated)
        if unit == "batch" and scaling == "inverted":  # multiplied and added by one operator, rounded once
            torch.testing.assert_close(out, ref)
        else:
            assert same(out, ref)
        torch.testing.assert_close(dx, ref_dx)
        assert {n for n, d in dw.items() if d is None} == {n for n, d in ref_dw.items() if d is None}
        for n, d in dw.items():
            if d is not None:
                torch.testing.assert_close(d, ref_dw[n], msg=n)
    scale = 0.75 if scaling == "paper" else 1
    gated.eval(), plain.eval()
    with torch.no_grad():
        assert same(gated(X.clone()), by_hand(plain, hand_gate(scale))(X.clone()))


def test_the_hazard_test_can_fail() -> None:
    """Negative control: a hand-written gate with another factor does not agree."""
    gated, plain = pair(ReluAfterInPlaceAdd)
    surgeon.apply(gated, drop_rate=0.25, unit="batch", example=X)
    with coins(True):
        out = step(gated, gated, X)[0]
    assert not same(out, step(plain, by_hand(plain, hand_gate(1)), X)[0])


# --- the same with convolutions, norms and a ReLU after the add ---------------


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_a_dropped_block_of_the_paper_is_its_shortcut_after_the_relu(project: bool, scaling: str) -> None:
    class Block(BasicBlock):
        def by_hand(self, x: Tensor, g: G) -> Tensor:
            shortcut = x if self.downsample is None else self.downsample(x)
            branch = g(lambda: self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
            return fresh(shortcut, branch).relu_()

    x = torch.randn(4, 4, 6, 6)
    gated, plain = randomise(Block(project=project)), randomise(Block(project=project))
    surgeon.apply(gated, unit="batch", scaling=scaling, example=x)
    entered: list[str] = []
    for name in ("conv1", "bn1", "conv2", "bn2"):
        getattr(gated, name).register_forward_hook(lambda *_, name=name: entered.append(name))
    for kept in (True, False):
        factor = (2.0 if scaling == "inverted" else 1) if kept else None
        with coins(kept):
            out, dx, dw = step(gated, gated, x)
        ref, ref_dx, ref_dw = step(plain, lambda x, f=factor: plain.by_hand(x, hand_gate(f)), x)
        assert same(out, ref)
        assert float(out.detach().min()) >= 0  # the ReLU after the add ran
        assert same(dx, ref_dx)
        assert dw.keys() == ref_dw.keys()
        assert all(same(d, ref_dw[n]) for n, d in dw.items())
        assert (dw["conv1.weight"] is None) == (not kept)
        assert same(dict(gated.named_buffers()), dict(plain.named_buffers()))
        assert int(gated.bn1.num_batches_tracked) == 1  # moved by the kept step only
        assert entered == (["conv1", "bn1", "conv2", "bn2"] if kept else [])
        entered.clear()


# --- results that must not be aliases -----------------------------------------


def test_a_caller_that_writes_to_its_input_later_gets_the_right_sum() -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        x = x * 1
        y = block(x)
        x.zero_()
        return y * x.cos()

    model = surgeon.apply(Net(Plain(), call), unit="batch", example=X)
    with coins(False), torch.no_grad():
        assert same(model(X), model.head(model.stem(X)))


def test_the_user_may_write_to_what_the_model_returns() -> None:
    model = surgeon.apply(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Plain()), unit="batch", example=X)
    with coins(False):
        out = model(X)
        out.mul_(2)
        out.sum().backward()


def test_a_model_that_is_one_block_does_not_return_its_input() -> None:
    model = surgeon.apply(Plain(), unit="batch", example=X)
    x = X.clone()
    with coins(False):
        model(x).zero_()
    assert torch.equal(x, X)


def test_an_add_into_the_shortcut_stays_an_add_into_the_shortcut() -> None:
    class Block(Branch):
        def forward(self, x: Tensor) -> Tensor:
            y = x.add_(self.f(x * 2))
            y.relu_()
            return x

    model, plain = (randomise(Net(Block())) for _ in range(2))
    surgeon.apply(model, unit="batch", scaling="paper", example=X)
    with coins(False):
        assert same(model(X), plain.head(plain.stem(X).relu()))
    with coins(True):
        assert same(model(X), plain(X))


def test_in_place_adds_keep_the_dtype_under_autocast() -> None:
    class Block(Branch):
        def forward(self, x: Tensor) -> Tensor:
            out = self.f(x)
            out += x
            return out

    block = Block()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = block(X)
        assert expected.dtype == torch.bfloat16
        for unit, kept in itertools.product(("sample", "batch"), (True, False)):
            surgeon.apply(block, unit=unit, scaling="paper", example=X)
            with coins(kept):
                out = block(X)
            surgeon.remove(block)
            if kept:
                assert same(out, expected)
            elif unit == "sample":
                assert out.dtype == torch.bfloat16


# --- several gates, several calls ---------------------------------------------


def test_gates_of_one_block_have_coins_of_their_own() -> None:
    block = randomise(Twice())
    surgeon.apply(block, unit="batch", scaling="paper", example=X)
    f, g = (lambda x: x + block.f(x)), (lambda x: x + block.g(x))
    for first, second in itertools.product((True, False), repeat=2):
        with coins({"add": first, "add_1": second}) as tossed:
            expected = f(X) if first else X
            expected = g(expected) if second else expected
            assert same(block(X), expected)
        assert tossed == ["add", "add_1"]


def test_a_block_called_twice_tosses_twice() -> None:
    model = randomise(Net(Plain(), lambda b, x: b(torch.tanh(b(x)))))
    surgeon.apply(model, unit="batch", scaling="paper", example=X)
    assert len(surgeon.status(model).gates) == 1
    fates = iter([True, False])
    with coins(lambda _: next(fates)):
        out = model(X)
    x = model.stem(X)
    assert same(out, model.head(torch.tanh(x + model.block.f(x))))


def test_a_model_called_twice_before_backward() -> None:
    gated, plain = pair(ReluAfterInPlaceAdd)
    surgeon.apply(gated, unit="batch", scaling="paper", example=X)
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    fates = iter([True, False])
    with coins(lambda _: next(fates)):
        (gated(a).sum() + gated(b).sum()).backward()
    on, off = by_hand(plain, hand_gate(1)), by_hand(plain, hand_gate(None))
    (on(a).sum() + off(b).sum()).backward()
    for name, grad in grads(gated).items():
        torch.testing.assert_close(grad, grads(plain)[name], msg=name)


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_draws(reentrant: bool, unit: str) -> None:
    blocks = nn.Sequential(*(Plain() for _ in range(6)))
    surgeon.apply(blocks, "uniform", unit=unit, example=X)

    def run(around: Callable[[nn.Module, Tensor], Tensor], seed: int) -> Any:
        blocks.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        x = X.clone().requires_grad_()
        y = x
        for block in blocks:
            y = around(block, y)
        y.square().sum().backward()
        return y.detach(), x.grad, grads(blocks)

    patterns = set()
    for seed in range(8):
        plain = run(lambda block, x: block(x), seed)
        assert same(run(lambda block, x: checkpoint(block, x, use_reentrant=reentrant), seed), plain)
        patterns.add(tuple(g is None or not g.any() for g in plain[2].values()))
    assert len(patterns) > 1  # the draws do differ


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_other_batch_sizes_and_resolutions(unit: str) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            tokens = x.flatten(2).transpose(1, 2).reshape(b, h * w, c)
            y = torch.tanh(self.proj(tokens)).transpose(1, 2).reshape(b, c, h, w)
            return x + y

    example = torch.zeros(2, 4, 8, 8)
    gated, plain = nn.Sequential(BasicBlock(), Tokens()), nn.Sequential(BasicBlock(), Tokens())
    randomise(gated), randomise(plain)
    surgeon.apply(gated, unit=unit, scaling="paper", example=example)
    for rows, height, width in ((2, 8, 8), (1, 8, 8), (5, 8, 8), (3, 4, 6), (2, 9, 7)):
        x = torch.randn(rows, 4, height, width)
        with coins(True):
            assert same(gated(x), plain(x))
        with coins(False):
            torch.testing.assert_close(gated(x), x.relu(), rtol=0, atol=0)


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_autocast_changes_nothing_but_the_gate(unit: str) -> None:
    x = torch.randn(2, 4, 6, 6)
    gated, plain = (
        randomise(nn.Sequential(nn.Conv2d(4, 4, 1), BasicBlock(), BasicBlock(project=True))) for _ in range(2)
    )
    surgeon.apply(gated, unit=unit, scaling="paper", drop_rate=0.0, example=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = step(gated, gated, x), step(plain, plain, x)
    assert a[0].dtype == b[0].dtype == torch.bfloat16
    assert same(a, b)


def test_channels_last_is_kept() -> None:
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    model = nn.Sequential(BasicBlock(), BasicBlock()).to(memory_format=torch.channels_last)
    for unit in ("batch", "sample"):
        surgeon.apply(model, unit=unit, example=x)
        for kept in (True, False):
            with coins(kept):
                assert model(x).is_contiguous(memory_format=torch.channels_last)
        surgeon.remove(model)


class Experts(nn.Module):
    """Gives a loss of its own besides."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.runs = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.runs += 1
        y = torch.tanh(self.f(x))
        return y, y.square().mean((1,))


class Mixture(nn.Module):
    def __init__(self, *, hands_on: bool) -> None:
        super().__init__()
        self.experts, self.norm, self.hands_on = Experts(), nn.LayerNorm(4), hands_on

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, loss = self.experts(x)
        return x + self.norm(y), loss if self.hands_on else x


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("hands_on", [False, True])
def test_layers_whose_results_are_used_elsewhere_too_are_not_said_to_be_skipped(
    unit: str, hands_on: bool
) -> None:
    model = surgeon.apply(
        Mixture(hands_on=hands_on), "uniform", unit=unit, skip=True, example=torch.zeros(2, 4)
    )
    (gate,) = surgeon.status(model).gates
    assert gate.skips == (not hands_on)
    assert ("layers of the branch give is also used elsewhere" in gate.note) == hands_on
    model.experts.runs, x = 0, torch.randn(3, 4)
    with coins(False):
        out, _ = model(x)
    assert same(out, x)
    assert model.experts.runs == hands_on
