"""The residual networks for CIFAR of He et al. 2016 (arXiv:1512.03385, section 4.2), of 6n + 2 layers.

Where a stage begins the shortcut has no weights (option A): every second pixel, and zeros for the new
channels. Huang et al. 2016 (arXiv:1603.09382) take the mean of four pixels there: ``average=True``.
"""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional


class OptionA(nn.Module):
    """The shortcut without weights, for a block that changes the size of its input."""

    def __init__(self, stride: int, extra: int, average: bool) -> None:
        super().__init__()
        self.stride, self.extra, self.average = stride, extra, average

    def forward(self, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(x, self.stride) if self.average else x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, 0, self.extra))


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int, average: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = width == out and stride == 1
        self.shortcut = nn.Identity() if same else OptionA(stride, out - width, average)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


class ResNet(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(self, depth: int, num_classes: int = 10, average: bool = False) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}; it is 6n + 2, as 20, 32, 44, 56, 110 and 1202")
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        blocks, width = list[nn.Module](), 16
        for out in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                blocks.append(Block(width, out, 2 if out > width else 1, average))
                width = out
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.bn(self.conv(x))))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


MODELS = {f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56, 110, 152, 1202)}
