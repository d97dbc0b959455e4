"""Skipping by rows: what is computed, against blocks written by hand and published models."""

from typing import Any

import pytest
import timm
import torch
from blocks import BasicBlock, Branch, Linear, Plain, drawn, grads, randomise, same, skipping
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgeon
from surgeon._gating.gate import Gate

X = torch.zeros(2, 4)


# --- what is computed ---------------------------------------------------------


class Project(Branch):
    """A branch beside a projection, that reads another tensor than the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.f(x)


class IntoShortcut(Branch):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x += self.f(x * 1)
        return x.relu_()


class IntoBranch(Branch):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x
        return out.relu_()


class Sizes(Branch):
    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape
        return x + self.f(x.reshape(n * 2, c // 2).reshape(n, c))


class InPlaceHead(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x.mul(1).relu_())


def by_hand(block: nn.Module, x: Tensor, rows: list[int], factor: float) -> Tensor:
    """The same block, its branch run on every row and masked by hand."""
    mask = torch.zeros(len(x), 1, dtype=x.dtype)
    mask[rows] = factor
    if isinstance(block, InPlaceHead):
        return x + block.f(x.relu()) * mask
    out = (block.down(x) if isinstance(block, Project) else x) + block.f(x) * mask
    return out.relu() if isinstance(block, (IntoShortcut, IntoBranch)) else out


BLOCKS = [Plain, Project, IntoShortcut, IntoBranch, Sizes, InPlaceHead]


@pytest.mark.parametrize("rows", [[], [0], [1, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_outputs_and_gradients_are_those_written_by_hand(block: Any, scaling: str, rows: list[int]) -> None:
    plain, model = randomise(block()).double(), randomise(block()).double()
    skipping(model, 0.25, scaling=scaling, unused="zero", example=X.double())
    (state,) = surgeon.status(model).gates
    assert (state.skips, state.note) == (True, "")
    sides = []
    for net, run in (
        (plain, lambda x: by_hand(plain, x, rows, 1 / 0.75 if scaling == "inverted" else 1.0)),
        (model, model),
    ):
        x = torch.randn(
            4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        patched = drawn([rows])
        out = run(x)
        patched.undo()
        (out * torch.linspace(1, 2, 16).view_as(out)).sum().backward()
        sides.append((out.detach(), x.grad, grads(net)))
    torch.testing.assert_close(*sides, rtol=1e-12, atol=1e-12)
    if 0 < len(rows) < 4 and block is Plain:
        lost = [i for i in range(4) if i not in rows]
        assert same(
            sides[1][0][lost],
            torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[lost],
        )


def test_dropped_rows_are_computed_neither_forward_nor_backward() -> None:
    model, seen = skipping(Plain(), 0.5), []
    model.f.register_forward_hook(lambda _, args, out: seen.append(("forward", len(args[0]))))
    model.f.register_full_backward_hook(lambda _, before, after: seen.append(("backward", len(after[0]))))
    patched = drawn([[1, 2], [], [0]])
    for _ in range(3):
        model(torch.randn(4, 4, requires_grad=True)).sum().backward()
    patched.undo()
    assert seen == [("forward", 2), ("backward", 2), ("forward", 1), ("backward", 1)]


def test_a_second_derivative_exists() -> None:
    model = skipping(randomise(nn.Sequential(Linear(), nn.Tanh(), Linear())).double(), example=X.double())
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = model(x)
        return out

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_rows(reentrant: bool) -> None:
    model = skipping(randomise(nn.Sequential(*(Plain() for _ in range(6)))))
    x = torch.randn(5, 4, requires_grad=True)
    sides = []
    for replay in (False, True):
        model.zero_grad()
        torch.manual_seed(4)
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant) if replay else block(y)
        y.square().sum().backward()
        sides.append((y, grads(model), torch.random.get_rng_state()))
    assert same(*sides)


def test_the_same_seed_gives_the_same_step() -> None:
    model, x = skipping(nn.Sequential(*(Plain() for _ in range(4)))), torch.randn(6, 4)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert same(outs[0], outs[1])
    assert not same(outs[0], outs[2])


def test_autocast() -> None:
    for block in (Plain(), IntoBranch(), Project()):
        model, x = skipping(block), torch.randn(6, 4)
        for seed in range(6):
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(x).float().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(layout: torch.memory_format) -> None:
    model = skipping(BasicBlock(), example=torch.zeros(2, 4, 6, 6)).to(memory_format=layout)
    seen: list[Tensor] = []
    model.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    patched = drawn([[0, 2]])
    out = model(torch.randn(4, 4, 6, 6).to(memory_format=layout))
    patched.undo()
    assert seen[0].shape[0] == 2
    assert all(t.is_contiguous(memory_format=layout) for t in (out, *seen))


# --- published models ---------------------------------------------------------

REAL = {
    "resnet18": 64,
    "vit_tiny_patch16_224": 224,
    "convnext_atto": 64,
    "swin_tiny_patch4_window7_224": 224,
    "beit_base_patch16_224": 224,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n[:4] in ("swin", "beit") else []) for n in REAL],
)
def test_published_models_train_on_some_rows(name: str) -> None:
    """All gates skip, gradients are finite everywhere, and all rows give the plain model's numbers."""
    size = REAL[name]
    x = torch.randn(3, 3, size, size)
    model = randomise(timm.create_model(name, num_classes=3))
    plain = randomise(timm.create_model(name, num_classes=3, drop_path_rate=0.0))  # Swin has 0.1 of its own
    skipping(model, 0.4, example=x[:2], scaling="paper", unused="zero")
    status = surgeon.status(model)
    assert all(g.skips for g in status.gates), [g.note for g in status.gates]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gate, "survivors", lambda _, count: count)
        assert same(model(x), plain(x))
    model(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_some_rows_of_a_vit_are_what_masking_gives() -> None:
    """Every block runs on rows 0 and 2 of three; a masked model with the same rows agrees."""
    x, sides = torch.randn(3, 3, 64, 64), []
    for skip in (True, False):
        model = randomise(
            timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=3)
        ).double()
        skipping(model, 0.4, skip=skip, example=x[:2].double())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gate, "survivors", lambda *_: 2)
            patch.setattr(Gate, "rows", lambda *_: torch.tensor([0, 2]))
            patch.setattr(Gate, "mask", lambda g, b: torch.tensor([1.0, 0, 1]).double().view(3, 1, 1) / 0.6)
            out = model(x.double())
        out.square().sum().backward()
        sides.append((out.detach(), grads(model)))
    torch.testing.assert_close(*sides)
