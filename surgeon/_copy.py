"""Copies of models that have run."""

import copy

from torch import Tensor, nn

from surgeon._torch import pytree


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``, which is only read.

    What a module has computed and kept (LeViT keeps a table of attention biases) may be part of an autograd
    graph, which PyTorch does not copy. The copy gets its numbers.
    """
    held = (leaf for module in model.modules() for leaf in pytree.tree_leaves(vars(module)))
    computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(model, computed)
