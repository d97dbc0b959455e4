"""The fold on blocks of timm and torchvision as they are: where the scale lands, and the numbers.

Each model runs in float64 with random norm statistics and affine weights. A hook on the last module of
each branch marks the branch, or multiplies it by its scale for the reference.
"""

import ast
import copy
import re
from collections import Counter

import pytest
import timm
import torch
from folds import made_anew, zoo_randomised
from torch import Tensor, nn

import surgeon
from surgeon._folding.fold import FoldPlan, commit, plan
from surgeon.errors import FoldError

SLOTS = r"(^|\.)drop_path\d?$"


class Branches:
    """Hooks on the ends of a model's branches, numbered as they run."""

    def __init__(self, model: nn.Module, pattern: str) -> None:
        self.calls = 0
        self.scales: dict[str, float] | None = None
        ends = [module for name, module in model.named_modules() if re.search(pattern, name)]
        for end in dict.fromkeys(ends):
            end.register_forward_hook(self._end)
        model.register_forward_pre_hook(self._begin)

    def _begin(self, module: nn.Module, args: object) -> None:
        self.calls = 0

    def _end(self, module: nn.Module, args: object, out: Tensor) -> Tensor:
        gate, self.calls = str(self.calls), self.calls + 1
        if self.scales is None:
            return torch.ops.surgeon.mark(out, gate)
        return out * self.scales.get(gate, 1.0)


def folded(name: str, pattern: str, size: int) -> tuple[FoldPlan, int, float]:
    """The plan, the number of gates, and the relative error of the folded model."""
    model = made_anew(name, size)
    branches = Branches(zoo_randomised(model), pattern)
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        branches.scales = {}
        ungated = model(x)
        gates = branches.calls
        scales = {str(gate): 1 - 0.5 * (gate + 1) / gates for gate in range(gates)}
        branches.scales = scales
        expected = model(x)
        branches.scales = None
        made = plan(model, (x.expand(2, -1, -1, -1),), {}, scales)
        commit(model, made, scales)
        branches.scales = {kept.gate: scales[kept.gate] for kept in made.kept}
        result = model(x)
    largest = expected.abs().max()
    assert (ungated - expected).abs().max() > 1e-6 * largest, "the scales have no effect"
    return made, gates, float((result - expected).abs().max() / largest)


def landed(made: FoldPlan) -> Counter[str]:
    """How often each kind of parameter was touched, by the last two parts of its name without numbers."""
    names = (f"{'.'.join(step.parameter.split('.')[-2:])} ** {step.exponent}" for step in made.products)
    return Counter(re.sub(r"^(\d+|attn|mlp)\.", "", name) for name in names)


def pairs(*layers: str, count: int) -> dict[str, int]:
    return {f"{layer}.{kind} ** 1": count for layer in layers for kind in ("weight", "bias")}


MODELS: list[tuple[str, str, int, int, dict[str, int]]] = [
    # name, ends of the branches, input size, gates, where the scales land
    ("resnet50", r"\d\.bn3$", 32, 16, pairs("bn3", count=16)),
    ("seresnet18", r"\d\.se$", 32, 8, pairs("bn2", count=8) | {"fc1.weight ** -1": 8}),
    ("resnetv2_18", r"\d\.conv2$", 64, 8, {"conv2.weight ** 1": 8}),
    ("resnetv2_50x1_bit", r"\d\.conv3$", 64, 16, pairs("norm3", count=16)),
    ("ghostnet_050", r"ghost2$", 64, 16, {"weight ** 1": 32, "bias ** 1": 32, "weight ** -1": 16}),
    ("nf_resnet26", r"\d\.conv3$", 64, 8, {"conv3.gain ** 1": 8, "conv3.bias ** 1": 8}),
    ("efficientnet_b0", r"[1-9]\.\d\.bn3$", 64, 15, pairs("bn3", count=15)),
    ("convnext_atto", SLOTS, 64, 12, {"gamma ** 1": 12}),
    ("vit_tiny_patch16_224", SLOTS, 64, 24, pairs("proj", "fc2", count=12)),
    ("swin_tiny_patch4_window7_224", SLOTS, 56, 24, pairs("proj", "fc2", count=12)),
    ("swinv2_cr_tiny_ns_224", SLOTS, 64, 24, pairs("norm1", "norm2", count=12)),
    ("xcit_nano_12_p16_224", SLOTS, 64, 40, {"gamma1 ** 1": 14, "gamma2 ** 1": 13, "gamma3 ** 1": 12}),
    ("cait_xxs24_224", SLOTS, 64, 52, {"gamma_1 ** 1": 26, "gamma_2 ** 1": 26}),
    ("levit_128s", SLOTS, 224, 20, {"bn.weight ** 1": 20, "bn.bias ** 1": 20}),
    (
        "torchvision:mobilenet_v2",
        r"features\.\d+\.conv\.3$",
        64,
        16,
        {"weight ** 1": 16, "bias ** 1": 16},
    ),
    ("poolformer_s12", SLOTS, 64, 24, pairs("norm1", "fc2", count=12)),
]

UNFOLDABLE = {
    # Class attention hands its patch tokens on: what the branch adds is the shortcut itself. The last block's
    # are not read any more.
    "xcit_nano_12_p16_224": 1,
}


@pytest.mark.parametrize(("name", "pattern", "size", "gates", "expected"), MODELS, ids=lambda v: v)
def test_a_model_folds_where_it_should(
    name: str, pattern: str, size: int, gates: int, expected: dict[str, int]
) -> None:
    made, count, error = folded(name, pattern, size)
    assert count == gates
    assert dict(landed(made)) == expected
    assert len(made.kept) == UNFOLDABLE.get(name, 0)
    assert {kept.reason for kept in made.kept} <= {
        "the branch reaches its own shortcut without passing a parameter that could take the scale"
    }
    assert error < 1e-12


def test_a_branch_that_ends_in_silu_names_the_module() -> None:
    made, gates, error = folded("cs3darknet_s", SLOTS, 64)
    assert not made.products
    assert len(made.kept) == gates > 0
    assert re.fullmatch(
        r"the branch ends in silu in 'stages\.0\.blocks\.0\.conv2\.bn\.act', which does not commute .*",
        made.kept[0].reason,
    )
    assert error < 1e-12


def test_the_plan_leaves_the_caches_of_levit_alone() -> None:
    model = timm.create_model("levit_128s").eval()
    caches = [
        module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")
    ]
    plan(model, (torch.randn(2, 3, 224, 224),), {}, {})
    assert caches
    assert all(cache == {} for cache in caches)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("cspnext_tiny", "3 of 3 gates (stages.0.1.blocks.0.add: the branch ends in silu"),
        pytest.param(
            "xcit_nano_12_p8_224",
            "1 of 40 gates (cls_attn_blocks.0.add_1: the branch reaches",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_models_whose_evaluation_cannot_be_kept_stay_as_they_are(name: str, refused: str) -> None:
    """Bit for bit, with the gates named, and each way out that the error offers is one."""
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    weights, looks = copy.deepcopy(model.state_dict()), _looks(model)
    with pytest.raises(FoldError) as caught:
        surgeon.apply(model, scaling="paper", keep_eval=True, example=x)
    assert f"no weight takes the scale of {refused}" in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(weights) and _looks(model) == looks
    assert all(torch.equal(value, after[key]) for key, value in weights.items())
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        assert torch.equal(surgeon.apply(copy.deepcopy(model), example=x)(x), expected)
        named = ast.literal_eval(str(caught.value).partition("exclude=")[2].partition(", or")[0])
        if not refused.startswith(f"{len(named)} of {len(named)} "):
            surgeon.apply(model, scaling="paper", keep_eval=True, exclude=named, example=x)
            assert any(not torch.equal(value, after[key]) for key, value in weights.items())
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def _looks(model: nn.Module) -> list[tuple[type, bool, set[str]]]:
    return [(type(module), module.training, set(vars(module))) for module in model.modules()]
