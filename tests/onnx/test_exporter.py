"""What PyTorch's exporter makes of unusual models: caches, nested outputs, attention, bounds, refusals."""

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from surgeon._onnx import exporter
from surgeon._onnx.export import export
from surgeon.errors import ExportError

pytestmark = pytest.mark.usefixtures("one_registry")


def run(path, x):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})[0])


class Biased(nn.Module):
    """As LeViT: a table of biases made from a parameter in evaluation, and kept."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.attention_bias_cache = {}

    def forward(self, x):
        if self.training:
            return x + self.bias
        if "cpu" not in self.attention_bias_cache:
            self.attention_bias_cache["cpu"] = self.bias * 2
        return x + self.attention_bias_cache["cpu"]


def test_stale_cache_is_left_out(tmp_path):
    model = Biased().eval()
    model(torch.zeros(2, 4))
    kept = model.attention_bias_cache["cpu"]
    with torch.no_grad():
        model.bias.fill_(1.0)
    export(model, tmp_path / "m.onnx", example=torch.zeros(2, 4))
    assert torch.equal(run(tmp_path / "m.onnx", torch.zeros(1, 4)), torch.full((1, 4), 2.0))
    assert model.attention_bias_cache["cpu"] is kept


@dataclasses.dataclass
class Outputs:
    scores: torch.Tensor
    nothing: None
    parts: list


class Several(nn.Module):
    def forward(self, image, *, token, scale=2.0):
        pooled = image.mean((2, 3)) * scale
        return {"out": Outputs(pooled, None, [pooled + token, token * 2]), "aux": pooled - 1}


def test_arguments_and_outputs_in_any_nest(tmp_path):
    example = {"token": torch.tensor([[1], [7]]), "image": torch.zeros(2, 3, 4, 4), "scale": 3.0}
    report = export(Several(), tmp_path / "m.onnx", example=example)
    assert set(report.inputs) == {"token", "image"}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [out.name for out in session.get_outputs()] == ["out_scores", "out_parts_0", "out_parts_1", "aux"]
    image, token = torch.randn(3, 3, 4, 4), torch.tensor([[5], [6], [7]])
    out = session.run(None, {"image": image.numpy(), "token": token.numpy()})
    assert np.allclose(out[0], image.mean((2, 3)) * 3, atol=1e-6)
    assert np.array_equal(out[2], token * 2)


def test_attention_with_a_bias(tmp_path):
    small = {"depth": 1, "embed_dim": 8, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 3}
    model = timm.create_model("beit_base_patch16_224", **small)
    report = export(model, tmp_path / "m.onnx", example=torch.zeros(1, 3, 16, 16))
    assert report.inputs["input"][0] == "batch"
    assert all(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(4, 4))


@pytest.mark.slow
def test_attention_of_torch_itself(tmp_path):
    assert export(Attention(), tmp_path / "m.onnx", example=torch.zeros(2, 2, 4, 4)).parity.ok


class Clipped(nn.Module):
    """One value between three pairs of bounds, as in front of the projections of an attention."""

    def __init__(self):
        super().__init__()
        for name, bound in zip("abc", (0.1, 0.5, 2.0), strict=True):
            self.register_buffer(name, torch.tensor(bound))
        self.register_buffer("none", torch.tensor(float("inf")))

    def forward(self, x):
        x = x * 3
        return x.clamp(-self.a, self.a) + x.clamp(-self.b, self.b) * 7 + x.clamp(-self.c, self.none)


def test_several_clips_of_one_value_keep_their_bounds(tmp_path):
    """The exporter's rewriter gives their bounds one name and forgets all but the last."""
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    report = export(Clipped(), tmp_path / "m.onnx", example=torch.zeros(2, 4))
    assert report.nodes["Clip"] == 3
    assert torch.allclose(run(tmp_path / "m.onnx", x), Clipped()(x))


def test_lost_constants_are_put_back_under_names_of_their_own():
    """As the rewriter leaves them, whatever later versions do: one name, and one of three in the graph."""
    x = ir.val("x", ir.DataType.FLOAT, [2])
    bounds = [ir.val("x_max", const_value=ir.tensor(np.float32(bound))) for bound in (1, 2, 3)]
    nodes = [ir.node("Min", [x, bound]) for bound in bounds]
    graph = ir.Graph([x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=bounds[:1])
    exporter._adopt(ir.Model(graph, ir_version=10))
    assert [graph.initializers[bound.name] is bound for bound in bounds] == [True] * 3
    assert len(graph.initializers) == 3 and list(graph.inputs) == [x]


class Sided(nn.Module):
    """Another layer for large inputs."""

    def __init__(self, dimension):
        super().__init__()
        self.dimension = dimension
        self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.small(x) if x.shape[self.dimension] <= 20 else self.large(x)


@pytest.mark.parametrize(("dimension", "axis"), [(0, "batch"), (3, "width")])
def test_a_graph_that_holds_up_to_some_size_is_refused(dimension, axis, tmp_path):
    size = {"dynamic_size": dimension > 0}
    with pytest.raises(
        ExportError, match=rf"fails or does something else where {axis} is above 20; pass dynamic_"
    ):
        export(Sided(dimension), tmp_path / "m.onnx", example=torch.zeros(2, 3, 8, 8), **size)
    assert list(tmp_path.iterdir()) == []
    report = export(Sided(1), tmp_path / "m.onnx", example=torch.zeros(2, 3, 8, 8), dynamic_size=True)
    assert report.inputs["input"] == ("batch", 3, "height", "width")


@pytest.mark.slow
def test_opset_that_cannot_be_reached(tmp_path):
    model = nn.Sequential(nn.LayerNorm(4), nn.GELU())
    with pytest.raises(
        ExportError, match="Sequential cannot be written in opset 13: the exporter made opset 18"
    ):
        export(model, tmp_path / "m.onnx", example=torch.zeros(2, 4), opset=13)
    assert list(tmp_path.iterdir()) == []


class Fixed(nn.Module):
    def forward(self, x):
        return x + torch.arange(2.0)[:, None]


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Fixed(), r"Fixed .*batch.*dynamic_batch=False \(--static-batch\)"),
        (
            Noisy(),
            "graph of Noisy does not only evaluate, it holds 1 of .*RandomUniform.*draws random numbers",
        ),
    ],
)
def test_models_that_cannot_be_plain_graphs(model, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "m.onnx", example=torch.zeros(2, 4))
    assert list(tmp_path.iterdir()) == []
