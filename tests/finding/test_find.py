"""What is found and what is refused: the libraries' own sites as ground truth, reasons for the rest.

Recall: a model built with a drop path rate shows where its authors put stochastic depth. Every live site
whose result goes into an addition must stand in some residual's ``replaces``.
"""

from typing import Any

import pytest
import timm
import torch
import torchvision
from blocks import BasicBlock, Branch, Net, Plain, Snapshot, Twice, case, randomise
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import surgeon
from surgeon._finding.findings import REASONS
from surgeon.errors import NoResidualsError, UsageError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

# Small models of timm families that own DropPath sites, with an input size; the slow ones widen the net.
FAMILIES: dict[str, tuple[int, dict[str, Any], bool]] = {
    "vit_tiny_patch16_224": (32, {"img_size": 32}, True),
    "convnext_atto": (64, {}, True),
    "resnet18": (64, {}, True),
    "mixer_s32_224": (64, {"img_size": 64}, True),
    "poolformer_s12": (64, {}, True),
    "regnety_002": (64, {}, True),
    "mobilenetv3_small_050": (64, {}, True),
    "nf_regnet_b0": (64, {}, True),
    "resmlp_12_224": (32, {"img_size": 32}, True),
    "pvt_v2_b0": (64, {}, True),
    "edgenext_xx_small": (64, {}, True),
    "efficientformer_l1": (224, {}, False),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64}, False),
    "swinv2_cr_tiny_ns_224": (224, {}, False),
    "beit_base_patch16_224": (32, {"img_size": 32}, False),
    "cait_xxs24_224": (32, {"img_size": 32}, False),
    "xcit_nano_12_p16_224": (32, {}, False),
    "levit_128s": (224, {}, False),
    "coat_tiny": (224, {}, False),
    "mvitv2_tiny": (224, {}, False),
    "davit_tiny": (224, {}, False),
    "focalnet_tiny_srf": (224, {}, False),
    "maxvit_rmlp_pico_rw_256": (256, {}, False),
    "coatnet_nano_rw_224": (224, {}, False),
    "crossvit_tiny_240": (240, {}, False),
    "tf_efficientnetv2_b0": (64, {}, False),
    "gmlp_ti16_224": (224, {}, False),
    "inception_next_atto": (64, {}, False),
    "pit_ti_224": (224, {}, False),
    "sequencer2d_s": (224, {}, False),
    "tnt_s_patch16_224": (224, {}, False),
    "twins_pcpvt_small": (224, {}, False),
    "visformer_tiny": (224, {}, False),
    "volo_d1_224": (224, {}, False),
    "eva02_tiny_patch14_224": (224, {}, False),
    "hiera_tiny_224": (224, {}, False),
    "fastvit_t8": (64, {}, False),
}


def called_sites(model: nn.Module, x: Tensor, kind: type[nn.Module], rate: str) -> set[str]:
    """Names of the stochastic-depth modules of a rate above zero that one training forward calls."""
    called: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, kind) and getattr(module, rate):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        model.train()(x)
    return called


def drop_path_rate_of(name: str, size: int, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return timm.create_model(name, drop_path_rate=0.3, **options), torch.randn(2, 3, size, size)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if fast else [pytest.mark.zoo]) for n, (_, _, fast) in FAMILIES.items()]
)
def test_every_site_of_timms_own_drop_path_is_found(name: str) -> None:
    size, options, _ = FAMILIES[name]
    model, x = drop_path_rate_of(name, size, options)
    found = surgeon.find(model, x)
    replaced = {site for r in found for site in r.replaces}
    sites = called_sites(model, x, DropPath, "drop_prob")
    assert sites
    assert replaced == sites
    assert len(found) >= len(sites)


def test_the_recall_test_sees_sites() -> None:
    """Negative control: the same comparison on a model whose sites are known, with one left out."""
    model, x = drop_path_rate_of("vit_tiny_patch16_224", 32, {"img_size": 32})
    assert len(called_sites(model, x, DropPath, "drop_prob")) == 22
    fewer = surgeon.find(model, x, exclude=["blocks.5"])
    assert len({site for r in fewer for site in r.replaces}) == 20


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnext_tiny", 64),
        pytest.param("efficientnet_b0", 64, marks=pytest.mark.slow),
        pytest.param("swin_t", 64, marks=pytest.mark.slow),
        pytest.param("swin_v2_t", 64, marks=pytest.mark.slow),
        pytest.param("maxvit_t", 224, marks=pytest.mark.slow),
    ],
)
def test_every_site_of_torchvisions_own_stochastic_depth_is_found(name: str, size: int) -> None:
    model, x = torchvision.models.get_model(name, weights=None), torch.randn(2, 3, size, size)
    found = surgeon.find(model, x)
    assert called_sites(model, x, StochasticDepth, "p") == {site for r in found for site in r.replaces}


def test_sites_are_listed_whether_or_not_the_model_is_in_training_mode() -> None:
    model, x = drop_path_rate_of("convnext_atto", 64, {})
    assert surgeon.find(model.eval(), x) == surgeon.find(model.train(), x)


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name", "size"),
    [
        pytest.param("torchvision", "vgg11", 32, marks=pytest.mark.slow),
        ("torchvision", "densenet121", 32),
        pytest.param("torchvision", "inception_v3", 299, marks=pytest.mark.slow),
        pytest.param("timm", "inception_v3", 299, marks=pytest.mark.slow),
        pytest.param("timm", "densenet121", 64, marks=pytest.mark.slow),
    ],
)
def test_networks_without_residuals_say_so(library: str, name: str, size: int) -> None:
    options = {"init_weights": False} if name == "inception_v3" and library == "torchvision" else {}
    model = (
        torchvision.models.get_model(name, weights=None, **options)
        if library == "torchvision"
        else timm.create_model(name)
    )
    x = torch.zeros(2, 3, size, size)
    before = Snapshot.of(model)
    assert len(surgeon.find(model, x)) == 0
    with pytest.raises(NoResidualsError, match="residual add to gate") as caught:
        surgeon.apply(model, example=x)
    assert type(model).__name__ in str(caught.value)
    assert before.differences(model) == []


def test_no_addition_at_all_says_so() -> None:
    with pytest.raises(NoResidualsError, match="Linear performs no addition of two activations"):
        surgeon.apply(nn.Linear(4, 4), example=X)


def only(block: nn.Module, x: Tensor = X) -> tuple[list[str], list[str]]:
    """Kinds of the residual adds of a block and codes of its refusals."""
    findings = surgeon.find(Net(block), x)
    for refusal in findings.refused:
        assert refusal.code in REASONS
        assert refusal.reason
        assert refusal.block_type
    return [r.kind for r in findings], [r.code for r in findings.refused]


def block(source: str, **layers: nn.Module) -> nn.Module:
    """A block with the forward ``source`` over ``x``; ``f`` and ``g`` are branches."""
    scope: dict[str, Any] = {"torch": torch, "F": nn.functional}
    exec("def forward(self, x):\n" + "\n".join("    " + line for line in source.split("; ")), scope)  # noqa: S102
    made = type("Block", (Branch,), {"forward": scope["forward"]})()
    made.g = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    for name, layer in layers.items():
        setattr(made, name, layer)
    return made


@pytest.mark.parametrize(
    "source",
    [
        "return x + self.f(x)",
        "return self.f(x) + x",
        "y = self.f(x); y += x; return y",
        "x += self.f(x * 1); return x",
        "return x.add(self.f(x))",
        "return self.f(x).add_(x)",
        "return torch.add(x, self.f(x))",
        "return torch.add(input=x, other=self.f(x))",
        "return torch.add(self.f(x), other=x)",
        "return sum([x, self.f(x)])",
        "return 0.5 * x + self.f(x)",
        "return x + 0.1 * self.f(x)",
        "y = self.f(x); return x + y.reshape(x.shape)",
    ],
)
def test_every_way_to_write_an_identity_residual(source: str) -> None:
    assert only(block(source)) == (["identity"], [])


@pytest.mark.parametrize(
    "source",
    [
        "return self.p(x) + self.f(x)",
        "y = self.f(x); y += self.p(x); return y",
        "return self.f(x).relu() + self.p(x)",
    ],
)
def test_projection_shortcuts(source: str) -> None:
    assert only(block(source, p=nn.Linear(4, 4))) == (["projection"], [])
    norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    (residual,) = surgeon.find(Net(block(source, p=norm)), X)
    assert (residual.shortcut, residual.kind) == ("p", "projection")
    assert residual.branch.split()[0] == "f"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("return self.f(x) + self.g(self.g(x))", "fusion"),
        ("return self.f[0](x) + self.p(x)", "linear"),
        ("return x + self.p(x)", "linear"),
        ("z = torch.sigmoid(self.p(x)); return z * self.g(x) + (1 - z) * self.f(x)", "gating"),
        ("return self.f(x) + self.b", "bias"),
        ("return self.f(x) + torch.ones_like(x)", "bias"),
        ("return self.f(x) + torch.randn_like(x)", "bias"),
        ("return x + self.f(x).unsqueeze(0)", "broadcast"),
        ("return x + self.f(x).mean()", "broadcast"),
        ("return x + self.f(x).mean(0, keepdim=True)", "broadcast"),
    ],
)
def test_additions_that_are_none_have_a_code(source: str, code: str) -> None:
    made = block(source, p=nn.Linear(4, 4))
    made.b = nn.Parameter(torch.randn(4))
    assert only(made) == ([], [code])


@pytest.mark.parametrize(
    "source",
    [
        "return torch.addcmul(x, self.f(x), torch.ones(4))",
        "return torch.stack([x, self.f(x)]).sum(0)",
        "return torch.add(x, self.f(x), alpha=0.5)",
        "return x.add(self.f(x), alpha=0.5)",
        "y = self.f(x); y[:, :2] += x[:, :2]; return y",
        "return torch.lerp(x, self.f(x), 0.5)",
        "return x - self.f(x)",
        "return torch.baddbmm(x[None], x[None], self.f(x)[None, :1, :].expand(1, 4, 4))[0]",
    ],
)
def test_no_sum_is_wrong_and_additions_are_never_silent(source: str) -> None:
    """Other forms of a sum: gated correctly, or left alone with a reason; an ``add`` never silently."""
    made = Net(block(source))
    findings = surgeon.find(made, X)
    if "add(" in source or "addcmul" in source or "+=" in source:
        assert len(findings) + len(findings.refused) > 0
    expected = made(X)
    if len(findings):
        surgeon.apply(made, unit="batch", scaling="paper", drop_rate=0.0, example=X)
        assert torch.equal(made(X), expected)


def test_what_lies_inside_a_branch_is_nested() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Tanh(), Plain())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    findings = surgeon.find(Outer(), X)
    assert [r.name for r in findings] == ["add"]
    assert [(r.name, r.code) for r in findings.refused] == [("body.1.add", "nested")]
    inner = surgeon.find(Outer(), X, include=["body.1.add"])
    assert [r.name for r in inner] == ["body.1.add"]


def test_masks_and_relative_biases_are_no_residuals() -> None:
    c = case("timm:swin_tiny_patch4_window7_224")
    findings = surgeon.find(c.build(), c.input())
    assert len(findings) == c.gates
    assert {r.code for r in findings.refused} <= {"bias", "nested"}
    assert not any(".attn" in r.name for r in findings)


def test_findings_print_and_iterate() -> None:
    findings = surgeon.find(nn.Sequential(Twice(), block("return self.f(x) + self.g(self.g(x))")), X)
    assert len(findings) == len(list(findings)) == 2
    text = str(findings)
    assert text.startswith("2 residual adds")
    for part in ("0.add", "0.add_1", "identity", "1 addition left alone", "fusion", REASONS["fusion"]):
        assert part in text


def test_find_reports_flops() -> None:
    """Multiply-adds by hand: a linear layer of 4 x 4 on 3 rows is 2 * 3 * 4 * 4."""
    findings = surgeon.find(Net(Plain()), X)
    assert findings.flops == 3 * 2 * 3 * 16 + 2 * 3 * 4 * 3
    assert findings.residuals[0].flops == 2 * 2 * 3 * 16
    shares = [g.flops_share for g in surgeon.status(surgeon.apply(Net(Plain()), example=X)).gates]
    assert shares == [2 * 2 * 3 * 16 / findings.flops]


def test_flops_of_a_convolutional_block() -> None:
    x = torch.zeros(2, 4, 6, 6)
    (residual,) = surgeon.find(BasicBlock(project=True), x)
    assert residual.flops == 2 * (2 * 2 * 36 * 4 * 4 * 9)  # the projection is the shortcut's


# --- include and exclude ------------------------------------------------------


def names(**choice: Any) -> list[str]:
    model = nn.Sequential(Plain(), Twice(), Plain(), block("return x + self.p(x)", p=nn.Linear(4, 4)))
    return [r.name for r in surgeon.find(model, X, **choice)]


def test_include_and_exclude_go_by_add_block_and_class() -> None:
    assert names() == ["0.add", "1.add", "1.add_1", "2.add"]
    assert names(include=["Twice"]) == ["1.add", "1.add_1"]
    assert names(include="Tw*") == ["1.add", "1.add_1"]
    assert names(include=["1"]) == ["1.add", "1.add_1"]
    assert names(include=["*.add_1", "0*"]) == ["0.add", "1.add_1"]
    assert names(exclude=["Plain"]) == ["1.add", "1.add_1"]
    assert names(exclude="1.add") == ["0.add", "1.add_1", "2.add"]
    assert names(include=["Plain"], exclude=["2"]) == ["0.add"]


def test_a_refused_addition_comes_in_by_its_name_or_code() -> None:
    assert names(include=["linear"]) == ["3.add"]
    assert names(include=["3.add"]) == ["3.add"]
    assert names(include=["3.add", "0.add"]) == ["0.add", "3.add"]
    assert names(include=["*"]) == names()  # a wildcard means the residual adds, not the refused


@pytest.mark.parametrize("pattern", ["nope", "layer9.*", "0.add_7", "plain"])
@pytest.mark.parametrize("choice", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_named(choice: str, pattern: str) -> None:
    with pytest.raises(
        UsageError, match=rf"{choice}: .*{pattern.replace('*', '[*]')}.* matches no residual add"
    ):
        names(**{choice: [pattern]})


def test_excluded_additions_are_listed_as_such() -> None:
    findings = surgeon.find(nn.Sequential(Plain(), Plain()), X, exclude=["0"])
    assert [(r.name, r.code) for r in findings.refused] == [("0.add", "excluded")]


def test_include_of_everything_excluded_has_nothing_to_gate() -> None:
    with pytest.raises(NoResidualsError):
        surgeon.apply(nn.Sequential(Plain()), exclude=["*"], example=X)


# --- find on a gated model, and examples --------------------------------------


@pytest.mark.parametrize("unit", ["batch", "sample"])
def test_find_on_a_gated_model_finds_the_same(unit: str) -> None:
    model = randomise(nn.Sequential(Plain(), Twice()))
    before = surgeon.find(model, X)
    surgeon.apply(model, unit=unit, example=X)
    assert surgeon.find(model, X) == before


def test_examples_in_every_form() -> None:
    class Two(Branch):
        def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
            return x + self.f(y) * scale

    model = Net(Plain())
    for example in (X, (X,), {"x": X}):
        assert len(surgeon.find(model, example)) == 1
    # Two inputs of which neither is computed from the other: no shortcut, also where both are one tensor.
    for other in (X, X.clone()):
        assert [r.code for r in surgeon.find(Two(), (X, other)).refused] == ["no-shortcut"]
    for bad in ([X], "x", 3):
        with pytest.raises(UsageError, match="give a tensor, a tuple of positional arguments, or a dict"):
            surgeon.find(model, bad)  # type: ignore[arg-type]


def test_one_row_is_example_enough() -> None:
    """Recording runs in training mode, where a norm over one value per channel fails."""
    model = nn.Sequential(Plain(), nn.BatchNorm1d(4))
    assert len(surgeon.find(model, torch.zeros(1, 4))) == 1
