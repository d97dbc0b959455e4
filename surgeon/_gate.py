"""The gate on one residual add: its coin, its correction, its evaluation scale.

With survival probability ``p`` and evaluation scale ``c`` (1 for ``"inverted"``, the scheduled ``p``
for ``"paper"``) a gate computes ``y = shortcut + g * branch(x)``:

* evaluation: ``g = c``; nothing is multiplied when ``c = 1``;
* training, unit ``"batch"``: one coin for the mini-batch. Heads: ``g = c / p``. Tails: the branch does
  not run and the result is the shortcut (Huang et al. 2016, section 3);
* training, unit ``"sample"``: a Bernoulli mask over the rows, divided by ``p``, times ``c`` (timm's
  ``DropPath`` when ``c = 1``, number for number under the same seed).

The drop rate may change while training runs; ``c`` never does.
"""

from typing import Literal

import torch
from torch import Tensor

Unit = Literal["sample", "batch"]
Scaling = Literal["inverted", "paper"]


@torch.library.custom_op("surgeon::mark", mutates_args=())
def mark(branch: Tensor, gate: int) -> Tensor:
    """The place of one gate's branch result in a flat graph; a copy of its argument.

    Only ``fold`` puts it there, to know where in the graph of the whole model each evaluation scale acts.
    """
    return branch.clone()


@mark.register_fake
def _(branch: Tensor, gate: int) -> Tensor:
    return torch.empty_like(branch)
