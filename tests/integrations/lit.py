"""A small Lightning module and images for it, for the tests and for their processes."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet

import surgeon

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    """Four residual adds."""
    torch.manual_seed(0)
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


class Module(L.LightningModule):
    """It keeps the last drop rate of each step in `seen`, where it has such a list."""

    def __init__(self, drop_rate: float = 0.5) -> None:
        super().__init__()
        self.network = network()
        surgeon.apply(self.network, drop_rate=drop_rate, scaling="paper", unit="batch", example=X)
        self.seen: list[float] | None = None

    def training_step(self, batch: Any, _: int) -> Tensor:
        if self.seen is not None:
            self.seen.append(surgeon.status(self.network).gates[-1].drop_rate)
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def data() -> DataLoader[Any]:
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(16) % 3), 4)


def trainer(folder: Path, callbacks: list[Any], **more: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(callbacks=callbacks, **(settings | more))
