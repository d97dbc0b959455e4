"""Stochastic depth as one would write it into each block by hand, to measure surgeon's gates against.

The same draws in the same order as the gates': under one seed both drop the same branches and rows. What such
a model loses against its arithmetic is lost in the operators (memory traffic, convolutions of few rows), not
in surgeon.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks._step_cifar import Basic

Branch = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parts:
    """A block taken apart.

    Attributes:
        shortcut: Run on the input.
        branches: One after the other, each with a sum of its own.
        after: What follows a sum; it may write to it in place.
        instead: The same where there was no sum, so that nothing may be written to.
    """

    shortcut: Branch
    branches: tuple[Branch, ...]
    after: Branch
    instead: Branch


def _same(x: Tensor) -> Tensor:
    return x


def _bottleneck(b: Bottleneck) -> Parts:
    def branch(x: Tensor) -> Tensor:
        x = b.act2(b.bn2(b.conv2(b.act1(b.bn1(b.conv1(x))))))
        return b.bn3(b.conv3(x))

    return Parts(b.downsample or _same, (branch,), b.act3, torch.relu)


def _basic(b: Basic) -> Parts:
    return Parts(b.shortcut, (b.branch,), b.relu, torch.relu)


def _transformer(b: Block) -> Parts:
    first, second = (lambda x: b.ls1(b.attn(b.norm1(x)))), (lambda x: b.ls2(b.mlp(b.norm2(x))))
    return Parts(_same, (first, second), _same, _same)


def _convnext(b: ConvNeXtBlock) -> Parts:
    def branch(x: Tensor) -> Tensor:
        x = b.mlp(b.norm(b.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x * b.gamma.reshape(1, -1, 1, 1)

    return Parts(b.shortcut, (branch,), _same, _same)


_PARTS: dict[type[nn.Module], Callable[..., Parts]] = {
    Bottleneck: _bottleneck,
    Basic: _basic,
    Block: _transformer,
    ConvNeXtBlock: _convnext,
}


def has_parts(model: nn.Module) -> bool:
    """Whether `by_hand` knows the blocks of a model."""
    return any(type(block) in _PARTS for block in model.modules())


def by_hand(model: nn.Module, unit: str, rate: float) -> None:
    """Gives every block a forward that drops, in training, by the paper's linear schedule.

    Args:
        model: Changed.
        unit: ``"sample"`` or ``"batch"``.
        rate: The drop rate of the last block.
    """
    blocks = [block for block in model.modules() if type(block) in _PARTS]
    for number, block in enumerate(blocks, 1):
        add, parts = {"sample": _rows, "batch": _whole}[unit], _PARTS[type(block)](block)
        block.forward = _forward(parts, add, 1 - rate * number / len(blocks))  # type: ignore[method-assign]


def _forward(parts: Parts, add: Callable[..., Tensor | None], keep: float) -> Branch:
    def forward(x: Tensor) -> Tensor:
        for branch in parts.branches:
            shortcut = parts.shortcut(x)
            total = add(shortcut, branch, x, keep)
            x = parts.instead(shortcut) if total is None else parts.after(total)
        return x

    return forward


def _whole(shortcut: Tensor, branch: Branch, x: Tensor, keep: float) -> Tensor | None:
    if torch.rand(1, dtype=torch.float64).item() >= keep:
        return None
    return shortcut + branch(x) / keep


def _rows(shortcut: Tensor, branch: Branch, x: Tensor, keep: float) -> Tensor | None:
    """As DINOv2 does for its transformer blocks."""
    count = len(x)
    kept = min(count, int(keep * count + torch.rand(2, dtype=torch.float64)[0].item()))
    if kept == count:
        return shortcut + branch(x) / keep
    if kept == 0:
        return None
    rows = torch.randperm(count)[:kept].sort().values
    return torch.index_add(shortcut, 0, rows, branch(x[rows]), alpha=1 / keep)
