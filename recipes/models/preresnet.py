"""The preactivation networks for CIFAR of He et al. 2016 (arXiv:1603.05027).

A unit normalises and activates its input first, and nothing stands behind the sum. With 110 layers it has two
convolutions, and a shortcut without weights where the size changes; with 164 and 1001 layers three, and there
a projection, which reads the activated input, too.
"""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional


class Basic(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.stride, self.extra = stride, out - width

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.bn1(x)))
        y = self.conv2(functional.relu(self.bn2(y)))
        if self.extra:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        out: Tensor = x + y
        return out


class Bottleneck(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        inner = out // 4
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, inner, 1, stride, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, inner, 3, 1, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(inner), nn.Conv2d(inner, out, 1, bias=False)
        self.project = None if width == out else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(x))
        shortcut = x if self.project is None else self.project(y)
        y = self.conv2(functional.relu(self.bn2(self.conv1(y))))
        out: Tensor = shortcut + self.conv3(functional.relu(self.bn3(y)))
        return out


class PreResNet(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(self, depth: int, bottleneck: bool, num_classes: int = 10) -> None:
        super().__init__()
        block: type[nn.Module] = Bottleneck if bottleneck else Basic
        layers, expansion = (9, 4) if bottleneck else (6, 1)
        if depth < layers + 2 or depth % layers != 2:
            raise ValueError(f"depth is {depth}; it is {layers}n + 2")
        self.conv, width = nn.Conv2d(3, 16, 3, 1, 1, bias=False), 16
        blocks = list[nn.Module]()
        for stage in range(3):
            for i in range(depth // layers):
                out = 16 * 2**stage * expansion
                blocks.append(block(width, out, 2 if stage and not i else 1))
                width = out
        self.blocks, self.bn, self.fc = (
            nn.Sequential(*blocks),
            nn.BatchNorm2d(width),
            nn.Linear(width, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.blocks(self.conv(x))))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


MODELS = {
    "preresnet110": partial(PreResNet, 110, False),
    "preresnet164": partial(PreResNet, 164, True),
    "preresnet1001": partial(PreResNet, 1001, True),
}
