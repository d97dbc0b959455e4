"""The 110-layer CIFAR network of the paper."""

from torch import Tensor, nn


class Basic(nn.Module):
    """The block of the 110-layer CIFAR network: a shortcut without weights, as in the paper."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.extra = stride, out - width

    def shortcut(self, x: Tensor) -> Tensor:
        if not self.extra:
            return x
        x = nn.functional.avg_pool2d(x, self.stride)
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra))

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


def cifar_resnet(depth: int = 110) -> nn.Sequential:
    blocks, width = [], 16
    for out, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range((depth - 2) // 6):
            blocks.append(Basic(width, out, stride if i == 0 else 1))
            width = out
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
