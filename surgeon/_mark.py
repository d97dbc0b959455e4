"""A mark in a graph: all that gates and folds know of each other."""

import torch
from torch import Tensor

MARK = "surgeon.mark"
"""What a list of operators calls it."""


@torch.library.custom_op("surgeon::mark", mutates_args=())
def mark(branch: Tensor, gate: str) -> Tensor:  # noqa: ARG001 - read from the graph
    """A copy of ``branch``, the result of the branch of the gate of that name.

    It stands there only while a fold looks on, which learns from it where in the graph of the whole model
    each evaluation scale acts.
    """
    return branch.clone()


@mark.register_fake
def _(branch: Tensor, gate: str) -> Tensor:  # noqa: ARG001 - the operator's signature
    return torch.empty_like(branch)
