"""Evaluation under the paper's scaling against forwards by hand; models of every dtype and device."""

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from blocks import Net, Plain, Twice, case, coins, randomise, same
from torch import Tensor, nn

import surgeon

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


# --- evaluation under the paper's scaling, by hand ----------------------------


def resnet_block(self: Any, x: Tensor, s: float) -> Tensor:
    shortcut = x if self.downsample is None else self.downsample(x)
    out = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
    return F.relu(shortcut + self.bn2(self.conv2(out)) * s)


def vit_block(self: Any, x: Tensor, s: float) -> Tensor:
    x = x + self.ls1(self.attn(self.norm1(x))) * s
    return x + self.ls2(self.mlp(self.norm2(x))) * s


def convnext_block(self: Any, x: Tensor, s: float) -> Tensor:
    out = self.conv_dw(x)
    if self.use_conv_mlp:
        out = self.mlp(self.norm(out))
    else:
        out = self.mlp(self.norm(out.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    if self.gamma is not None:
        out = out * self.gamma.reshape(1, -1, 1, 1)
    return self.shortcut(x) + out * s


def tv_block(self: Any, x: Tensor, s: float) -> Tensor:
    out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu((x if self.downsample is None else self.downsample(x)) + out * s)


BY_HAND = {
    "timm:resnet18": ("BasicBlock", resnet_block),
    "timm:vit_tiny_patch16_224": ("Block", vit_block),
    "timm:convnext_atto": ("ConvNeXtBlock", convnext_block),
    "torchvision:resnet18": ("BasicBlock", tv_block),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_paper_evaluation_is_the_forward_written_by_hand(name: str) -> None:
    c, (kind, forward) = case(name), BY_HAND[name]
    gated, plain = randomise(c.build()).eval(), randomise(c.build()).eval()
    surgeon.apply(gated, scaling="paper", drop_rate=0.5, example=c.input())
    scales = {g.block: g.survival for g in surgeon.status(gated).gates}
    assert len(set(scales.values())) == len(scales) > 4
    for block_name, block in plain.named_modules():
        if type(block).__name__ == kind:
            scale = scales.pop(block_name)
            block.forward = lambda x, b=block, s=scale, **_: forward(b, x, s)
    assert not scales
    with torch.no_grad():
        expected = plain(c.input())
        assert same(gated(c.input()), expected)
        assert same(gated(c.input(1)), plain(c.input(1)))
        surgeon.remove(gated)
        assert not torch.allclose(gated(c.input()), expected, rtol=1e-2)  # the scales do something


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_torchs_own_transformer_layers(first: bool, scaling: str) -> None:
    """Their evaluation may take a fused path; the paper's scale must reach both branches all the same."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=first, batch_first=True, dropout=0.0)
    model, x, mask = (
        randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)),
        torch.randn(3, 5, 8),
        torch.zeros(5, 5),
    )
    plain = copy.deepcopy(model)
    surgeon.apply(model, "uniform", drop_rate=0.25, unit="batch", scaling=scaling, example=x)
    assert len(surgeon.status(model).gates) == 4
    s = 0.75 if scaling == "paper" else 1.0

    def by_hand(x: Tensor) -> Tensor:
        for m in plain.layers:
            if first:
                y = m.norm1(x)
                x = x + s * m.self_attn(y, y, y, need_weights=False)[0]
                x = x + s * m.linear2(m.linear1(m.norm2(x)).relu())
            else:
                x = m.norm1(x + s * m.self_attn(x, x, x, need_weights=False)[0])
                x = m.norm2(x + s * m.linear2(m.linear1(x).relu()))
        return x

    for evaluate in (torch.no_grad, torch.enable_grad):
        with evaluate():
            torch.testing.assert_close(model.eval()(x), by_hand(x))
            torch.testing.assert_close(model(x, mask=mask), by_hand(x))
            torch.testing.assert_close(model(x, src_key_padding_mask=torch.zeros(3, 5).bool()), by_hand(x))
    with coins(False):
        dropped = model.train()(x)
    expected = x
    for m in plain.layers:
        expected = expected if first else m.norm2(m.norm1(expected))
    torch.testing.assert_close(dropped, expected)


def test_a_root_that_makes_every_addition_itself() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for f in self.fs:
                x = x + f(x)
            return x

    model = randomise(Root())
    surgeon.apply(model, unit="batch", scaling="paper", example=X)
    assert [g.name for g in surgeon.status(model).gates] == ["add", "add_1", "add_2"]
    with coins({"add": True, "add_1": False, "add_2": True}):
        out = model(X)
    x = X + model.fs[0](X)
    assert same(out, x + model.fs[2](x))
    assert type(surgeon.remove(model)) is Root


# --- dtypes, devices, frozen weights ------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("unit", "scaling"), list(itertools.product(("batch", "sample"), ("inverted", "paper")))
)
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype, unit: str, scaling: str) -> None:
    model = randomise(Net(Twice())).to(dtype)
    x = torch.randn(3, 4, dtype=dtype)
    surgeon.apply(model, unit=unit, scaling=scaling, example=x)
    for kept in (True, False):
        with coins(kept):
            assert model(x).dtype == dtype
    assert model.eval()(x).dtype == dtype
    assert model(x).isfinite().all()


def test_a_model_on_the_meta_device_is_gated_before_it_has_weights() -> None:
    source = randomise(Net(Twice()))
    for context in (torch.device("meta"), torch.device("cpu")):
        with torch.device("meta"):
            model = Net(Twice())
        with context:
            surgeon.apply(
                model, "uniform", unit="sample", scaling="paper", drop_rate=0.25, example=X.to("meta")
            )
        assert all(p.is_meta for p in model.parameters())
        model.to_empty(device="cpu").load_state_dict(source.state_dict())
        surgeon.set_drop_rate(model, 0.25)
        reference = surgeon.apply(
            copy.deepcopy(source), "uniform", scaling="paper", drop_rate=0.25, example=X
        )
        for m in (model, reference):
            torch.manual_seed(1)
            m.out = m(X)  # type: ignore[assignment]
        assert same(model.out, reference.out)
        assert same(model.eval()(X), reference.eval()(X))
    with torch.device("meta"):
        model = Net(Twice())
    surgeon.apply(model, unit="batch", drop_rate=0.0, example=X.to("meta"))
    model.load_state_dict(source.state_dict(), assign=True)
    assert same(model(X), source(X))


def test_the_default_example_follows_the_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    assert len(surgeon.status(surgeon.apply(model.bfloat16())).gates) == 24


def test_frozen_weights_stay_frozen() -> None:
    model = randomise(nn.Sequential(Plain(), Plain()))
    for p in model[0].parameters():
        p.requires_grad_(False)
    surgeon.apply(model, unit="batch", example=X)
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 4
    for kept in (True, False):
        model.zero_grad(set_to_none=True)
        with coins(kept):
            model(X.clone().requires_grad_()).sum().backward()
        assert all(p.grad is None for p in model[0].parameters())
        assert all((p.grad is not None) == kept for p in model[1].parameters())


def test_models_in_inference_mode() -> None:
    model = randomise(Net(Plain()))
    with torch.inference_mode():
        assert len(surgeon.find(model, torch.randn(3, 4))) == 1
        surgeon.apply(model, scaling="paper", example=torch.randn(3, 4))
        inferred = model.eval()(X)
    surgeon.set_drop_rate(model, 0.2)
    assert same(model(X), inferred)
    model.train()(X).sum().backward()


def test_parametrized_children_and_weight_norm() -> None:
    model = randomise(Net(Plain()))
    torch.nn.utils.parametrizations.weight_norm(model.block.f[0])
    expected = model(X)
    surgeon.apply(model, unit="batch", scaling="paper", drop_rate=0.0, example=X)
    assert same(model(X), expected)
    torch.nn.utils.parametrizations.weight_norm(model.block.f[2])
    torch.testing.assert_close(model(X), expected)
    surgeon.remove(model)
    torch.testing.assert_close(model(X), expected)


def test_a_gated_model_exports_in_evaluation() -> None:
    model = randomise(Net(Twice()))
    for scaling in ("inverted", "paper"):
        surgeon.apply(model, scaling=scaling, example=X)
        program = torch.export.export(model.eval(), (X,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        x = torch.randn(5, 4)
        torch.testing.assert_close(program.module()(x), model(x))
        surgeon.remove(model)


# --- blocks alike share their traces in evaluation, too -----------------------


class Scaled(nn.Module):
    """Its branch is scaled by a number in evaluation alone, and dropped at a rate of its own in training."""

    def __init__(self, rate: float, factor: float = 1.0) -> None:
        super().__init__()
        self.f, self.drop_path, self.factor = nn.Linear(4, 4), timm.layers.DropPath(rate), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.drop_path(self.f(x))
        return x + (branch if self.training else branch * self.factor)


# The first block is one more: its input needs no gradient, and a forward may ask for that.
@pytest.mark.parametrize(("factors", "traces"), [((1.0, 1.0, 1.0, 1.0), 2), ((1.0, 3.0, 3.0, 1.0), 3)])
def test_equal_blocks_are_traced_once_for_evaluation(
    factors: tuple[float, ...], traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgeon._gating import preparation

    model = nn.Sequential(*(Scaled(0.1 * i, factor) for i, factor in enumerate(factors, 1))).eval()
    x, expected = torch.randn(3, 4), []
    calls, original = [], preparation.trace
    monkeypatch.setattr(preparation, "trace", lambda *a, **k: calls.append(a) or original(*a, **k))
    with torch.no_grad():
        y = x
        for block in model:
            y = y + block.f(y) * block.factor * 0.75
            expected.append(y)
        surgeon.apply(model, "uniform", drop_rate=0.25, scaling="paper", example=x)
        assert len(calls) == traces
        torch.testing.assert_close(model(x), expected[-1])
