"""The networks of `benchmarks.step`, and the ways of training each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

import surgeon
from benchmarks._step_by_hand import by_hand, has_parts
from benchmarks._step_cifar import cifar_resnet


@dataclass(frozen=True)
class Net:
    """A network: how it is made (timm's name, or a function), its image size, whether it has a drop path."""

    make: str | Callable[[], nn.Module]
    size: int = 224

    @property
    def own(self) -> bool:
        return isinstance(self.make, str)

    @property
    def by_hand(self) -> bool:
        """Whether its blocks have been written by hand."""
        with torch.device("meta"):
            return has_parts(self.build())

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
    "empty": {"unit": "batch", "skip": True, "schedule": "uniform"},
}
HAND = {"sample": "sample by hand", "batch": "batch by hand"}
VARIANTS = ("plain", "library", *OPTIONS, *HAND.values())
COUNTED = ("auto", "sample", "batch", "empty")  # these may leave rows uncomputed


def variant(net: Net, which: str, rate: float) -> nn.Module:
    """The network as one variant trains it, always with the same weights."""
    torch.manual_seed(0)
    # Some of timm's models have a drop path of their own unless told otherwise.
    model = net.build(**({"drop_path_rate": rate if which == "library" else 0.0} if net.own else {}))
    if which in HAND.values():
        by_hand(model, which.partition(" ")[0], rate)
    if which in OPTIONS:
        example = torch.zeros(2, 3, net.size, net.size)
        rate = 1 - 1e-9 if which == "empty" else rate  # no branch ever runs
        surgeon.apply(model, drop_rate=rate, example=example, **OPTIONS[which])
    return model
