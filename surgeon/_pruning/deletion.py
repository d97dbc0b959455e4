"""What is left of a block when some of its branches are deleted.

A residual add ``shortcut + branch(x)`` without its branch is its shortcut. So the block's traced forward is
copied without the additions and without everything that ran for their branches alone; what nothing reads
any more (a norm that only two deleted branches read, say) goes as well. The modules, parameters and buffers
that only the deleted code names leave the block, in training and evaluation alike. A block of which nothing
is left but its only argument is an identity.

Nothing here changes a model.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgeon._finding.addition import Addition
from surgeon._finding.analysis import Analysis, Block
from surgeon._finding.flow import Flow
from surgeon._finding.residual import meant
from surgeon._gating.matching import again, located
from surgeon._pruning.cut import Code, Cut
from surgeon._pruning.pruned import Kept, form
from surgeon._torch import pytree
from surgeon._tracing.nests import tensors
from surgeon._tracing.record import Recording, record
from surgeon._tracing.trace import trace
from surgeon._tracing.undisturbed import undisturbed
from surgeon.errors import PruneError, SurgeonError, TraceError, UsageError

_RESIDUAL = ("identity", "projection", "left", "right")


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a block is without some of its branches.

    Attributes:
        block: Its qualified name.
        names: Of the deleted residual adds.
        kept: Its forward without them.
        gone: Modules, parameters and buffers that leave it, by their paths below it.
        identity: Nothing is left but its only argument.
    """

    block: str
    names: tuple[str, ...]
    kept: Kept
    gone: tuple[str, ...]
    identity: bool


class Deleter:
    """Deletes branches of one model on paper, block by block; what it has traced it keeps.

    Args:
        analysis: Of the model, which is as it was then.

    Attributes:
        blocks: The block of each branch that may go, by the name of its residual add; joins have no branch.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.blocks = {
            r.name: block for block in analysis.blocks for r in block.residuals if r.kind in _RESIDUAL
        }
        self._flows: dict[tuple[str, bool, bool], Flow] = {}
        self._larger: Recording | None = None

    def delete(self, names: Collection[str]) -> list[Deletion]:
        """What each block is without these branches.

        Raises:
            UsageError: A name is no residual add.
            PruneError: A block's forward cannot do without its branch.
        """
        for name in sorted(names):
            if name not in self.blocks:
                raise UsageError(f"{name!r} is no residual add of the model; surgeon.find(model) lists them")
        chosen = {block.name: block for name, block in self.blocks.items() if name in names}
        return [self._delete(block, names) for block in chosen.values()]

    def _delete(self, block: Block, names: Collection[str]) -> Deletion:
        deleted = tuple(r.name for r in block.residuals if r.name in names)
        cuts = [self._cut(block, names, training) for training in (True, False)]
        training, evaluation = codes = [cut.code() for cut in cuts]
        args, kwargs, _ = self.analysis.recording.arguments(block.call)
        exact = any(cut.flow.trace.key.exact for cut in cuts)
        first = int(exact and self._any_batch(block, names, codes))
        kept = Kept(deleted, form(args, kwargs, exact=exact, first=first), training, evaluation)
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        identity = alone and not block.call.rewritten and all(cut.hands_on for cut in cuts)
        return Deletion(block.name, deleted, kept, _gone(block, cuts, self.analysis.recording), identity)

    def _cut(self, block: Block, names: Collection[str], training: bool, *, larger: bool = False) -> Cut:
        """The block's trace in one mode, on the example or on a larger batch, without these branches."""
        flow = block.flow if training and not larger else self._flow(block, training, larger=larger)
        chosen = [i for i, r in enumerate(block.residuals) if r.name in names]
        known = {traits.ordinal: traits for traits in located(block.flow)[1]}
        wanted = [known[block.found[i].ordinal] for i in chosen]
        there = again(flow, wanted, all_gated=len(chosen) == len(block.found))
        found = [_meant(flow, a, block.found[i]) for i, a in zip(chosen, there, strict=True)]
        for i, addition in zip(chosen, found, strict=True):
            if addition is None:
                raise PruneError(
                    f"{block.residuals[i].name} cannot be deleted: in evaluation {block.name or 'the model'} "
                    "does not perform this addition as in training; leave it in"
                )
        return Cut(flow, [a for a in found if a], rewritten=block.call.rewritten)

    def _flow(self, block: Block, training: bool, *, larger: bool) -> Flow:
        key = block.name, training, larger
        if key not in self._flows:
            recording = self._on_larger_batch() if larger else self.analysis.recording
            call = next(c for c in recording.calls if c.module is block.module)
            args, kwargs, log = recording.arguments(call)
            try:
                with undisturbed(block.module, training=training):
                    made = trace(block.module, args, kwargs, log, below=block.flow.trace.below)
            except TraceError as error:
                where = block.name or "the model"
                raise PruneError(f"{where} cannot be pruned: in evaluation {error}; leave it in") from error
            self._flows[key] = Flow(made)
        return self._flows[key]

    def _any_batch(self, block: Block, names: Collection[str], codes: Sequence[Code]) -> bool:
        """Whether what is left of a block that looks at sizes is the same code for a larger batch."""
        try:
            other = [self._cut(block, names, training, larger=True).code() for training in (True, False)]
        except SurgeonError:
            return False
        return all(a.source == b.source for a, b in zip(codes, other, strict=True))

    def _on_larger_batch(self) -> Recording:
        if self._larger is None:
            whole = self.analysis.recording.calls[0]
            batches = {t.shape[0] for t in tensors((whole.args, whole.kwargs)) if t.ndim}
            if len(batches) != 1:
                raise PruneError("the arguments of the example have no common number of samples")
            args, kwargs = pytree.tree_map_only(Tensor, _one_more, (whole.args, whole.kwargs))
            self._larger = record(whole.module, args, kwargs)
        return self._larger


def _one_more(tensor: Tensor) -> Tensor:
    size = (tensor.shape[0] + 1, *tensor.shape[1:]) if tensor.ndim else ()
    return torch.zeros(size, dtype=tensor.dtype, device=tensor.device)


def _meant(flow: Flow, addition: Addition | None, told: Addition) -> Addition | None:
    """An addition of another trace with the sides of the first, where stochastic depth may have told them."""
    return meant(flow, addition, told.kind, "left" if told.node.args[0] is told.shortcut else "right")


def _gone(block: Block, cuts: Sequence[Cut], recording: Recording) -> tuple[str, ...]:
    """The modules, parameters and buffers that only deleted code of the block names, topmost first."""
    used = {path for cut in cuts for path in cut.paths(cut.left)}
    dead = {path for cut in cuts for path in cut.paths(cut.deleted)} - used
    return tuple(_topmost(block.module, "", dead, used, _called_outside(block, recording)))


def _called_outside(block: Block, recording: Recording) -> set[nn.Module]:
    """Modules of the block that are called from outside of it as well."""
    within: set[int] = set()
    outside = set[nn.Module]()
    own = set(block.module.modules())
    for call in recording.calls:
        if call.module is block.module or call.parent in within:
            within.add(call.place)
        elif call.module in own:
            outside.add(call.module)
    return outside


def _topmost(
    module: nn.Module, prefix: str, dead: set[str], used: set[str], elsewhere: set[nn.Module]
) -> Iterator[str]:
    for name, child in module.named_children():
        path = prefix + name
        below = f"{path}."
        is_read = path in used or any(u.startswith(below) for u in used)
        is_dead = path in dead or any(d.startswith(below) for d in dead)
        if is_dead and not is_read and elsewhere.isdisjoint(child.modules()):
            yield path
        elif is_dead:
            yield from _topmost(child, below, dead, used, elsewhere)
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    yield from (prefix + name for name, _ in own if prefix + name in dead)
