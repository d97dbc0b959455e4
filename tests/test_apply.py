"""After apply the network is what it was: keys, classes, methods, Parameters, names, hooks; remove undoes it.

Evaluation under the paper's scaling against forwards written by hand; analysis that touches nothing;
models of every dtype and device; ``torch.compile`` of the masked form.
"""

import copy
import inspect
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from blocks import BasicBlock, Branch, Net, Plain, Snapshot, Twice, case, coins, grads, randomise, same
from torch import Tensor, nn

import surgeon
from surgeon.errors import AlreadyGatedError, NotGatedError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


# --- the same network ---------------------------------------------------------

LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "keys": lambda m: list(m.state_dict()),
    "names of modules": lambda m: [(n, id(x)) for n, x in m.named_modules(remove_duplicate=False)],
    "parameters": lambda m: [(n, id(p)) for n, p in m.named_parameters()],
    "buffers": lambda m: [(n, id(b)) for n, b in m.named_buffers()],
    "children": lambda m: [(n, id(c)) for n, c in m.named_children()],
    "class names": lambda m: [type(x).__name__ for x in m.modules()],
    "qualified class names": lambda m: [(type(x).__module__, type(x).__qualname__) for x in m.modules()],
    "docs": lambda m: [type(x).__doc__ for x in m.modules()],
    "signatures": lambda m: [str(inspect.signature(x.forward)) for x in m.modules()],
    "class signatures": lambda m: [str(inspect.signature(type(x))) for x in m.modules()],
    "flags": lambda m: [x.training for x in m.modules()],
}


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:resnet18", "timm:convnext_atto"])
@pytest.mark.parametrize("training", [True, False])
def test_what_a_model_looks_like_does_not_change(name: str, training: bool) -> None:
    model = case(name).build().train(training)
    before = {what: look(model) for what, look in LOOKS.items()}
    dirs = {n: set(dir(m)) for n, m in model.named_modules()}
    surgeon.apply(model, example=case(name).input())
    for what, look in LOOKS.items():
        assert look(model) == before[what], what
    for n, m in model.named_modules():
        assert dirs[n] <= set(dir(m))
        assert {a for a in set(dir(m)) - dirs[n] if not a.startswith("_")} == set()
    surgeon.remove(model)
    assert {n: set(dir(m)) for n, m in model.named_modules()} == dirs


def test_isinstance_and_super_work_on_gated_blocks() -> None:
    from torchvision.models.resnet import BasicBlock as Theirs

    model = surgeon.apply(case("torchvision:resnet18").build(), example=torch.zeros(2, 3, 64, 64))
    blocks = [m for m in model.modules() if isinstance(m, Theirs)]
    assert len(blocks) == 8
    assert all(issubclass(type(b), Theirs) for b in blocks)
    assert blocks[0].expansion == 1
    assert type(blocks[0]) is type(blocks[1])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_timms_methods_work_on_a_gated_model(name: str) -> None:
    c = case(f"timm:{name}")
    gated, plain = randomise(c.build()).eval(), randomise(c.build()).eval()
    x = c.input()
    surgeon.apply(gated, unit="batch", scaling="paper", drop_rate=0.0, example=x)
    with torch.no_grad():
        assert same(gated.forward_features(x), plain.forward_features(x))
        assert same(gated.forward_head(plain.forward_features(x)), plain(x))
        assert same(gated.forward_intermediates(x, indices=2), plain.forward_intermediates(x, indices=2))
    assert gated.get_classifier().out_features == 1000
    if hasattr(plain, "no_weight_decay"):
        assert gated.no_weight_decay() == plain.no_weight_decay()
    assert gated.group_matcher(coarse=True) == plain.group_matcher(coarse=True)
    groups = timm.models.group_parameters(gated, gated.group_matcher())
    assert groups == timm.models.group_parameters(plain, plain.group_matcher())
    gated.reset_classifier(7)
    assert gated(x).shape == (2, 7)
    assert gated.num_classes == 7


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_timms_gradient_checkpointing_gives_the_same_step(name: str, unit: str) -> None:
    c = case(f"timm:{name}")
    if name == "convnext_atto":
        c = case("timm:convnext_atto")
    model = randomise(c.build()).train()
    surgeon.apply(model, unit=unit, drop_rate=0.5, example=c.input())
    for m in model.modules():  # batch statistics would be counted twice, with gates or without
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    steps = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(2)
        out = model(c.input())
        out.square().mean().backward()
        steps.append((out.detach(), grads(model)))
    assert same(steps[0][0], steps[1][0])
    for n, g in steps[0][1].items():
        other = steps[1][1][n]
        # A checkpointed segment gives every weight of it a gradient or none; zero is as good as none.
        assert same(g, other) or (g is None and not other.any()) or (other is None and not g.any())


def test_hooks_on_blocks_and_on_what_is_inside_still_fire() -> None:
    block = BasicBlock()
    model = nn.Sequential(block)
    fired: list[str] = []
    block.register_forward_pre_hook(lambda *_: fired.append("pre"))
    block.register_forward_hook(lambda *_: fired.append("post"))
    block.conv2.register_forward_hook(lambda *_: fired.append("conv2"))
    block.conv1.weight.register_hook(lambda _: fired.append("grad"))
    block.register_full_backward_hook(lambda *_: fired.append("back"))
    x = torch.randn(2, 4, 6, 6)
    surgeon.apply(model, unit="batch", example=x)
    fired.clear()
    with coins(True):
        model(x.requires_grad_()).sum().backward()
    assert sorted(fired) == ["back", "conv2", "grad", "post", "pre"]
    fired.clear()
    with coins(False):
        model(x).sum().backward()
    assert sorted(fired) == ["back", "post", "pre"]
    handle = block.bn2.register_forward_hook(lambda m, a, out: out * 0)  # hooks added later, and that change
    with coins(True):
        assert same(model(x), x.relu())
    handle.remove()
    fired.clear()
    surgeon.remove(model)
    model(x)
    assert sorted(fired) == ["conv2", "post", "pre"]


def test_the_printed_model_shows_its_gates() -> None:
    model = surgeon.apply(nn.Sequential(Plain(), Twice()), drop_rate=0.5, example=X)
    assert "gates: add p=0.75" in str(model)
    assert "gates: add p=0.5, add_1 p=0.5" in str(model)
    assert "gates" not in str(surgeon.remove(model))


def test_a_slice_or_a_sibling_of_a_gated_block_is_an_ungated_one() -> None:
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    block = surgeon.apply(
        Own(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), "uniform", unit="batch", example=X
    )
    part = block[:2]
    with coins(False):
        assert same(part(X), X + torch.tanh(block[0](X)))
        assert same(block(X), X)
    assert str(part)
    sibling = type(surgeon.apply(Plain(), example=X))()
    assert same(sibling(X), X + sibling.f(X))
    sibling.load_state_dict(sibling.state_dict())
    assert surgeon.status(surgeon.apply(sibling, example=X)).gates


def test_a_forward_taken_before_remove_still_works() -> None:
    """Wrappers such as accelerate keep ``module.forward`` and put another one on the instance."""
    model = randomise(Net(Plain()))
    expected = model(X)
    surgeon.apply(model, example=X)
    model.block.forward = model.block.forward
    surgeon.remove(model)
    assert same(model(X), expected)


# --- remove and apply, again and again ----------------------------------------


@pytest.mark.parametrize(
    ("unit", "scaling"), list(itertools.product(("batch", "sample"), ("inverted", "paper")))
)
def test_remove_after_training_leaves_a_plain_model(unit: str, scaling: str) -> None:
    model = randomise(nn.Sequential(BasicBlock(), BasicBlock(project=True)))
    x = torch.randn(4, 4, 6, 6)
    before = Snapshot.of(model)
    surgeon.apply(model, unit=unit, scaling=scaling, example=x)
    assert Snapshot.of(model).differences(model) == []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model(torch.randn(2, 4, 5, 5))
    model.eval()(x)
    trained = {n: t.clone() for n, t in model.state_dict().items()}
    surgeon.remove(model.train())
    differences = before.differences(model)
    assert all(d.startswith("values of ") for d in differences)
    assert differences  # it did train
    assert same(dict(model.state_dict()), trained)
    plain = nn.Sequential(BasicBlock(), BasicBlock(project=True))
    plain.load_state_dict(trained)
    assert same(model.eval()(x), plain.eval()(x))


def test_apply_remove_apply_is_a_fresh_start() -> None:
    model = nn.Sequential(Plain(), Plain())
    first = surgeon.status(surgeon.apply(model, example=X))
    for _ in range(3):
        surgeon.remove(model)
        assert surgeon.status(surgeon.apply(model, example=X)) == first
    surgeon.remove(model)
    second = surgeon.status(surgeon.apply(model, "uniform", drop_rate=0.1, unit="batch", example=X))
    assert [g.drop_rate for g in second.gates] == [0.1, 0.1]


def test_apply_on_a_part_gates_that_part() -> None:
    model = nn.Sequential(nn.Sequential(Plain(), Plain()), nn.Sequential(Plain()))
    surgeon.apply(model[0], "uniform", unit="batch", example=X)
    assert len(surgeon.status(model).gates) == 2
    assert [g.block for g in surgeon.status(model).gates] == ["0.0", "0.1"]
    with coins(False):
        assert same(model[0](X), X)
        assert same(model(X), model[1](X))
    with pytest.raises(AlreadyGatedError, match=r"call surgeon\.remove\(model\) first"):
        surgeon.apply(model, example=X)
    with pytest.raises(NotGatedError):
        surgeon.remove(model[1])
    surgeon.apply(model[1], example=X)
    assert len(surgeon.status(model).gates) == 3
    surgeon.remove(model)
    with pytest.raises(NotGatedError):
        surgeon.status(model)


def test_a_block_registered_twice_is_gated_once() -> None:
    block = Plain()
    model = nn.Sequential(block, nn.Tanh(), block)
    surgeon.apply(model, unit="batch", example=X)
    assert len(surgeon.status(model).gates) == 1
    with coins(False) as tossed:
        assert same(model(X), torch.tanh(X))
    assert len(tossed) == 2
    surgeon.remove(model)
    assert type(block) is Plain


# --- analysis touches nothing -------------------------------------------------


class Restless(nn.Module):
    """Everything an analysis could disturb: caches, counters, random numbers, statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = BasicBlock()
        self.register_buffer("seen", torch.zeros(()))
        self.cache: dict[str, Tensor] = {}
        self.history: list[float] = []
        self.last: Any = None
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        import numpy as np

        self.seen += 1
        self.cache["x"] = x
        self.history.append(random.random() + float(np.random.rand()))  # noqa: S311, NPY002
        self.last = x
        return self.drop(self.conv(x)) + torch.rand(())


@pytest.mark.parametrize("operation", ["find", "apply"])
def test_analysis_leaves_no_trace(operation: str) -> None:
    import numpy as np

    model, x = Restless(), torch.randn(2, 4, 6, 6)
    model.conv.bn1.eval()
    before, given = Snapshot.of(model), x.clone()
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.random.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    grad = torch.is_grad_enabled()
    if operation == "find":
        surgeon.find(model, x)
    else:
        surgeon.remove(surgeon.apply(model, unit="batch", scaling="paper", example=x))
    assert before.differences(model) == []
    assert model.history == []
    assert model.cache == {}
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert (states[1], states[2]) == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    assert torch.equal(x, given)
    assert torch.is_grad_enabled() == grad
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_snapshot_sees_differences() -> None:
    """Negative control of the tests above."""
    model = Restless()
    for change in (
        lambda: model.seen.add_(1),
        lambda: model.history.append(0.0),
        lambda: model.cache.update(x=torch.zeros(1)),
        lambda: model.conv.bn1.train(mode=False),
        lambda: setattr(model.conv.conv1, "weight", nn.Parameter(model.conv.conv1.weight.detach().clone())),
        lambda: setattr(model.conv, "__class__", type("Other", (BasicBlock,), {})),
        lambda: model.conv.register_forward_hook(lambda *_: None),
        lambda: setattr(model, "last", 0),
    ):
        before = Snapshot.of(model)
        change()
        assert before.differences(model)


def test_caches_of_levit_stay_empty() -> None:
    c = case("timm:levit_128s")
    model = c.build().eval()
    surgeon.apply(model, scaling="paper", example=c.input())
    caches = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert caches
    assert all(not cache for cache in caches)
    with torch.no_grad():
        first, second = model(c.input()), model(c.input())
    assert type(first) is Tensor
    assert same(first, second)


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


# --- all or nothing -----------------------------------------------------------


class Registered(Branch):
    """A class that keeps a register of its subclasses and wants each of them to have a key."""

    register: dict[str, type] = {}  # noqa: RUF012

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        assert key not in Registered.register
        Registered.register[key] = cls

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Sealed(type):
    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError("sealed")
        return super().__new__(cls, name, bases, body)


class Final(Branch, metaclass=Sealed):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.parametrize("odd", [Registered, Final])
def test_a_class_that_cannot_be_subclassed_is_refused_by_name(odd: type[nn.Module]) -> None:
    model = nn.Sequential(Plain(), odd())
    findings = surgeon.find(model, X)
    assert [r.name for r in findings] == ["0.add"]
    assert [(r.name, r.code) for r in findings.refused] == [("1.add", "untraceable")]
    assert f"its class {odd.__name__} cannot be subclassed" in findings.refused[0].reason
    surgeon.apply(model, unit="batch", example=X)
    assert not Registered.register
    assert type(model[1]) is odd
    with coins(False):
        assert same(model(X), model[1](X))
    surgeon.remove(model)
    before = Snapshot.of(odd_root := odd())
    with pytest.raises(surgeon.SurgeonError, match="cannot be subclassed"):
        surgeon.apply(odd_root, example=X)
    assert before.differences(odd_root) == []


# --- torch.compile of the masked form -----------------------------------------


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


# --- blocks alike share their traces in evaluation, too -----------------------


class Scaled(nn.Module):
    """Its branch is scaled by a number in evaluation alone, and dropped at a rate of its own in training."""

    def __init__(self, rate: float, factor: float = 1.0) -> None:
        super().__init__()
        self.f, self.drop_path, self.factor = nn.Linear(4, 4), timm.layers.DropPath(rate), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.drop_path(self.f(x))
        return x + (branch if self.training else branch * self.factor)


@pytest.mark.parametrize(("factors", "traces"), [((1.0, 1.0, 1.0, 1.0), 1), ((1.0, 3.0, 3.0, 1.0), 2)])
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
