"""Models of packages that surgeon has never heard of: transformers, diffusers, segmentation models, others.

Every model is built from a small configuration with random weights; the gates are counted by hand from it.
Nothing in surgeon knows a model by name, so what holds here holds by the shape of the graphs alone.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from blocks import Snapshot, coins, randomise, same
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import surgeon
from surgeon._gating.gated import is_gated
from surgeon._tracing.nests import tensors

RATE = 0.2


@dataclass(frozen=True)
class Package:
    """One model of another package.

    Attributes:
        library: What has to be installed.
        build: Makes the model and the example it is called with.
        gates: How many residual adds it has, by hand.
        why: The arithmetic of that number.
        own: Its own stochastic-depth modules with a rate above zero that a gate stands in for, by hand.
    """

    library: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    gates: int
    why: str
    own: int = 0


def transformers() -> Any:
    return pytest.importorskip("transformers")


def images(side: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, side, side)}


def words() -> dict[str, Any]:
    return {"input_ids": torch.arange(14).view(2, 7)}


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES = {"image_size": 32, "patch_size": 8}
STAGES = {"depths": [2, 2]}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [1, 2], "window_size": 4, **STAGES}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 16], "drop_path_rate": RATE, **STAGES}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], **STAGES}
TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    **STAGES,
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "drop_path_rate": RATE,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 10,
}


def hugging(
    model: str, given: Callable[[], dict[str, Any]], config: str = "", **options: Any
) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        package = transformers()
        settings = getattr(package, config or model.replace("Model", "Config"))(**options)
        return getattr(package, model)(settings), given()

    return build


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    package = transformers()
    encoder = package.WhisperModel(
        package.WhisperConfig(**WHISPER, decoder_layers=1, decoder_attention_heads=2)
    ).encoder
    return encoder, {"input_features": torch.randn(2, 8, 20)}


def segmentation(kind: str, encoder: str) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        package = pytest.importorskip("segmentation_models_pytorch")
        return getattr(package, kind)(encoder, encoder_weights=None), {"x": torch.randn(2, 3, 64, 64)}

    return build


def diffusing(model: str, given: Callable[[], dict[str, Any]], **options: Any) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        return getattr(pytest.importorskip("diffusers"), model)(**options), given()

    return build


def noisy(channels: int, side: int = 16, name: str = "hidden_states") -> dict[str, Any]:
    return {name: torch.randn(2, channels, side, side), "timestep": torch.tensor([3, 5])}


def x_transformer() -> tuple[nn.Module, dict[str, Any]]:
    package = pytest.importorskip("x_transformers")
    layers = package.Decoder(dim=32, depth=3, heads=4, attn_dim_head=8, rotary_pos_emb=True, use_rmsnorm=True)
    return package.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers), {
        "x": torch.arange(14).view(2, 7)
    }


def simple_vit() -> tuple[nn.Module, dict[str, Any]]:
    package = pytest.importorskip("vit_pytorch")
    size = {"image_size": 32, "patch_size": 8, "num_classes": 5}
    return package.SimpleViT(**size, dim=16, depth=3, heads=2, dim_head=8, mlp_dim=32), {
        "img": torch.randn(2, 3, 32, 32)
    }


UNET = {
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
DIFFUSION = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 8, "sample_size": 16}
TWO = "2 layers x (attention + mlp)"
# With drop_path_rate r over l layers the first layer's rate is 0, so its modules draw nothing.
CASES = {
    "ViT": Package("transformers", hugging("ViTModel", images, **SMALL, **PATCHES), 4, TWO),
    "BEiT": Package(
        "transformers", hugging("BeitModel", images, **SMALL, **PATCHES, drop_path_rate=RATE), 4, TWO, own=2
    ),
    "Swin": Package(
        "transformers",
        hugging("SwinModel", images, **WINDOWS, drop_path_rate=RATE),
        8,
        "2 stages x 2 layers x (attention + mlp); only attention has a drop path",
        own=3,
    ),
    "Swinv2": Package(
        "transformers",
        hugging("Swinv2Model", images, **WINDOWS, drop_path_rate=RATE),
        8,
        "2 stages x 2 layers x (attention + mlp)",
        own=6,
    ),
    "ConvNext": Package(
        "transformers", hugging("ConvNextModel", images, **CONVNEXT), 4, "2 stages x 2 layers x 1", own=3
    ),
    "ConvNextV2": Package(
        "transformers", hugging("ConvNextV2Model", images, **CONVNEXT), 4, "2 stages x 2 layers x 1", own=3
    ),
    "ResNet": Package(
        "transformers", hugging("ResNetModel", images, **RESNET), 4, "2 stages x 2 bottlenecks x 1"
    ),
    "RegNet": Package(
        "transformers",
        hugging("RegNetModel", images, **RESNET, groups_width=8),
        4,
        "2 stages x 2 Y layers x 1",
    ),
    "Segformer": Package(
        "transformers",
        hugging("SegformerModel", images, **SEGFORMER),
        8,
        "2 stages x 2 blocks x (attention + mix-FFN)",
        own=6,
    ),
    "Dinov2": Package(
        "transformers",
        hugging(
            "Dinov2Model",
            images,
            **{k: v for k, v in SMALL.items() if k != "intermediate_size"},
            **PATCHES,
            mlp_ratio=2,
            drop_path_rate=RATE,
        ),
        4,
        TWO,
        own=4,
    ),
    "BERT": Package("transformers", hugging("BertModel", words, **SMALL, **TEXT), 4, TWO),
    "GPT-2": Package(
        "transformers",
        hugging("GPT2Model", words, n_embd=16, n_layer=2, n_head=2, n_positions=32, **TEXT),
        4,
        TWO,
    ),
    "Whisper": Package("transformers", whisper, 4, "2 encoder layers x (attention + mlp)"),
    "Llama": Package(
        "transformers", hugging("LlamaModel", words, **SMALL, num_key_value_heads=1, **TEXT), 4, TWO
    ),
    "DINOv3": Package(
        "transformers", hugging("DINOv3ViTModel", images, **SMALL, **PATCHES, layerscale_value=0.5), 4, TWO
    ),
    "UNet2D": Package(
        "diffusers",
        diffusing("UNet2DModel", lambda: noisy(3, 32, "sample"), **UNET),
        12,
        "2 + 2 + 4 residual blocks down, between and up; 1 + 1 + 2 attentions",
    ),
    "DiT": Package(
        "diffusers",
        diffusing(
            "DiTTransformer2DModel",
            lambda: noisy(4) | {"class_labels": torch.tensor([1, 2])},
            **DIFFUSION,
            in_channels=4,
            num_embeds_ada_norm=10,
        ),
        6,
        "3 layers x (attention + mlp)",
    ),
    "SD3": Package(
        "diffusers",
        diffusing(
            "SD3Transformer2DModel",
            lambda: (
                noisy(4)
                | {"encoder_hidden_states": torch.randn(2, 7, 32), "pooled_projections": torch.randn(2, 16)}
            ),
            **DIFFUSION,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
        ),
        10,
        "3 layers x 2 streams x (attention + mlp); the text's ends before the last layer's",
    ),
    "x-transformers": Package("x-transformers", x_transformer, 6, "3 x (attention + mlp), added by a module"),
    "SimpleViT": Package("vit-pytorch", simple_vit, 6, "3 x (attention + mlp) in one module, by einops"),
    "Unet-resnet18": Package("smp", segmentation("Unet", "resnet18"), 8, "8 basic blocks, decoder by cat"),
    "FPN-resnet18": Package(
        "smp", segmentation("FPN", "resnet18"), 8, "8 basic blocks, not the lateral sums"
    ),
    "Unet-mobilenet": Package(
        "smp", segmentation("Unet", "mobilenet_v2"), 10, "10 of 17 blocks keep stride and width"
    ),
    "FPN-mobilenet": Package(
        "smp", segmentation("FPN", "mobilenet_v2"), 10, "10 of 17 blocks keep stride and width"
    ),
}


# Every model is counted by default; the rest of the tests do these by default and all of them when slow.
DEFAULT = {"BEiT", "ConvNext", "BERT", "GPT-2", "DiT", "x-transformers", "Unet-resnet18"}


@pytest.fixture(params=[pytest.param(n, marks=[] if n in DEFAULT else [pytest.mark.slow]) for n in CASES])
def case(request: pytest.FixtureRequest) -> Package:
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    """What other packages deprecate is theirs to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outputs(model: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    return [t for t in tensors(model(**given)) if t.is_floating_point()]


@pytest.mark.parametrize("name", CASES)
def test_counted_by_hand(name: str) -> None:
    """Every residual add, the stochastic depth that is already there, and nothing left unexplained."""
    case = CASES[name]
    model, given = case.build()
    found = surgeon.find(model, given)
    assert len(found) == case.gates, case.why
    taken = [name for residual in found for name in residual.replaces]
    assert len(taken) == case.own
    assert {r.code for r in found.refused} <= {
        "bias",
        "nested",
        "linear",
        "position",
        "fusion",
        "no-shortcut",
        "form",
        "gating",
        "broadcast",
    }


def test_evaluation_keeps_its_bits_and_removal_restores(case: Package) -> None:
    model, given = case.build()
    randomise(model).eval()
    with torch.no_grad():
        expected = outputs(model, given)
    before = Snapshot.of(model)
    surgeon.apply(model, example=given)
    with torch.no_grad():
        assert same(outputs(model, given), expected)
    surgeon.remove(model)
    assert before.differences(model) == []


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_a_training_step(case: Package, unit: str) -> None:
    """Finite with either unit, and every gate matters: dropped alone, the result changes."""
    model, given = case.build()
    randomise(model)
    surgeon.apply(model, schedule="uniform", drop_rate=0.5, unit=unit, example=given)
    model.train()
    loss = sum(t.float().square().mean() for t in outputs(model, given))
    loss.backward()
    assert bool(torch.isfinite(loss))
    names = [gate.name for gate in surgeon.status(model).gates]
    for module in model.modules():  # no other randomness, running statistics apart
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def forward(dropped: str) -> list[Tensor]:
        torch.manual_seed(1)
        with coins(lambda name: name != dropped), torch.no_grad():
            return outputs(model, given)

    plain = forward("")
    assert all(not same(forward(name), plain) for name in names)


def test_scales_fold(case: Package) -> None:
    """The paper's scales go into weights; the model that comes out is stock and computes the same."""
    model, given = case.build()
    randomise(model).double().eval()
    given = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, given)
    surgeon.apply(model, scaling="paper", unit="batch", example=given)
    with torch.no_grad():
        expected = outputs(model, given)
        folded = surgeon.fold(model)
        result = outputs(folded, given)
    for a, b in zip(expected, result, strict=True):
        assert float((a - b).abs().max() / a.abs().max()) < 1e-12
    assert not is_gated(folded)  # every scale found its weights


def test_a_mask_is_one_more_argument() -> None:
    model, given = CASES["BERT"].build()
    found = surgeon.find(model, given | {"attention_mask": torch.ones(2, 7, dtype=torch.long)})
    assert len(found) == 4
    # The mask, an argument now, is added inside the attention operator.
    assert {(r.block_type, r.code) for r in found.refused} == {
        ("BertEmbeddings", "bias"),
        ("BertSelfAttention", "form"),
    }


# The shapes behind them, without the packages.


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Cache:
    """What a block keeps between calls, in an object of its caller's."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.seen.append(x)
        return self.f(torch.cat(cache.seen)).tanh()[-len(x) :]


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return x + self.attend(x, cache)


def test_an_object_among_the_arguments_is_copied() -> None:
    cache, block, earlier = Cache(), Remembering(), torch.randn(1, 4)
    cache.seen.append(earlier)
    found = surgeon.find(block, (X, cache))
    assert len(found) == 1
    assert len(cache.seen) == 1 and cache.seen[0] is earlier
