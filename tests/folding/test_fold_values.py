"""Folds of models whose forward looks at values: language models with a mask, detectors."""

import copy
import warnings

import pytest
import torch
import torchvision
from blocks import Of
from torch import Tensor, nn

import surgeon
from surgeon._gating.decided import Scaling
from surgeon._gating.gated import gates_of


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_bert_with_a_mask(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    make = transformers.BertForSequenceClassification
    model = make._from_config(config, attn_implementation=attention).double().eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    given = {"input_ids": torch.randint(0, 50, (2, 9)), "attention_mask": mask}
    plain = model(**given).logits
    surgeon.apply(model, scaling="paper", example=given)
    expected = model(**given).logits
    assert largest(plain, expected) > 1e-3
    folded = surgeon.fold(model)
    assert len(gates_of(model)) == 4
    assert not gates_of(folded)
    assert largest(folded(**given).logits, expected) < 1e-13
    surgeon.remove(model)
    surgeon.apply(model, scaling="paper", keep_eval=True, example=given)
    assert largest(model(**given).logits, plain) < 1e-13


class Keeping(nn.Module):
    """A layer that keeps what it computed in its last evaluation, in a table and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.last: Tensor | None = None
        self.table: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        out = x.tanh() + self.bias
        if not self.training:
            self.last, self.table["bias"] = out, [self.bias * 2]
        return out


@pytest.mark.parametrize("scaling", ["paper", "inverted"])
def test_what_an_evaluation_left_with_its_gradients_does_not_hinder_the_copy(scaling: Scaling) -> None:
    x, layer = torch.randn(3, 4), Keeping()
    block = Of(lambda held, x: x + held.f(x), f=nn.Sequential(layer, nn.Linear(4, 4)))
    model = surgeon.apply(nn.Sequential(block), scaling=scaling, example=x).eval()
    expected = model(x)
    folded = surgeon.fold(model)
    (twin,) = (module for module in folded.modules() if isinstance(module, Keeping))
    assert layer.last is not None and twin.last is not None
    assert layer.last.grad_fn is not None and twin.last.grad_fn is None
    assert torch.equal(twin.last, layer.last)
    assert torch.equal(twin.table["bias"][0], layer.bias * 2)
    torch.testing.assert_close(folded(x), expected)


@pytest.mark.slow
@torch.no_grad()
def test_a_detector() -> None:
    """Where boxes are suppressed, values decide shapes: it runs on real tensors, copies of its own."""
    torch.manual_seed(0)
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
    x = [torch.rand(3, 96, 96)]
    surgeon.apply(model.eval(), scaling="paper", example=(x,))
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = surgeon.fold(model, example=(x,))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, value in model.backbone(x[0][None]).items():
        assert largest(folded.backbone(x[0][None])[name], value) < 1e-5
        damaged = surgeon.remove(copy.deepcopy(model)).backbone(x[0][None])[name]
        assert largest(damaged, value) > 1e-4
