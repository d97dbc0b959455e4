"""FractalNet of Larsson et al. 2017 (arXiv:1605.07648): five fractal blocks of C columns.

The rule of growth (section 3) puts a single layer beside two copies of what there is, and takes the mean::

    f_1(z) = layer(z)
    f_C(z) = join(f_(C-1)(f_(C-1)(z)), layer(z))

where a join within a join is one join of all paths that end there. A layer is a convolution, a batch norm and
an activation. Column c of a block is its path of 2^(c-1) layers; the deepest network has 5 * 2^(C-1).
Nothing here drops a path: `surgeon.apply` does.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        nn.init.xavier_normal_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class Fractal(nn.Module):
    """A fractal block of 2^(C-1) steps: column c has a layer for every 2^(C-c); they join at ends."""

    def __init__(self, columns: int, width: int, out: int) -> None:
        super().__init__()
        self.columns = nn.ModuleList(
            nn.ModuleList(Layer(out if step else width, out) for step in range(2**c)) for c in range(columns)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads, count = [x] * len(self.columns), 2 ** (len(self.columns) - 1)
        for step in range(1, count + 1):
            ending = list[int]()
            for c, column in enumerate(self.columns):
                length = count >> c
                if step % length == 0:
                    heads[c] = column.get_submodule(str(step // length - 1))(heads[c])
                    ending.append(c)
            if len(ending) > 1:
                joined = torch.stack([heads[c] for c in ending]).mean(0)
                for c in ending:
                    heads[c] = joined
        return heads[0]


class FractalNet(nn.Module):
    pretrained_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(
        self, columns: int, num_classes: int = 10, widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    ) -> None:
        super().__init__()
        blocks, width = list[nn.Module](), 3
        for out in widths:
            blocks += [Fractal(columns, width, out), nn.MaxPool2d(2)]
            width = out
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.blocks(x).flatten(1))
        return scores


# Table 3 of the paper, with 16 to 128 channels, and the network of 20 layers with 64 to 512.
_NARROW = (16, 32, 64, 128, 128)
MODELS = {"fractalnet20_wide": partial(FractalNet, 3)}
MODELS |= {f"fractalnet{5 * 2**c}": partial(FractalNet, c + 1, widths=_NARROW) for c in range(6)}
