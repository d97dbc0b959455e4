"""DenseNet for CIFAR of Huang et al. 2017 (arXiv:1608.06993): L layers that add k channels each.

A layer reads what all layers before it have made and puts its own k channels beside. With ``bottleneck``
(DenseNet-BC) a convolution of one pixel and 4k channels comes first, and transitions halve the channels.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    def __init__(self, width: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.dropout(self.conv(functional.relu(self.bn(x))))), 1)


class Bottleneck(nn.Module):
    def __init__(self, width: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(functional.relu(self.bn1(x))))
        y = self.dropout(self.conv2(functional.relu(self.bn2(y))))
        return torch.cat((x, y), 1)


class Transition(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(self.conv(functional.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(
        self, depth: int, growth: int, bottleneck: bool = False, num_classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers, left = divmod(depth - 4, 6 if bottleneck else 3)
        if left or layers < 1:
            raise ValueError(f"depth is {depth}; it is {6 if bottleneck else 3}n + 4")
        layer: type[nn.Module] = Bottleneck if bottleneck else Layer
        width = 2 * growth if bottleneck else 16
        steps: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False)]
        for stage in range(3):
            for _ in range(layers):
                steps.append(layer(width, growth, dropout))
                width += growth
            if stage < 2:
                out = width // 2 if bottleneck else width
                steps.append(Transition(width, out))
                width = out
        self.steps, self.bn, self.fc = (
            nn.Sequential(*steps),
            nn.BatchNorm2d(width),
            nn.Linear(width, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.steps(x)))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


MODELS = {
    f"densenet{depth}_{k}": partial(DenseNet, depth, k) for depth, k in ((40, 12), (100, 12), (100, 24))
}
MODELS |= {
    f"densenetbc{depth}_{k}": partial(DenseNet, depth, k, True)
    for depth, k in ((100, 12), (250, 24), (190, 40))
}
