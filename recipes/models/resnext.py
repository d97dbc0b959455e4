"""ResNeXt for CIFAR of Xie et al. 2017 (arXiv:1611.05431): 29 layers, C groups of d channels each."""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int, groups: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.shortcut(x) + self.bn3(self.conv3(y)))


class ResNeXt(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(self, groups: int, channels: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn, width = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), 64
        blocks = list[nn.Module]()
        for stage in range(3):
            for i in range(3):
                out, inner = 256 * 2**stage, groups * channels * 2**stage
                blocks.append(Block(width, out, 2 if stage and not i else 1, groups, inner))
                width = out
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.bn(self.conv(x))))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


MODELS = {f"resnext29_{c}x{d}d": partial(ResNeXt, c, d) for c, d in ((8, 64), (16, 64))}
