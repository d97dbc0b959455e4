"""The networks of `benchmarks.step`, and the ways of training each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import surgeon


class Basic(nn.Module):
    """The block of the 110-layer CIFAR network: a shortcut without weights, as in the paper."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.extra = stride, out - width

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.extra:
            shortcut = nn.functional.avg_pool2d(x, self.stride)
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.extra))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + shortcut)


def cifar_resnet(depth: int = 110) -> nn.Sequential:
    blocks, width = [], 16
    for out, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range((depth - 2) // 6):
            blocks.append(Basic(width, out, stride if i == 0 else 1))
            width = out
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Net:
    """A network: how it is made (timm's name, or a function), its image size, whether it has a drop path."""

    make: str | Callable[[], nn.Module]
    size: int = 224

    @property
    def own(self) -> bool:
        return isinstance(self.make, str)

    def build(self, **options: Any) -> nn.Module:
        if isinstance(self.make, str):
            return timm.create_model(self.make, **options)
        return self.make()


NETS = {
    "resnet50": Net("resnet50"),
    "resnet110": Net(cifar_resnet, 32),
    "vit_small": Net("vit_small_patch16_224"),
    "convnext_tiny": Net("convnext_tiny"),
    "resnet101": Net("resnet101"),
    "swin_tiny": Net("swin_tiny_patch4_window7_224"),
    "efficientnet_b0": Net("efficientnet_b0"),
    "mobilenetv3": Net("mobilenetv3_large_100"),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "mask": {"skip": False},
    "auto": {"skip": "auto"},
    "sample": {"skip": True},
    "batch": {"unit": "batch", "skip": True},
}
VARIANTS = ("plain", "library", *OPTIONS)
COUNTED = ("auto", "sample", "batch")  # these may leave rows uncomputed


def variant(net: Net, which: str, rate: float) -> nn.Module:
    """The network as one variant trains it, always with the same weights."""
    torch.manual_seed(0)
    # Some of timm's models have a drop path of their own unless told otherwise.
    model = net.build(**({"drop_path_rate": rate if which == "library" else 0.0} if net.own else {}))
    if which in OPTIONS:
        example = torch.zeros(2, 3, net.size, net.size)
        surgeon.apply(model, drop_rate=rate, example=example, **OPTIONS[which])
    return model
