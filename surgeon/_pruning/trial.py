"""Networks without some of their branches, made to be measured: they share every tensor with the full one."""

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from surgeon._pruning.deletion import Deleter, Deletion
from surgeon._pruning.pruned import prune_block
from surgeon._pruning.score import Worth
from surgeon._torch import pytree
from surgeon._tracing.record import record
from surgeon.errors import RecordError


class Trial:
    """Measures a network without some branches; each set of branches once.

    Args:
        model: The full network, which is left as it was.
        deleter: Of it.
        worth: What a network is worth.
    """

    def __init__(self, model: nn.Module, deleter: Deleter, worth: Callable[[nn.Module], Worth]) -> None:
        self.model, self.deleter, self.worth = model, deleter, worth
        self.known: dict[frozenset[str], Worth] = {}

    def __call__(self, names: Collection[str]) -> Worth:
        """What the network is worth without these branches."""
        key = frozenset(names)
        if key not in self.known:
            shorter = install(twin(self.model), self.deleter.delete(key))
            self.known[key] = self.worth(shorter)
        return self.known[key]


def twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with modules of its own and the very tensors of ``model``."""
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        held += [leaf for leaf in pytree.tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


def install(model: nn.Module, deletions: Sequence[Deletion]) -> nn.Module:
    """Carries deletions out on ``model``, in place, and returns it.

    A block that only hands on its argument is replaced by an ``nn.Identity``, unless it has hooks.
    """
    for deletion in deletions:
        block = model.get_submodule(deletion.block)
        if deletion.identity and deletion.block and not _hooked(block):
            _replace(model, block, nn.Identity().train(block.training))
            continue
        for path in deletion.gone:
            parent, _, name = path.rpartition(".")
            delattr(block.get_submodule(parent), name)
        prune_block(block, deletion.kept)
    return model


def needs_blocks(
    model: nn.Module, deletions: Sequence[Deletion], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether ``model`` does not run with identities in place of its blocks: it reads attributes of them."""
    if not any(deletion.identity for deletion in deletions):
        return False
    try:
        record(install(twin(model), deletions), args, kwargs)
    except RecordError:
        return True
    return False


def _hooked(block: nn.Module) -> bool:
    return bool(block._forward_hooks or block._forward_pre_hooks or block._backward_hooks)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``old`` is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
