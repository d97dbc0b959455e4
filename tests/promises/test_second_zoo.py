"""A second zoo: forty models of packages that no other test uses, with their residual adds counted by hand.

Segmentation, super-resolution, graphs, tables, operators between functions, time series, sound. Each is small
and has random weights. `gates` is what was counted in the source of its package, `why` how; where surgeon
finds another number, `found` says which and `MISSES` why.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon._torch import pytree

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]  # other people's deprecations

Call = tuple[Any, ...]
HERE = __name__


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        module: Where its class is; its first part is the package that has to be installed.
        name: Of the class or function.
        options: What it is made with.
        example: The arguments of one call.
        gates: How many residual adds it has, by hand.
        why: The arithmetic of that number.
        found: How many surgeon finds, where that is another number.
    """

    module: str
    name: str
    options: Callable[[], dict[str, Any]]
    example: Callable[[], Call]
    gates: int
    why: str
    found: int | None = None

    def build(self) -> nn.Module:
        package = "torch_geometric" if self.module == HERE else self.module.partition(".")[0]
        pytest.importorskip(package, exc_type=ImportError)
        made: nn.Module = getattr(importlib.import_module(self.module), self.name)(**self.options())
        for parameter in made.parameters():  # zeros hide a branch, and some wait for a checkpoint
            if not parameter.any() or not parameter.detach().abs().max() < 100:
                nn.init.normal_(parameter, 0.0, 0.1)
        return made


def image(channels: int = 3, side: int = 32) -> Callable[[], Call]:
    return lambda: (torch.randn(2, channels, side, side),)


def tokens(length: int = 8, dim: int = 16) -> Callable[[], Call]:
    return lambda: (torch.randn(2, length, dim),)


def words(length: int = 8) -> Callable[[], Call]:
    return lambda: (torch.arange(2 * length).view(2, length),)


def monai(
    name: str, example: Callable[[], Call], gates: int, why: str, found: int | None = None, **options: Any
) -> Model:
    return Model(
        "monai.networks.nets", name, lambda: {"spatial_dims": 2, **options}, example, gates, why, found
    )


def finer(
    name: str, gates: int, why: str, found: int | None = None, *, side: int = 16, at: str = "", **options: Any
) -> Model:
    """An architecture for super-resolution or denoising."""
    return Model(
        f"spandrel.architectures.{at or name}", name, lambda: options, image(3, side), gates, why, found
    )


def of(
    module: str,
    name: str,
    example: Callable[[], Call],
    gates: int,
    why: str,
    found: int | None = None,
    **options: Any,
) -> Model:
    return Model(module, name, lambda: options, example, gates, why, found)


def nnunet() -> dict[str, Any]:
    sizes = {"n_stages": 3, "features_per_stage": (8, 16, 16), "kernel_sizes": 3, "strides": (1, 2, 2)}
    kinds = {"conv_op": nn.Conv2d, "norm_op": nn.InstanceNorm2d, "nonlin": nn.LeakyReLU, "conv_bias": True}
    counts = {"n_blocks_per_stage": (1, 2, 2), "n_conv_per_stage_decoder": (1, 1), "num_classes": 2}
    return {"input_channels": 1, **sizes, **kinds, **counts}


class Deep(nn.Module):
    """DeeperGCN's layers as in the example of PyG: norm, activation, convolution, sum."""

    def __init__(self) -> None:
        super().__init__()
        pyg = importlib.import_module("torch_geometric.nn")
        self.layers = nn.ModuleList(
            pyg.DeepGCNLayer(pyg.GENConv(8, 8), nn.LayerNorm(8), nn.ReLU(), block="res+") for _ in range(3)
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x, edges)
        return x


class General(nn.Module):
    """GraphGPS: two layers of messages beside attention."""

    def __init__(self) -> None:
        super().__init__()
        pyg = importlib.import_module("torch_geometric.nn")
        mlp = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)]
        self.layers = nn.ModuleList(pyg.GPSConv(8, pyg.GINConv(one), heads=2) for one in mlp)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x, edges)
        return x


class Edges(nn.Module):
    """A given graph, for SchNet: its edges and their lengths."""

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        edges = graph()[1]
        return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1)


def graph() -> Call:
    return torch.randn(6, 8), torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


def table() -> Call:
    return torch.randn(4, 3), torch.tensor([[0, 1], [1, 2], [0, 0], [1, 1]])


SWIN = {
    "img_size": 16,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "window_size": 4,
    "mlp_ratio": 2,
}
CARDS = {"cat_cardinalities": [2, 3]}
MODELS: dict[str, Model] = {
    # Segmentation and generation of medical images.
    "monai UNet": monai(
        "UNet",
        image(1),
        5,
        "3 units down, 2 up; of the last up the branch is a convolution alone",
        4,
        in_channels=1,
        out_channels=2,
        channels=(4, 8, 16),
        strides=(2, 2),
        num_res_units=2,
    ),
    "monai SegResNet": monai(
        "SegResNet",
        image(1),
        4,
        "1 + 2 down, 1 up; sums of encoder and decoder are none",
        init_filters=8,
        blocks_down=(1, 2),
        blocks_up=(1,),
    ),
    "monai VNet": monai("VNet", image(1), 9, "4 down, 4 up, and the repeated input beside a convolution", 8),
    "monai UNETR": monai(
        "UNETR",
        image(1),
        32,
        "12 layers of 2; units: 1 + 2 + 1 of the encoder, 4 of the decoder",
        in_channels=1,
        out_channels=2,
        img_size=32,
        feature_size=4,
        hidden_size=16,
        mlp_dim=32,
        num_heads=2,
    ),
    "monai SwinUNETR": monai(
        "SwinUNETR",
        image(1, 64),
        26,
        "8 blocks of 2; units: 5 of the encoder, 5 of the decoder",
        in_channels=1,
        out_channels=2,
        feature_size=12,
    ),
    "monai HighResNet": monai("HighResNet", image(1), 9, "3 blocks at each of 3 dilations"),
    "monai resnet10": monai("resnet10", image(3, 224), 4, "4 stages of 1", n_input_channels=3),
    "monai MedNeXt": monai(
        "MedNeXt",
        image(1),
        17,
        "9 blocks, 4 that go down, 4 that go up",
        init_filters=8,
        blocks_down=(1,) * 4,
        blocks_bottleneck=1,
        blocks_up=(1,) * 4,
        use_residual_connection=True,
    ),
    "monai Restormer": of(
        "monai.networks.nets.restormer",
        "Restormer",
        image(1),
        16,
        "8 blocks of 2",
        in_channels=1,
        out_channels=1,
        dim=8,
        num_refinement_blocks=1,
    ),
    "monai AutoencoderKL": monai(
        "AutoencoderKL",
        image(1),
        12,
        "encoder 2 + 1 + 3, decoder 3 + 2 + 1",
        channels=(8, 8),
        num_res_blocks=(1, 1),
        attention_levels=(False, True),
        norm_num_groups=4,
    ),
    "nnU-Net ResidualEncoderUNet": Model(
        "dynamic_network_architectures.architectures.unet",
        "ResidualEncoderUNet",
        nnunet,
        image(1),
        5,
        "1 + 2 + 2",
    ),
    "denoising_diffusion Unet": of(
        "denoising_diffusion_pytorch",
        "Unet",
        lambda: (torch.randn(2, 3, 16, 16), torch.tensor([1, 2])),
        16,
        "2 levels of 2 + 1 down and up, 3 in the middle, 1 at the end",
        dim=8,
        dim_mults=(1, 2),
    ),
    # Super-resolution and restoration of photographs.
    "SwinIR": finer(
        "SwinIR",
        8,
        "4 blocks of 2; groups and the body skip over them",
        **SWIN,
        upscale=2,
        upsampler="pixelshuffledirect",
    ),
    "Swin2SR": finer(
        "Swin2SR",
        8,
        "4 blocks of 2; groups and the body skip over them",
        **SWIN,
        upscale=2,
        upsampler="pixelshuffledirect",
    ),
    "HAT": finer(
        "HAT",
        16,
        "4 blocks of 3 (attention, convolution, MLP), 2 overlapping ones of 2",
        **SWIN,
        upscale=2,
        upsampler="pixelshuffle",
        num_feat=8,
        squeeze_factor=4,
    ),
    "DAT": finer(
        "DAT",
        8,
        "4 blocks of 2",
        img_size=16,
        embed_dim=16,
        split_size=[4, 4],
        depth=[2, 2],
        num_heads=[2, 2],
        upscale=2,
    ),
    "NAFNet": finer(
        "NAFNet", 10, "5 blocks of 2", width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]
    ),
    "SAFMN": finer("SAFMN", 4, "2 blocks of 2", dim=8, n_blocks=2, upscaling_factor=2),
    "RCAN": finer(
        "RCAN",
        4,
        "2 groups of 2; groups and the body skip over them",
        scale=2,
        n_resgroups=2,
        n_resblocks=2,
        n_feats=8,
        reduction=4,
    ),
    "SCUNet": finer(
        "SCUNet", 7, "7 blocks, each around the sums of its two halves", 7, side=64, config=[1] * 7, dim=64
    ),
    "DRUNet": finer("DRUNet", 7, "3 down, 1 at the bottom, 3 up", in_nc=3, nc=[8, 8, 16, 16], nb=1),
    "RRDBNet": finer(
        "RRDBNet",
        6,
        "2 blocks of 3 dense ones; blocks and the body skip over them",
        at="ESRGAN.__arch.RRDB",
        in_nc=3,
        out_nc=3,
        num_filters=8,
        num_blocks=2,
        scale=2,
    ),
    "PLKSR": finer("PLKSR", 2, "2 blocks", dim=8, n_blocks=2, upscaling_factor=2),
    # Graphs.
    "PyG DeepGCNLayer": Model(HERE, "Deep", dict, graph, 3, "3 layers"),
    "PyG GPSConv": Model(HERE, "General", dict, graph, 6, "2 layers of 3: messages, attention, MLP", 0),
    "PyG SchNet": Model(
        "torch_geometric.nn",
        "SchNet",
        lambda: {"hidden_channels": 8, "num_filters": 8, "num_interactions": 2, "interaction_graph": Edges()},
        lambda: (torch.tensor([1, 6, 6, 8, 1, 1]), torch.randn(6, 3)),
        2,
        "2 interactions",
        0,
    ),
    "PyG GraphSAGE": of(
        "torch_geometric.nn",
        "GraphSAGE",
        graph,
        0,
        "a node beside its neighbours: sums of linear paths",
        2,
        in_channels=8,
        hidden_channels=8,
        num_layers=2,
    ),
    "EGNN": of(
        "egnn_pytorch",
        "EGNN",
        lambda: (torch.randn(2, 5, 8), torch.randn(2, 5, 3)),
        2,
        "features, coordinates",
        dim=8,
    ),
    # Tables.
    "rtdl ResNet": of(
        "rtdl_revisiting_models",
        "ResNet",
        lambda: (torch.randn(4, 3),),
        2,
        "2 blocks",
        d_in=3,
        d_out=1,
        n_blocks=2,
        d_block=8,
        d_hidden_multiplier=2,
        d_hidden=None,
        dropout1=0.1,
        dropout2=0.0,
    ),
    "rtdl FTTransformer": of(
        "rtdl_revisiting_models",
        "FTTransformer",
        table,
        4,
        "2 blocks of 2",
        n_cont_features=3,
        **CARDS,
        d_out=1,
        n_blocks=2,
        d_block=8,
        attention_n_heads=2,
        attention_dropout=0.1,
        ffn_d_hidden=None,
        ffn_d_hidden_multiplier=2,
        ffn_dropout=0.1,
        residual_dropout=0.0,
    ),
    "TabNet": of(
        "pytorch_tabnet.tab_network",
        "TabNet",
        lambda: (torch.randn(8, 4),),
        12,
        "4 transformers of 1 shared and 2 own GLU layers with a sum",
        2,
        input_dim=4,
        output_dim=2,
        group_attention_matrix=torch.eye(4),
    ),
    "TabM": of(
        "tabm",
        "TabM",
        table,
        0,
        "an MLP",
        n_num_features=3,
        **CARDS,
        d_out=1,
        n_blocks=2,
        d_block=8,
        dropout=0.1,
        k=2,
        start_scaling_init="normal",
    ),
    "TabTransformer": of(
        "tab_transformer_pytorch",
        "TabTransformer",
        lambda: table()[::-1],
        4,
        "2 layers of 2",
        2,
        categories=(3, 4),
        num_continuous=3,
        dim=8,
        depth=2,
        heads=2,
        num_residual_streams=1,
        mlp_act=nn.ReLU(),
    ),
    # Operators between functions.
    "FNO in 1-D": of(
        "neuralop.models",
        "FNO",
        lambda: (torch.randn(2, 3, 16),),
        1,
        "one module that both layers call, around the sum inside",
        n_modes=(4,),
        in_channels=3,
        out_channels=1,
        hidden_channels=8,
        n_layers=2,
    ),
    "FNO": of(
        "neuralop.models",
        "FNO",
        image(3, 16),
        1,
        "one module that both layers call, around the sum inside",
        n_modes=(4, 4),
        in_channels=3,
        out_channels=1,
        hidden_channels=8,
        n_layers=2,
    ),
    "UNO": of(
        "neuralop.models",
        "UNO",
        image(3, 16),
        3,
        "3 blocks, each around the sum inside",
        channel_mlp_skip="linear",
        in_channels=3,
        out_channels=1,
        hidden_channels=8,
        n_layers=3,
        uno_out_channels=[8] * 3,
        uno_n_modes=[[4, 4]] * 3,
        uno_scalings=[[1, 1]] * 3,
    ),
    # Time series.
    "TSMixer": of(
        "torchtsmixer",
        "TSMixer",
        tokens(8, 4),
        2,
        "one mixer layer between 2 sizes: along time, along features",
        sequence_length=8,
        prediction_length=4,
        input_channels=4,
    ),
    "TCN": of(
        "pytorch_tcn",
        "TCN",
        lambda: (torch.randn(2, 3, 16),),
        3,
        "3 blocks",
        num_inputs=3,
        num_channels=[8, 8, 8],
    ),
    "iTransformer": of(
        "iTransformer",
        "iTransformer",
        tokens(16, 3),
        4,
        "2 layers of 2",
        2,
        num_variates=3,
        lookback_len=16,
        depth=2,
        dim=16,
        pred_length=4,
        dim_head=8,
        heads=2,
        num_residual_streams=1,
    ),
    # Sound.
    "Conformer": of(
        "conformer", "Conformer", tokens(), 8, "2 blocks of 4", dim=16, depth=2, dim_head=8, heads=2
    ),
    "Whisper": Model(
        "whisper.model",
        "Whisper",
        lambda: {
            "dims": importlib.import_module("whisper.model").ModelDimensions(
                8, 10, 16, 2, 1, 20, 10, 16, 2, 1
            )
        },
        lambda: (torch.randn(2, 8, 20), torch.arange(14).view(2, 7)),
        5,
        "a layer of 2 in the encoder, one of 3 in the decoder",
    ),
    # Images and language once more.
    "pytorchcv resnet10": of("pytorchcv.models.resnet", "resnet10", image(3, 224), 4, "4 stages of 1"),
    "pytorchcv preresnet10": of(
        "pytorchcv.models.preresnet", "preresnet10", image(3, 224), 4, "4 stages of 1"
    ),
    "pytorchcv seresnet10": of("pytorchcv.models.seresnet", "seresnet10", image(3, 224), 4, "4 stages of 1"),
    "pytorchcv mobilenetv2_wd4": of(
        "pytorchcv.models.mobilenetv2",
        "mobilenetv2_wd4",
        image(3, 224),
        10,
        "1 + 2 + 3 + 2 + 2: the first of a stage changes its size",
    ),
    "open_clip VisionTransformer": of(
        "open_clip.transformer",
        "VisionTransformer",
        image(),
        4,
        "2 layers of 2",
        image_size=32,
        patch_size=8,
        width=32,
        layers=2,
        heads=2,
        mlp_ratio=2.0,
        output_dim=16,
    ),
    "open_clip TextTransformer": of(
        "open_clip.transformer",
        "TextTransformer",
        words(),
        4,
        "2 layers of 2",
        context_length=8,
        vocab_size=50,
        width=32,
        layers=2,
        heads=2,
        output_dim=16,
    ),
    "kornia VisionTransformer": of(
        "kornia.models.vit",
        "VisionTransformer",
        image(),
        4,
        "2 layers of 2",
        image_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
    ),
    "Performer": of(
        "performer_pytorch", "Performer", tokens(), 4, "2 layers of 2", dim=16, depth=2, heads=2, dim_head=8
    ),
    "Linformer": of(
        "linformer", "Linformer", tokens(), 4, "2 layers of 2", dim=16, seq_len=8, depth=2, heads=2, k=4
    ),
    "gMLPVision": of(
        "g_mlp_pytorch",
        "gMLPVision",
        image(3, 16),
        2,
        "2 blocks",
        image_size=16,
        patch_size=4,
        num_classes=2,
        dim=16,
        depth=2,
    ),
    "MLPMixer": of(
        "mlp_mixer_pytorch",
        "MLPMixer",
        image(3, 16),
        4,
        "2 layers of 2",
        image_size=16,
        channels=3,
        patch_size=4,
        dim=16,
        depth=2,
        num_classes=2,
    ),
    "Perceiver": of(
        "perceiver_pytorch",
        "Perceiver",
        lambda: (torch.randn(2, 8, 8, 3),),
        8,
        "2 layers of 4",
        num_freq_bands=2,
        depth=2,
        max_freq=10.0,
        input_channels=3,
        input_axis=2,
        num_latents=4,
        latent_dim=16,
        cross_heads=1,
        latent_heads=2,
        cross_dim_head=8,
        latent_dim_head=8,
        num_classes=2,
        self_per_cross_attn=1,
    ),
}

# Where surgeon finds another number than was counted, and why.
MISSES = {
    "monai UNet": "an identity beside one convolution without an activation: a reparametrisation",
    "monai VNet": "the repeated input beside one convolution with its norm: likewise",
    "SCUNet": "of the 7 one is the sum around the bottom block, which is gated in that block's place",
    "PyG GPSConv": "what it spreads over a dense batch has a size that values decide, so it has no trace",
    "PyG SchNet": "the model's own forward reads how many graphs there are from a tensor, so it has no trace",
    "PyG GraphSAGE": "a mean over neighbours divides by their number, which depends on an input",
    "TabNet": "its blocks call torch.FloatTensor and have no trace; two sums of its steps' results are gated",
    "TabTransformer": "as iTransformer",
    "iTransformer": "its attention gives a tuple, which its caller flattens as a pytree: no trace",
}


def test_every_miss_has_its_reason() -> None:
    assert {name for name, one in MODELS.items() if one.found is not None} == set(MISSES)
    assert len(MODELS) >= 40


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_no_other_test_knows(name: str) -> None:
    """The gates are those counted, evaluation sees them, a fold keeps that, `remove` takes them out."""
    torch.manual_seed(0)
    one = MODELS[name]
    model, example = one.build().eval(), one.example()
    gates = one.gates if one.found is None else one.found
    assert len(surgeon.find(model, example=example)) == gates
    if not gates:
        return
    with torch.no_grad():
        before = run(model, example)
        surgeon.apply(model, "uniform", drop_rate=0.2, scaling="paper", example=example)
        gated = run(model, example)
        assert any(not torch.equal(a, b) for a, b in zip(before, gated, strict=True)), "the gates are there"
        folded = run(surgeon.fold(copy.deepcopy(model), example=example), example)
        surgeon.remove(model)
        after = run(model, example)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gated, folded, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def run(model: nn.Module, example: Call) -> list[Tensor]:
    """Its outputs, with the same draws and inputs each time."""
    torch.manual_seed(1)
    example = copy.deepcopy(example)  # some write to it
    return [t for t in pytree.tree_leaves(model(*example)) if isinstance(t, Tensor) and t.is_floating_point()]
