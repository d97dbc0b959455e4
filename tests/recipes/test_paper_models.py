"""The networks of the papers: how many weights and residual adds they have, and what sets each apart."""

import itertools

import pytest
import torch
from torch import nn

import surgeon
from surgeon import _recipes
from surgeon._source import load_model, resolve

SIZES = {  # millions of parameters, as the papers print them, at 10 classes
    "resnet20": "0.27",
    "resnet32": "0.46",
    "resnet44": "0.66",
    "resnet56": "0.85",  # He 2016, table 6
    "resnet110": "1.7",
    "resnet1202": "19.4",
    "preresnet110": "1.7",
    "preresnet164": "1.7",  # table 5 of Zagoruyko 2016
    "wrn40_1": "0.6",
    "wrn40_2": "2.2",
    "wrn40_4": "8.9",
    "wrn16_8": "11.0",
    "wrn28_10": "36.5",
    "resnext29_8x64d": "34.4",
    "resnext29_16x64d": "68.1",  # Xie 2017, table 7
    "densenet40_12": "1.0",
    "densenet100_12": "7.0",
    "densenet100_24": "27.2",  # Huang 2017, table 2
    "densenetbc100_12": "0.8",
    "densenetbc250_24": "15.3",
    "densenetbc190_40": "25.6",
    "shake_shake26_2x32d": "2.9",
    "shake_shake26_2x64d": "11.7",
    "shake_shake26_2x96d": "26.2",
}
FRACTAL = {5: "0.3", 10: "0.8", 20: "2.1", 40: "4.8", 80: "10.2", 160: "21.1"}  # Larsson 2017, table 3
GATES = {
    "resnet20": 9,
    "resnet32": 15,
    "resnet44": 21,
    "resnet56": 27,
    "resnet110": 54,
    "resnet152": 75,  # for SVHN, Huang 2016
    "resnet1202": 600,
    "preresnet110": 54,
    "preresnet164": 54,
    "preresnet1001": 333,
    "wrn40_1": 18,
    "wrn40_2": 18,
    "wrn40_4": 18,
    "wrn16_8": 6,
    "wrn28_10": 12,
    "resnext29_8x64d": 9,
    "resnext29_16x64d": 9,
    "shake_shake26_2x32d": 12,
    "shake_shake26_2x64d": 12,
    "shake_shake26_2x96d": 12,
    "rir18": 30,  # both streams of eight blocks, and the identities of fourteen of the sixteen layers
}


def made(name: str, **kwargs) -> nn.Module:
    return load_model(f"recipes:{name}", **kwargs)


def millions(name: str, digits: int, counted=lambda name: True, **kwargs) -> str:
    with torch.device("meta"):
        model = made(name, **kwargs)
    count = sum(p.numel() for key, p in model.named_parameters() if counted(key))
    return f"{count / 1e6:.{digits}f}"


def alike(printed: str, exact: str) -> bool:
    """Some papers cut what others round: 8.95 is 8.9 in one, 11.65 is 11.7 in another."""
    return abs(float(printed) - float(exact)) <= 10.0 ** -len(printed.partition(".")[2]) * 0.6


@pytest.mark.parametrize("name", SIZES)
def test_as_many_weights_as_the_paper_says(name):
    assert alike(SIZES[name], millions(name, 4))


@pytest.mark.parametrize("depth", FRACTAL)
def test_as_many_weights_as_the_paper_says_of_fractal_networks(depth):
    assert alike(FRACTAL[depth], millions(f"fractalnet{depth}", 4, num_classes=100))


def test_the_thousand_layers_are_counted_without_norms():
    """Table 5 of Zagoruyko 2016 says 10.2; with the weights of its batch norms it has 10.3."""
    assert millions("preresnet1001", 1, lambda name: "bn" not in name) == "10.2"
    assert millions("preresnet1001", 1) == "10.3"


def test_resnet_in_resnet_has_the_weights_of_the_plain_network_of_its_width():
    """The paper claims so (section 2), and gives no figure; projections come on top."""
    widths = [96] * 5 + [192] * 6 + [384] * 6
    plain = 9 * 3 * 96 + sum(9 * a * b for a, b in itertools.pairwise(widths)) + 384 * 10 + 10
    with torch.device("meta"):
        model = made("rir18")
    own = sum(p.numel() for key, p in model.named_parameters() if "bn" not in key and "shortcut" not in key)
    assert own == plain


def test_every_network_is_counted():
    rest = {"resnet152", "rir18", "preresnet1001", "fractalnet20_wide"} | {
        f"fractalnet{depth}" for depth in FRACTAL
    }
    assert set(_recipes.models()) == set(SIZES) | rest


@pytest.mark.parametrize("name", GATES)
def test_as_many_residual_adds_as_units(name):
    model = made(name)
    found = surgeon.find(model, torch.zeros(2, 3, 32, 32))
    assert len(found.residuals) == GATES[name]
    # Shake-Shake sums its branches in a function of its own, ResNet in ResNet streams inside its units.
    inside = {"no-shortcut", "linear", "nested"} if name == "rir18" else {"form"}
    assert {r.code for r in found.refused} <= inside


@pytest.mark.parametrize(
    "name", ["resnet20", "preresnet110", "wrn40_1", "rir18", "fractalnet20", "densenet40_12"]
)
def test_runs_and_takes_classes(name):
    model = made(name, num_classes=7).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet21", "preresnet165", "wrn", "densenet"])
def test_depths_that_do_not_exist_are_refused(name):
    makers = {
        "resnet21": lambda: _recipes.models()["resnet20"].func(21),
        "preresnet165": lambda: _recipes.models()["preresnet164"].func(165, True),
        "wrn": lambda: _recipes.models()["wrn28_10"].func(30, 1),
        "densenet": lambda: _recipes.models()["densenet40_12"].func(41, 12),
    }
    with pytest.raises(ValueError, match=r"depth is .* it is "):
        makers[name]()


def test_shortcuts_of_both_papers():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    he, huang = (made("resnet20", average=average).blocks[3].shortcut for average in (False, True))
    he.extra = huang.extra = 3
    assert torch.equal(he(x)[:, :2], x[:, :, ::2, ::2])
    assert torch.equal(huang(x)[:, :2], nn.functional.avg_pool2d(x, 2))
    assert he(x).shape == huang(x).shape == (1, 5, 2, 2)
    assert not he(x)[:, 2:].any()


def test_fractal_block_is_its_rule_of_growth():
    block = made("fractalnet20").blocks[0].eval()
    x = torch.randn(2, 3, 8, 8)
    one, two, four = block.columns
    first = (two[0](x) + four[1](four[0](x))) / 2
    wanted = (one[0](x) + two[1](first) + four[3](four[2](first))) / 3
    torch.testing.assert_close(block(x), wanted)


def test_shake_shake_mixes_anew_backwards():
    shake = _recipes.models()["shake_shake26_2x32d"].func.__init__.__globals__["Shake"]
    torch.manual_seed(0)
    a, b = torch.ones(64, 1, requires_grad=True), torch.zeros(64, 1, requires_grad=True)
    y = shake.apply(a, b)
    y.sum().backward()
    assert 0 < y.min() < y.max() < 1
    torch.testing.assert_close(a.grad + b.grad, torch.ones(64, 1))
    assert not torch.allclose(y, a.grad, atol=0.05)


def test_bare_names_and_near_ones():
    assert resolve("resnet110") == "recipes:resnet110"
    with pytest.raises(
        surgeon.errors.UsageError, match=r"recipes has no model 'resnet111'. Did you mean recipes:"
    ):
        made("resnet111")
