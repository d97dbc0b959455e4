"""ResNet in ResNet of Targ et al. 2016 (arXiv:1603.08029): 18 layers, 96 to 384 channels in two streams.

A generalised layer has a residual stream r, which keeps a shortcut, and a transient stream t, which does not,
each with half of the channels (equation 1, s is a batch norm and an activation)::

    r' = s(conv_rr(r) + conv_tr(t) + shortcut(r))
    t' = s(conv_rt(r) + conv_tt(t))

A block is a residual block of two such layers, with a shortcut of its own around both, for both streams.
Where the size changes, shortcuts are projections of one pixel.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, Tensor]


def shortcut(width: int, out: int, stride: int) -> nn.Module:
    return nn.Identity() if width == out else nn.Conv2d(width, out, 1, stride, bias=False)


class Layer(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()

        def conv() -> nn.Conv2d:
            return nn.Conv2d(width, out, 3, stride, 1, bias=False)

        self.rr, self.tr, self.rt, self.tt = conv(), conv(), conv(), conv()
        self.bn_r, self.bn_t = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut = shortcut(width, out, stride)

    def forward(self, r: Tensor, t: Tensor) -> State:
        residual = self.rr(r) + self.tr(t)
        transient = self.rt(r) + self.tt(t)
        return functional.relu(self.bn_r(residual + self.shortcut(r))), functional.relu(self.bn_t(transient))


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = Layer(width, out, stride), Layer(out, out, 1)
        self.shortcut_r, self.shortcut_t = shortcut(width, out, stride), shortcut(width, out, stride)

    def forward(self, r: Tensor, t: Tensor) -> State:
        new_r, new_t = self.layer2(*self.layer1(r, t))
        return self.shortcut_r(r) + new_r, self.shortcut_t(t) + new_t


class RiR(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn, width = nn.Conv2d(3, 96, 3, 1, 1, bias=False), nn.BatchNorm2d(96), 48
        self.blocks = nn.ModuleList()
        for out, count in ((48, 2), (96, 3), (192, 3)):
            for _ in range(count):
                self.blocks.append(Block(width, out, 2 if out > width else 1))
                width = out
        self.bn_end, self.head = nn.BatchNorm2d(384), nn.Conv2d(384, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        r, t = functional.relu(self.bn(self.conv(x))).chunk(2, 1)
        for block in self.blocks:
            r, t = block(r, t)
        x = functional.relu(self.bn_end(torch.cat((r, t), 1)))
        scores: Tensor = self.head(x).mean((2, 3))
        return scores


MODELS = {"rir18": RiR}
