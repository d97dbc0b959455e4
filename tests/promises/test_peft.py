"""Networks with adapters of peft: gates go around them and scales into them, whichever comes first."""

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from blocks import coins
from torch import Tensor, nn

import surgeon

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:the model has adapters of PEFT")
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def small() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL)


def adapted(model: nn.Module | None = None) -> Any:
    """A ViT of two blocks with LoRA on all linear layers, no weight at its initial value."""
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(model or small(), config).double()
    for parameter in wrapped.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return wrapped.eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IMAGES)
    return result


def test_no_adapter_is_taken_for_a_branch() -> None:
    """2 blocks x (attention + mlp); 2 x 4 sums of adapters inside, one in the patch embedding."""
    found = surgeon.find(adapted(), IMAGES)
    assert [r.name.rpartition("blocks.")[2] for r in found] == ["0.add", "0.add_1", "1.add", "1.add_1"]
    codes = Counter(r.code for r in found.refused)
    assert (codes["nested"], codes["linear"]) == (8, 1)


def test_a_step_trains_the_adapters_of_branches_that_ran() -> None:
    model = adapted()
    surgeon.apply(model, unit="batch", example=IMAGES)
    model.train()
    with coins(lambda name: name.endswith("0.add")):
        model(IMAGES).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    adapters = {name for name, p in model.named_parameters() if p.requires_grad and "lora" in name}
    ran = {name for name in adapters if "blocks." not in name or "blocks.0.attn." in name}
    assert trained & adapters == ran and len(ran) == 6
    assert not any("base_layer" in name for name in trained)


def test_an_adapter_switched_off_after_surgery_is_off() -> None:
    model = adapted()
    with model.disable_adapter():
        expected = output(model)
    assert not torch.equal(expected, output(model))
    surgeon.apply(model, unit="batch", scaling="paper", example=IMAGES)
    with coins(True):
        output(model.train())  # with adapters first: what was traced for them must not be used without
        with model.disable_adapter():
            assert torch.equal(output(model), expected)


def test_adapters_may_come_after_the_gates() -> None:
    expected = output(adapted().train())
    gated = small()
    surgeon.apply(gated, unit="batch", scaling="paper", example=IMAGES.float())
    with coins(True):
        gated.train()(IMAGES.float())
        both = adapted(gated).train()
        assert torch.equal(output(both), expected)
    with coins(False):
        assert not torch.equal(output(both), expected)


def test_scales_go_into_base_weights_and_adapters_alike() -> None:
    model = adapted()
    plain = output(model)
    surgeon.apply(model, scaling="paper", unit="batch", example=IMAGES)
    gated = output(model)
    folded: Any = surgeon.fold(model)
    for result in (output(folded), output(folded.merge_and_unload())):
        assert float((result - gated).abs().max() / gated.abs().max()) < 1e-12
    assert float((plain - gated).abs().max() / gated.abs().max()) > 1e-3


def test_merged_first_and_folded_then() -> None:
    model = adapted()
    surgeon.apply(model, scaling="paper", unit="batch", example=IMAGES)
    gated = output(model)
    merged = copy.deepcopy(model).merge_and_unload()
    result = output(surgeon.fold(merged))
    assert float((result - gated).abs().max() / gated.abs().max()) < 1e-12
    assert type(surgeon.fold(merged)) is timm.models.VisionTransformer


@pytest.mark.parametrize(("scaling", "warns"), [("paper", True), ("inverted", False)])
def test_adapters_that_go_out_without_the_scales_are_told_of(scaling: Any, warns: bool) -> None:
    model = adapted()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        surgeon.apply(model, scaling=scaling, example=IMAGES)
    said = [str(one.message) for one in told if "adapters of PEFT" in str(one.message)]
    assert len(said) == warns
    assert all("scaling='inverted' trains alike and needs no scales" in text for text in said)
