"""A small network and a loop over accelerate, for the tests and for their processes."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet

import surgeon
from surgeon.integrations.accelerate import GateTraining

# At 16 pixels PyTorch's bfloat16 convolutions on the CPU leave garbage in the last weights' gradients.
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
RAMP = {"drop_rate": 0.5, "steps": 8}


def network() -> nn.Module:
    """Four residual adds."""
    torch.manual_seed(0)
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def gated(drop_rate: float = 0.5, **how: Any) -> nn.Module:
    settings = {"scaling": "paper", "unit": "batch", "example": X} | how
    return surgeon.apply(network(), drop_rate=drop_rate, **settings)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(X)
    return result


def train(
    model: nn.Module,
    folder: Path | None = None,
    resume: Path | None = None,
    steps: int = 8,
    accumulate: int = 1,
    precision: str = "no",
    **how: Any,
) -> tuple[GateTraining, list[dict[str, float]]]:
    """That many optimizer steps, a state saved after the fourth; the gates, and what was logged at each."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(images, torch.arange(16) % 3), 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    gates, logs = GateTraining(accelerator, prepared, **({"ramp": RAMP} | how)), []
    if resume:
        accelerator.load_state(str(resume))
    prepared.train()
    while gates.done < steps:
        for images, labels in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(nn.functional.cross_entropy(prepared(images), labels))
                optimizer.step()
                optimizer.zero_grad()
            gates.count()
            logs.append(gates.log())
            if folder and gates.done == 4 and accelerator.sync_gradients:
                accelerator.save_state(str(folder / "state"))
            if gates.done == steps:
                break
    gates.end()
    accelerator.free_memory()
    return gates, logs
