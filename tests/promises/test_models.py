"""The models of the first promise: gates counted by hand, evaluation bit for bit, training with every coin.

Every model has random weights and statistics, so that a zero-initialised last layer or fresh running
statistics cannot make a wrong sum look right. Inputs are small; the slow run repeats all of it at 224 x 224.
"""

import pytest
import timm
import torch
from blocks import CASES, Case, Snapshot, coins, grads, parameters, randomise, same
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import surgeon
from surgeon._gating.gated import gated_blocks

# One model of each kind of block runs the training steps by default; the slow run does them all.
TRAINED = {
    *("torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:swin_t", "timm:resnetv2_50"),
    *("timm:convnextv2_atto", "timm:vit_tiny_patch16_224", "timm:nf_resnet26", "timm:levit_128s"),
    *("timm:regnetx_002",),
}


@pytest.mark.parametrize("c", parameters())
def test_counts_parity_and_restoration(c: Case) -> None:
    """Gates by hand count; evaluation bit for bit at two batch sizes; remove leaves the model as it was."""
    model = randomise(c.build()).eval()
    one, two = c.input(1), c.input(2)
    with torch.no_grad():
        expected = [model(one), model(two)]
    before = Snapshot.of(model)
    keys = list(model.state_dict())
    assert surgeon.apply(model, example=two) is model
    gates = surgeon.status(model).gates
    assert len(gates) == c.gates, c.why
    assert len({g.name for g in gates}) == c.gates
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert same([model(one), model(two)], expected)
    assert isinstance(model, before.classes[""])
    assert all(isinstance(m, before.classes[n]) for n, m in model.named_modules())
    assert surgeon.remove(model) is model
    assert before.differences(model) == []


@pytest.mark.parametrize(
    "c", [pytest.param(c, id=str(c), marks=[] if str(c) in TRAINED else [pytest.mark.slow]) for c in CASES]
)
def test_training_with_every_coin(c: Case) -> None:
    """Kept: the plain training step, bit for bit. Dropped: the branches do not run and get no gradient."""
    model = randomise(c.build())
    x, buffers = c.input(), {n: b.clone() for n, b in model.named_buffers()}

    def step() -> tuple[Tensor, dict[str, Tensor | None]]:
        model.train().zero_grad(set_to_none=True)
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(buffers[n])
        torch.manual_seed(4)
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        out.float().square().mean().backward()
        return out, grads(model)

    own = [m for m in model.modules() if isinstance(m, (StochasticDepth, DropPath))]
    with pytest.MonkeyPatch.context() as patch:  # some come with stochastic depth switched on
        for module in own:
            patch.setattr(module, "p" if isinstance(module, StochasticDepth) else "drop_prob", 0.0)
        plain = step()
    after = {n: b.clone() for n, b in model.named_buffers()}
    missing = {n for n, g in plain[1].items() if g is None}
    surgeon.apply(model, unit="batch", scaling="paper", example=x)
    with coins(True) as tossed:
        kept = step()
    assert same(kept, plain)
    assert same(dict(model.named_buffers()), after)  # statistics too
    assert {n for n, g in kept[1].items() if g is None} == missing
    assert len(tossed) == c.gates  # each gate tosses its coin once
    assert all(g.skips for g in surgeon.status(model).gates)
    entered: list[nn.Module] = []
    branches = [b for _, b, _ in gated_blocks(model)]
    for block in branches:
        for child in block.children():
            child.register_forward_hook(lambda m, *_: entered.append(m))
    with coins(False):
        dropped = step()
    assert bool(dropped[0].isfinite().all())
    lost = {n for n, g in dropped[1].items() if g is None} - missing
    assert len(lost) >= c.gates  # every branch has weights of its own, and none of them was computed
    calls = len(entered)
    entered.clear()
    with coins(True):
        step()
    assert calls <= len(entered) - c.gates


@pytest.mark.parametrize("c", [pytest.param(c, id=str(c), marks=pytest.mark.slow) for c in CASES])
def test_the_published_size(c: Case) -> None:
    """The same counts and bits at 224 x 224, with the example that the model itself declares."""
    options = {k: v for k, v in c.options.items() if k not in ("img_size", "image_size")}
    model = randomise(Case(c.library, c.name, c.gates, c.why, 224, options).build()).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        surgeon.apply(model)
        assert len(surgeon.status(model).gates) == c.gates
        assert same(model(x), expected)
        assert same(model.train().eval()(x[:1]), surgeon.remove(model)(x[:1]))


@pytest.mark.parametrize(("name", "counted"), [("resnet26d", 8), ("seresnet18", 8), ("resnetrs50", 16)])
def test_training_and_evaluating_models_have_the_same_adds(name: str, counted: int) -> None:
    model = timm.create_model(name)
    for flag in (True, False):
        assert len(surgeon.find(model.train(flag), torch.zeros(2, 3, 32, 32))) == counted
        assert model.training == flag


def test_every_model_of_the_promise_is_here() -> None:
    assert len(CASES) == 30
    assert {c.library for c in CASES} == {"timm", "torchvision"}
