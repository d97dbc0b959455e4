"""After apply the network is what it was: keys, classes, methods, Parameters, names, hooks; remove undoes it.

Analysis touches nothing, and apply does all or nothing.
"""

import inspect
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
from blocks import BasicBlock, Branch, Net, Plain, Snapshot, Twice, case, coins, grads, randomise, same
from torch import Tensor, nn

import surgeon
from surgeon._gating.block import KeepingBlock
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


def test_a_register_of_subclasses_hears_of_none() -> None:
    model = nn.Sequential(Registered(), Plain())
    surgeon.remove(surgeon.apply(model, example=X))
    assert Registered.register == {}
    assert type(model[0]) is Registered


def test_a_class_that_cannot_be_subclassed_is_refused_by_name() -> None:
    model = nn.Sequential(Plain(), Final())
    findings = surgeon.find(model, X)
    assert [r.name for r in findings] == ["0.add"]
    assert [(r.name, r.code) for r in findings.refused] == [("1.add", "untraceable")]
    assert "its class Final cannot be subclassed" in findings.refused[0].reason
    surgeon.apply(model, unit="batch", example=X)
    assert type(model[1]) is Final
    with coins(False):
        assert same(model(X), model[1](X))
    surgeon.remove(model)
    before = Snapshot.of(root := Final())
    with pytest.raises(surgeon.SurgeonError, match="cannot be subclassed"):
        surgeon.apply(root, example=X)
    assert before.differences(root) == []


class Fixed(Plain):
    """A block whose class cannot be exchanged."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise KeyboardInterrupt
        super().__setattr__(name, value)


@pytest.mark.parametrize("keep_eval", [False, True])
def test_an_interrupt_while_gates_go_in_leaves_none(keep_eval: bool) -> None:
    model = nn.Sequential(Plain(), Fixed(), Plain())
    before = Snapshot.of(model)
    with pytest.raises(KeyboardInterrupt):
        surgeon.apply(model, scaling="paper", keep_eval=keep_eval, example=X)
    assert before.differences(model) == []


class Guarding(type):
    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
        if any(issubclass(base, KeepingBlock) for base in bases):
            raise TypeError("no state")
        return super().__new__(cls, name, bases, body)


class Stateless(Plain, metaclass=Guarding):
    """A class of which none with the gates of ``keep_eval`` can be made."""


def test_the_class_that_a_block_will_get_is_tried_before_any_block_is_touched() -> None:
    model = nn.Sequential(Plain(), Stateless())
    before = Snapshot.of(model)
    with pytest.raises(
        surgeon.SurgeonError, match=r"1: its class Stateless cannot be subclassed \(no state\)"
    ):
        surgeon.apply(model, scaling="paper", keep_eval=True, example=X)
    assert before.differences(model) == []
    assert len(surgeon.status(surgeon.apply(model, scaling="paper", example=X)).gates) == 2
