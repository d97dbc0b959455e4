"""Branches out of a network for good."""

import math
from collections.abc import Collection
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from surgeon._copy import copied
from surgeon._finding.analysis import Analysis, analyse
from surgeon._gating.gated import gates_of, is_gated, recorded_inputs
from surgeon._meant import meant, says_the_call
from surgeon._plain import check_plain
from surgeon._pruning.choose import choose
from surgeon._pruning.deletion import Deleter
from surgeon._pruning.score import Data, Score, scorer
from surgeon._pruning.trial import Trial, install, needs_blocks
from surgeon._removal import fold
from surgeon._tracing.example import Example, inputs
from surgeon.errors import NoResidualsError, UsageError


@says_the_call
def prune(
    model: nn.Module,
    drop: Collection[str] = (),
    *,
    depth: float | None = None,
    data: Data | None = None,
    score: Score | None = None,
    candidates: int = 8,
    example: Example = None,
    inplace: bool = False,
) -> nn.Module:
    """Deletes branches of ``model`` with their parameters and returns the shorter network.

    ``model`` is left as it was and a pruned copy returned, unless ``inplace``. A gated model is folded first.
    A block of which nothing is left but its input becomes an ``nn.Identity``; another keeps its class and
    what the rest of its forward needs (a projection shortcut, the other branch of a transformer block). The
    names of all other parameters stay. The result trains on, takes gates, pickles, exports, and loads its
    own ``state_dict``; to load that into a fresh model, prune that one with the same ``drop`` first.

    Which branches to delete is either said (``drop``) or chosen (``depth``): of every branch it is measured
    what the network is worth without it, then one after another goes, each time the best of the
    ``candidates`` that came out best before, measured again with those that are gone already, as deletions
    interact.

    Args:
        model: A network with residual adds.
        drop: Names of residual adds as `find` gives them, or glob patterns on them.
        depth: The share of the branches that stays, in (0, 1).
        data: For ``depth``: batches ``(images, labels)``, scored by cross-entropy and accuracy, or batches of
            inputs alone, scored by agreement with the full network.
        score: For ``depth``, instead of ``data``: a function of a network in evaluation mode, the higher the
            better.
        candidates: How many branches are measured again at each step.
        example: As in `find`. What is left of a block is made for this way of calling it, and where its
            forward looks at sizes, for these sizes.
        inplace: Change and return ``model`` itself.

    Returns:
        The pruned network, in the mode that ``model`` is in.

    Raises:
        UsageError: A name is no residual add, ``depth`` is out of range, or nothing says what to delete.
        PruneError: A branch cannot be deleted; nothing was changed.
        NoResidualsError: The model has no residual add.
    """
    if bool(drop) == (depth is not None):
        raise UsageError("give either drop (what to delete) or depth (how much is to stay)")
    plain, args, kwargs = ungated(model, example, inplace=inplace)
    deleter = Deleter(analysed(plain, args, kwargs))
    if depth is None:
        names = named(drop, deleter)
    else:
        tried = Trial(plain, deleter, scorer(plain, data, score))
        names = choose(tried, list(deleter.blocks), _count(depth, len(deleter.blocks)), candidates)
    deletions = deleter.delete(names)
    if needs_blocks(plain, deletions, args, kwargs):
        deletions = [replace(one, identity=False) for one in deletions]
    return install(plain if inplace or plain is not model else copied(plain), deletions)


def ungated(
    model: nn.Module, example: Example, *, inplace: bool = False
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A network without gates, and the example as arguments; a copy of a gated one unless ``inplace``."""
    check_plain(model)
    if not is_gated(model):
        return model, *inputs(model, example)
    args, kwargs = recorded_inputs(model, gates_of(model)[0].decided, example)
    return fold(model, inplace=inplace, example=example), args, kwargs


def analysed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Analysis:
    """The residual adds of a network.

    Raises:
        NoResidualsError: It has none.
    """
    analysis = analyse(model, args, kwargs)
    if not Deleter(analysis).blocks:
        raise NoResidualsError(f"{type(model).__name__} has no residual add, so no branch can be deleted")
    return analysis


def named(patterns: Collection[str], deleter: Deleter) -> list[str]:
    """The residual adds that names or glob patterns mean.

    Raises:
        UsageError: One of them means none.
    """
    known, found = list(deleter.blocks), dict[str, None]()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        hits = [name for name in known if fnmatchcase(name, pattern)]
        if not hits:
            raise UsageError(
                f"{pattern!r} is no residual add of the model. {meant(pattern, known)}surgeon.find(model) "
                "lists them"
            )
        found |= dict.fromkeys(hits)
    return list(found)


def _count(depth: float, branches: int) -> int:
    """How many of the branches go."""
    if not 0 < depth < 1:
        raise UsageError(
            f"depth is {depth!r}; give the share of the branches that is to stay, between 0 and 1"
        )
    gone = branches - math.ceil(round(depth * branches, 9))
    if not gone:
        raise UsageError(
            f"depth is {depth:g}, which deletes none of the {branches} branches; the nearest that does is "
            f"{(branches - 1) / branches:.4g}"
        )
    return gone
