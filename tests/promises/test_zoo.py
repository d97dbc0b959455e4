"""A representative of every model module of timm and of every family of torchvision, and its own gates.

The oracle is the libraries' own stochastic depth: every live site with a shortcut must carry a gate, every
site without one is listed here by name, and no block is left untraced. Models are built on the meta device.
"""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from blocks import coins, randomise
from torch import Tensor, nn

import surgeon
from benchmarks._zoo_models import Entry, build, example
from benchmarks._zoo_structure import recall
from surgeon._finding.analysis import analyse
from surgeon._gating.gated import placed_gates
from surgeon._tracing.example import inputs

# The smallest model of each of timm's model modules.
TIMM: dict[str, str] = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "ens_adv_inception_resnet_v2",
    "inception_v3": "adv_inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmixer_12_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "jx_nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_xs_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2net50_14w_8s",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}

# One model of each family of torchvision.
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"),
    *("resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11"),
    *("vit_b_16", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"),
    *("raft_small", "mc3_18", "r2plus1d_18", "r3d_18", "mvit_v1_b", "s3d", "swin3d_t"),
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn"),
    *("quantized_mobilenet_v2", "quantized_resnet18", "quantized_shufflenet_v2_x0_5"),
)

# Models without a residual add: plain chains, or concatenation.
NONE: set[str] = {
    *("alexnet", "densenet121", "googlenet", "inception_v3", "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11"),
    *("s3d", "quantized_shufflenet_v2_x0_5", "adv_inception_v3", "ese_vovnet19b_slim_dw", "inception_v4"),
    *("nasnetalarge", "pnasnet5large", "rdnet_tiny", "selecsls42"),
}

# Sites with no shortcut beside them. ResNeSt drops the input of its downsampling shortcut, not its branch.
WITHOUT_SHORTCUT = {"ese_vovnet19b_slim_dw": 3, "mobilevit_xxs": 4, "rdnet_tiny": 20, "resnest14d": 3}

FAST = {
    *("test_byobnet", "test_mambaout", "test_nfnet", "test_resnet", "test_vit", "test_vit_relpos"),
    *("fasternet_t0", "mobilenetv2_035", "resnet18", "convnext_tiny", "mobilenet_v3_small", "alexnet"),
}


def cases() -> list[Any]:
    named = [Entry("timm", name) for name in TIMM.values()] + [Entry("torchvision", n) for n in TORCHVISION]
    return [pytest.param(e, id=str(e), marks=[] if e.name in FAST else [pytest.mark.zoo]) for e in named]


@pytest.mark.parametrize("entry", cases())
def test_every_family(entry: Entry) -> None:
    model = build(entry, device="meta")
    given = example(entry, model, "meta")
    if given is not None and "detection" in type(model).__module__:  # shapes that depend on values
        model = build(entry, device="cpu")
        given = example(entry, model, "cpu")
    analysis = analyse(model, *inputs(model, given))
    found = analysis.findings
    assert (len(found) == 0) == (entry.name in NONE)
    assert [r for r in found.refused if r.code == "untraceable"] == []
    own = recall(model, analysis)
    assert len(own["missed"]) == WITHOUT_SHORTCUT.get(entry.name, 0), own["missed"]
    assert own["recalled"] == own["own_live"] - len(own["missed"])


def test_every_module_of_timm_has_a_representative() -> None:
    modules = {
        timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()
    }
    assert modules == set(TIMM)


def made(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet": made("resnet10t"),
    "resnetv2": made("resnetv2_18"),
    "nfnet": made("nf_resnet26"),
    "regnet": made("regnetx_002"),
    "mobilenet": made("mobilenetv3_small_050"),
    "ghostnet": made("ghostnet_050"),
    "rexnet": made("rexnetr_100"),
    "convnext": made("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
    "vit": made("vit_tiny_patch16_224", **VIT),
    "beit": made("beit_base_patch16_224", **VIT),
    "cait": made("cait_xxs24_224", img_size=32, depth=2, embed_dim=24, num_heads=2),
    "mixer": made("mixer_s32_224", img_size=64),
    "resmlp": made("resmlp_12_224", img_size=32),
    "poolformer": made("poolformer_s12"),
    "swin": made("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), num_heads=(1, 2), embed_dim=8),
}


SIDES = {"swin": 56, "vit": 32, "beit": 32, "cait": 32, "resmlp": 32}
SLOW = {"nfnet", "ghostnet", "rexnet", "resnetv2", "regnet", "mixer", "resmlp", "poolformer"}


class Entrance:
    """Cuts the graph at a block's arguments and keeps what it got, so that a gradient arrives there."""

    def __init__(self, block: nn.Module) -> None:
        self.seen: list[list[Tensor]] = []
        self.handle = block.register_forward_pre_hook(self.enter)

    def enter(self, _block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        cut = [a.detach().requires_grad_() for a in args]
        self.seen.append(cut)
        return tuple(a * 1 for a in cut)  # the block may write to its argument


def arrives(x: Tensor) -> bool:
    return x.grad is not None and bool(x.grad.any())


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] if f in SLOW else []) for f in SMALL]
)
def test_no_drop_loses_the_input_of_its_block(family: str) -> None:
    """With its branch dropped and every other one kept, the output has a gradient at the block's input."""
    model = randomise(SMALL[family]())
    side = SIDES.get(family, 64)
    x = torch.randn(2, 3, side, side)
    surgeon.apply(model, unit="batch", example=x)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # over two values its gradient is zero
    checked = 0
    for placed in placed_gates(model):
        entrance = Entrance(placed.block)
        with coins(lambda name, dropped=placed.name: name != dropped) as tossed:
            model(x).square().sum().backward()
        entrance.handle.remove()
        assert placed.name in tossed
        assert entrance.seen
        assert all(any(map(arrives, seen)) for seen in entrance.seen), placed.name
        checked += 1
    assert checked == len(surgeon.status(model).gates) > 0


def test_the_gradient_test_can_fail() -> None:
    """Negative control: a block whose drop loses everything has no gradient at its input."""

    class Lost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) * 0

    block, x = Lost(), torch.randn(2, 4)
    entrance = Entrance(block)
    block(x).sum().backward()
    assert not arrives(entrance.seen[0][0])
