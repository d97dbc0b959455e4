"""Wide residual networks of Zagoruyko and Komodakis 2016 (arXiv:1605.07146): n layers, k times as wide."""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.project = None if width == out else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(x))
        shortcut = x if self.project is None else self.project(y)
        y = self.dropout(functional.relu(self.bn2(self.conv1(y))))
        out: Tensor = shortcut + self.conv2(y)
        return out


class WideResNet(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(self, depth: int, widen: int, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth is {depth}; it is 6n + 4, as 16, 28 and 40")
        self.conv, width = nn.Conv2d(3, 16, 3, 1, 1, bias=False), 16
        blocks = list[nn.Module]()
        for stage in range(3):
            for i in range((depth - 4) // 6):
                out = 16 * 2**stage * widen
                blocks.append(Block(width, out, 2 if stage and not i else 1, dropout))
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


MODELS = {f"wrn{n}_{k}": partial(WideResNet, n, k) for n, k in ((16, 8), (28, 10), (40, 1), (40, 2), (40, 4))}
