"""Gates in Hugging Face's Trainer: ramp, logs, resume, delivery, adapters, two processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from torch import Tensor, nn

import surgeon
from surgeon.errors import CheckpointError, NotGatedError, UsageError

pytest.importorskip("transformers")
from hf import EXAMPLE, Images, arguments, gated, images, network
from torchvision.models import resnet
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback

from surgeon.integrations.transformers import GateCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
RAMP = {"drop_rate": 0.5}


def trained(model: nn.Module, folder: Path, resume: Path | None = None, **how: Any) -> Trainer:
    more = how.pop("arguments", {})
    trainer = Trainer(model, arguments(folder, **more), train_dataset=Images())
    GateCallback(**({"ramp": RAMP} | how)).attach(trainer)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(pixel_values=images()).logits
    return logits


def test_the_ramp_covers_the_training_and_is_in_the_logs(tmp_path: Path) -> None:
    class Tracker(TrainerCallback):  # as TensorBoard's: it was there before
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            seen.append(dict(logs))

    seen: list[dict[str, float]] = []
    trainer = Trainer(gated(), arguments(tmp_path), train_dataset=Images(), callbacks=[Tracker()])
    GateCallback(ramp=RAMP).attach(trainer)
    trainer.train()
    logged = [one for one in trainer.state.log_history if "loss" in one]
    assert [one["gates/drop_rate"] for one in logged] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert [one["gates/expected_depth"] for one in logged] == pytest.approx(
        [4 - rate * 2.5 for rate in (0.125, 0.25, 0.375, 0.5)]  # linear: (1 + 2 + 3 + 4) / 4
    )
    assert all(0 <= one["gates/depth"] <= 4 for one in logged)
    assert [one["gates/depth"] for one in seen if "loss" in one] == [one["gates/depth"] for one in logged]


def test_a_resumed_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = gated(), gated()
    trained(whole, tmp_path)
    trained(resumed, tmp_path, tmp_path / "checkpoint-4")
    first, second = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = gated()
    trained(other, tmp_path, tmp_path / "checkpoint-4", ramp={"drop_rate": 0.0})
    assert any(not torch.equal(first[name], value) for name, value in other.state_dict().items())


def test_a_training_with_other_scales_is_not_resumed(tmp_path: Path) -> None:
    trained(gated(), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"scale 0\.875 at .*, this model has 0\.95; call surgeon\.apply"
    ):
        trained(gated(0.2), tmp_path, tmp_path / "checkpoint-4", ramp=None)


def test_what_is_delivered_is_stock_and_evaluates_as_the_gated_model(tmp_path: Path) -> None:
    model = gated()
    trained(model, tmp_path, deliver=tmp_path / "plain", onnx=True)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-5, atol=1e-5)
    assert type(plain) is type(network())
    assert "surgeon_scales" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert surgeon.verify(plain, tmp_path / "plain" / "model.onnx", example=EXAMPLE).ok
    stock = network()
    stock.load_state_dict(model.state_dict())
    assert not torch.allclose(outputs(stock), outputs(model), atol=1e-3)  # gated weights in a stock model


@pytest.mark.parametrize("saver", ["checkpoint", "save_model", "save_pretrained"])
def test_weights_that_the_trainer_saves_bring_their_scales(saver: str, tmp_path: Path) -> None:
    model = gated()
    trainer = trained(model, tmp_path)
    folder = tmp_path / ("checkpoint-8" if saver == "checkpoint" else "saved")
    if saver != "checkpoint":
        getattr(trainer if saver == "save_model" else model, saver)(str(folder))
    stock = network()
    report = surgeon.load(stock, folder / "model.safetensors", example=EXAMPLE)
    assert report.found == "gated"
    torch.testing.assert_close(outputs(stock), outputs(model), rtol=1e-5, atol=1e-5)


class Wrapped(nn.Module):
    """A network without a configuration, inside a module that computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_without_a_configuration_gets_its_note_in_the_checkpoint(tmp_path: Path) -> None:
    model = Wrapped()
    surgeon.apply(model.network, unit="batch", scaling="paper", example=images())
    trained(model, tmp_path, deliver=tmp_path / "plain")
    stock, plain, call = Wrapped(), Wrapped(), (images(), torch.zeros(4).long())
    found = surgeon.load(stock, tmp_path / "checkpoint-8" / "model.safetensors", example=call)
    assert found.found == "gated" and min(found.scales) == "network.layer1.0.add"
    assert surgeon.load(plain.network, tmp_path / "plain" / "model.safetensors").found == "stock"
    with torch.no_grad():
        ours = model.eval()(*call)["logits"]
        for other in (stock, plain):
            torch.testing.assert_close(other.eval()(*call)["logits"], ours, rtol=1e-5, atol=1e-5)
    # On with it: the folder is still one that the trainer resumes from.
    surgeon.apply(again := Wrapped().network, unit="batch", scaling="paper", example=images())
    model.network = again
    trained(model, tmp_path, tmp_path / "checkpoint-4")


def adapted(model: nn.Module) -> Any:
    """With LoRA on every convolution; running statistics, which are no part of an adapter, stay."""
    peft = pytest.importorskip("peft")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    config = peft.LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["gates", "adapters"])
def test_adapters_are_merged_into_what_is_delivered(first: str, tmp_path: Path) -> None:
    if first == "gates":
        model = adapted(gated())
    else:
        model = surgeon.apply(adapted(network()), unit="batch", scaling="paper", example=EXAMPLE)
    trained(model, tmp_path, deliver=tmp_path / "plain")
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-5)
    # The adapter by itself, on the stock base: without the scales it is another network.
    load = pytest.importorskip("peft").PeftModel.from_pretrained
    onto_stock = load(network(), tmp_path / "checkpoint-8")
    assert not torch.allclose(outputs(onto_stock), outputs(model), atol=1e-3)
    onto_gated = load(gated(), tmp_path / "checkpoint-8")
    torch.testing.assert_close(outputs(onto_gated), outputs(model), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_default_scaling_fits_the_stock_base(tmp_path: Path) -> None:
    model = adapted(gated(scaling="inverted"))
    trained(model, tmp_path)
    base = pytest.importorskip("peft").PeftModel.from_pretrained(network(), tmp_path / "checkpoint-8")
    torch.testing.assert_close(outputs(base), outputs(model))


def test_averaged_checkpoints(tmp_path: Path) -> None:
    """The mean of two checkpoints has no note of its own; beside one it is found, elsewhere it is told."""
    from safetensors.torch import load_file, save_file

    model = gated()
    trained(model, tmp_path)
    two = [load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (4, 8)]
    mean = {name: (two[0][name] + two[1][name]) / 2 for name in two[0]}
    for folder in (tmp_path / "checkpoint-8", tmp_path):
        save_file({k: v.to(two[0][k].dtype) for k, v in mean.items()}, folder / "mean.safetensors")
    model.load_state_dict(mean)
    stock = network()
    assert (
        surgeon.load(stock, tmp_path / "checkpoint-8" / "mean.safetensors", example=EXAMPLE).found == "gated"
    )
    torch.testing.assert_close(outputs(stock), outputs(model), rtol=1e-5, atol=1e-5)
    assert surgeon.load(network(), tmp_path / "mean.safetensors").found == "unknown"
    told = network()
    surgeon.load(told, tmp_path / "mean.safetensors", scales=surgeon.status(model).scales, example=EXAMPLE)
    torch.testing.assert_close(outputs(told), outputs(model), rtol=1e-5, atol=1e-5)


def test_bfloat16(tmp_path: Path) -> None:
    """Autocast is put around the model's forward; what is delivered has none, and no gates."""
    model = gated()
    trained(model, tmp_path, deliver=tmp_path / "plain", arguments={"bf16": True})
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=0.05, atol=0.05)


def test_two_processes(tmp_path: Path) -> None:
    """DDP: both end with the same weights, one of them delivers, and both are resumed to the same bits."""
    launch(
        """
        import sys, torch, torch.distributed as dist
        from pathlib import Path
        from hf import *
        from transformers import Trainer
        from surgeon.integrations.transformers import GateCallback

        def run(resume=None):
            model = gated()
            trainer = Trainer(model, arguments(Path("out"), ddp_backend="gloo"), train_dataset=Images())
            GateCallback(ramp={"drop_rate": 0.5}, deliver="out/plain").attach(trainer)
            trainer.train(resume_from_checkpoint=resume)
            assert dist.get_world_size() == 2
            for name, value in model.named_parameters():
                every = [torch.empty_like(value) for _ in range(2)]
                dist.all_gather(every, value.detach())
                assert torch.equal(*every), name
            return model, trainer

        model, trainer = run()
        again, _ = run("out/checkpoint-4")
        assert all(map(torch.equal, model.parameters(), again.parameters()))
        dist.barrier()
        import os; os._exit(0)
        """,
        tmp_path,
    )
    assert (tmp_path / "out" / "plain" / "model.safetensors").exists()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"onnx=True needs a folder .*: deliver='\.\.\.'"):
        GateCallback(onnx=True)
    with pytest.raises(
        NotGatedError, match=r"ResNetForImageClassification has no gates; call surgeon\.apply"
    ):
        trained(network(), tmp_path)
