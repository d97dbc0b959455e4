"""A small network of Hugging Face's and images for it, for the tests and for their processes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

import surgeon

SIZE = 16
EXAMPLE = {"pixel_values": torch.zeros(2, 3, SIZE, SIZE)}


class Images(Dataset[dict[str, Any]]):
    """Sixteen images of noise in three classes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        noise = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": noise, "labels": i % 3}


def images(count: int = 4) -> Tensor:
    return torch.stack([Images()[i]["pixel_values"] for i in range(count)])


def network() -> ResNetForImageClassification:
    """Four residual adds; nothing is zero that a fold would multiply."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def gated(drop_rate: float = 0.5, **how: Any) -> ResNetForImageClassification:
    settings = {"unit": "batch", "scaling": "paper", "example": EXAMPLE} | how
    return surgeon.apply(network(), drop_rate=drop_rate, **settings)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(settings | more))
