"""Shake-Shake of Gastaldi 2017 (arXiv:1705.07485): 26 layers of two branches, mixed at random in training.

A unit adds ``a * f(x) + (1 - a) * g(x)`` to its input; forward draws a for each image, backward another,
evaluation takes a half (the paper's S-S-I).
"""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Shake(torch.autograd.Function):
    """Two tensors of the same shape, mixed by one number for each image; the gradient is mixed by another."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # noqa: ARG004 - PyTorch's signature
        share = a.new_empty((len(a),) + (1,) * (a.ndim - 1)).uniform_()
        return share * a + (1 - share) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        share = grad.new_empty((len(grad),) + (1,) * (grad.ndim - 1)).uniform_()
        return share * grad, (1 - share) * grad


def branch(width: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(width, out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Conv2d(out, out, 3, 1, 1, bias=False),
        nn.BatchNorm2d(out),
    )


class Shortcut(nn.Module):
    """Two projections of every second pixel, the second shifted by one pixel down and right, side by side."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(width, out // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(width, out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(x)
        shifted = functional.pad(x, (1, -1, 1, -1))
        halves = [
            conv(part[:, :, :: self.stride, :: self.stride])
            for conv, part in ((self.conv1, x), (self.conv2, shifted))
        ]
        both: Tensor = self.bn(torch.cat(halves, 1))
        return both


class Unit(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.branch1, self.branch2 = branch(width, out, stride), branch(width, out, stride)
        self.shortcut: nn.Module = nn.Identity() if width == out else Shortcut(width, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.branch1(x), self.branch2(x)
        mixed = Shake.apply(a, b) if self.training else 0.5 * a + 0.5 * b
        out: Tensor = self.shortcut(x) + mixed
        return out


class ShakeShake(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(self, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn, now = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), 16
        units = list[nn.Module]()
        for stage in range(3):
            for i in range(4):
                out = width * 2**stage
                units.append(Unit(now, out, 2 if stage and not i else 1))
                now = out
        self.units, self.fc = nn.Sequential(*units), nn.Linear(now, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.units(self.bn(self.conv(x))))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


MODELS = {f"shake_shake26_2x{width}d": partial(ShakeShake, width) for width in (32, 64, 96)}
