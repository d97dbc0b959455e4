"""One network without some of its branches: what it is worth then, and the shorter network itself.

What is measured shares every tensor with the full network, and each set of branches is measured once.
"""

import copy
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgeon._copy import copied
from surgeon._finding.analysis import analyse
from surgeon._gating.gated import gates_of, is_gated, recorded_inputs
from surgeon._plain import check_plain
from surgeon._pruning.cache import Known, marked
from surgeon._pruning.deletion import Deleter, Deletion
from surgeon._pruning.pruned import prune_block
from surgeon._pruning.score import NOTHING, Data, Score, Scorer, Worth, scorer
from surgeon._removal import fold
from surgeon._torch import pytree
from surgeon._tracing.example import Example, inputs
from surgeon._tracing.record import record
from surgeon.errors import NoResidualsError, RecordError, UsageError


class Trial:
    """A network, and the same without some of its branches.

    Args:
        model: The full network, which is left as it was; of a gated one its folded copy is looked at.
        data, score, example: As in `surgeon.prune`; with neither data nor score nothing can be measured.
        cache: A file to keep what was measured in.
        progress: Is told after each measurement how many there were.

    Attributes:
        full: The network without gates.
        args, kwargs: The example.
        deleter: Of its branches.
        names: Of the branches, in execution order.

    Raises:
        NoResidualsError: The model has no residual add.
        UsageError: Both data and score were given, or a cache without data.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data: Data | None = None,
        score: Score | None = None,
        example: Example = None,
        cache: str | os.PathLike[str] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        self.full, self.args, self.kwargs = _ungated(model, example)
        self.deleter = Deleter(analyse(self.full, self.args, self.kwargs))
        self.names = list(self.deleter.blocks)
        if not self.names:
            raise NoResidualsError(f"{type(model).__name__} has no residual add, so no branch can be deleted")
        self.worth = None if data is None and score is None else scorer(self.full, data, score)
        if cache is not None and not isinstance(self.worth, Scorer):
            raise UsageError("a cache is for what is measured on data; leave cache out")
        mark = marked(self.full, self.worth.batches) if isinstance(self.worth, Scorer) and cache else ""
        self.known = Known(Path(cache) if cache else None, mark)
        self.progress = progress

    def __call__(self, names: Collection[str]) -> Worth:
        """What the network is worth without these branches."""
        found = self.known.get(names)
        if found is None:
            if self.worth is None:
                raise UsageError(NOTHING)
            found = self.worth(install(twin(self.full), self.deleter.delete(set(names))))
            self.known.put(names, found)
            if self.progress is not None:
                self.progress(len(self.known.held))
        return found

    def shorter(self, names: Collection[str], into: nn.Module | None = None) -> nn.Module:
        """The network without these branches: a copy, or ``into``, which is the whole one without gates."""
        deletions = self.deleter.delete(names)
        if needs_blocks(self.full, deletions, self.args, self.kwargs):
            deletions = [replace(one, identity=False) for one in deletions]
        return install(copied(self.full) if into is None else into, deletions)

    @property
    def labelled(self) -> bool:
        """Whether accuracy counts right answers; else agreement with the whole network."""
        return isinstance(self.worth, Scorer) and self.worth.labelled


def _ungated(model: nn.Module, example: Example) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A network without gates, and the example as arguments; a copy of a gated one."""
    check_plain(model)
    if not is_gated(model):
        return model, *inputs(model, example)
    args, kwargs = recorded_inputs(model, gates_of(model)[0].decided, example)
    return fold(model, example=example), args, kwargs


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
