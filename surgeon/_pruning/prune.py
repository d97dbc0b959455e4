"""Branches out of a network for good."""

import math
import os
from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from surgeon._gating.gated import is_gated
from surgeon._meant import meant, says_the_call
from surgeon._pruning.choose import Costs, choose
from surgeon._pruning.score import Data, Score
from surgeon._pruning.trial import Trial
from surgeon._removal import fold
from surgeon._tracing.example import Example
from surgeon.errors import UsageError


@says_the_call
def prune(  # noqa: PLR0913 - what to delete, how to choose it, how to run it
    model: nn.Module,
    drop: Collection[str] = (),
    *,
    depth: float | None = None,
    budget: float | None = None,
    costs: Costs | None = None,
    data: Data | None = None,
    score: Score | None = None,
    candidates: int = 8,
    cache: str | os.PathLike[str] | None = None,
    example: Example = None,
    inplace: bool = False,
) -> nn.Module:
    """Deletes branches of ``model`` with their parameters and returns the shorter network.

    ``model`` is left as it was and a pruned copy returned, unless ``inplace``. A gated model is folded first.
    A block of which nothing is left but its input becomes an ``nn.Identity``; another keeps its class and
    what the rest of its forward needs (a projection shortcut, the other branch of a transformer block). The
    names of all other parameters stay. The result trains on, takes gates, pickles, exports, and loads its
    own ``state_dict``; to load that into a fresh model, prune that one with the same ``drop`` first.

    Which branches to delete is either said (``drop``) or chosen (``depth``, ``budget``): of every branch it
    is measured what the network is worth without it, then one after another goes, each time the best of the
    ``candidates`` that came out best before, measured again with those that are gone already, as deletions
    interact. For a ``budget``, harm counts per what is saved.

    Args:
        model: A network with residual adds.
        drop: Names of residual adds as `find` gives them, or glob patterns on them.
        depth: The share of the branches that stays, in (0, 1).
        budget: What the network may cost, in the unit of ``costs``; nothing is deleted where it costs less.
        costs: For ``budget``: what it and its branches cost; `surgeon.latency` measures that.
        data: To choose by: batches ``(images, labels)``, scored by cross-entropy and accuracy, or batches of
            inputs alone, scored by agreement with the full network.
        score: Instead of ``data``: a function of a network in evaluation mode, the higher the
            better.
        candidates: How many branches are measured again at each step.
        cache: A file that keeps what was measured: the next call with these weights and data finds it there.
        example: As in `find`. What is left of a block is made for this way of calling it, and where its
            forward looks at sizes, for these sizes.
        inplace: Change and return ``model`` itself.

    Returns:
        The pruned network, in the mode that ``model`` is in.

    Raises:
        UsageError: A name is no residual add, ``depth`` is out of range, the budget cannot be met, or nothing
            says what to delete.
        PruneError: A branch cannot be deleted; nothing was changed.
        NoResidualsError: The model has no residual add.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> shorter = surgeon.prune(model, ["layer1.0.add"])
        >>> len(surgeon.find(shorter).residuals), len(surgeon.find(model).residuals)
        (3, 4)
    """
    if [bool(drop), depth is not None, budget is not None].count(True) != 1:
        raise UsageError(
            "give one of drop (what to delete), depth (how much is to stay) and budget (what it may cost)"
        )
    if drop:
        trial = Trial(model, example=example)
        names = named(drop, trial)
    else:
        trial = Trial(model, data=data, score=score, example=example, cache=cache)
        names = chosen(trial, depth, budget, costs, candidates)
    if not inplace:
        return trial.shorter(names)
    return trial.shorter(names, fold(model, inplace=True, example=example) if is_gated(model) else model)


def chosen(
    trial: Trial, depth: float | None, budget: float | None, costs: Costs | None, candidates: int
) -> list[str]:
    """The branches whose deletion leaves ``depth``, or meets ``budget``, in the order of their choice.

    Raises:
        UsageError: ``depth`` is out of range, or the budget cannot be met.
    """
    if depth is not None:
        count = _count(depth, len(trial.names))
        return choose(trial, trial.names, lambda gone: len(gone) == count, candidates)
    if budget is None or costs is None:
        raise UsageError("a budget needs costs, what each branch costs; surgeon.latency(model) measures that")
    costs.check(budget)
    return choose(trial, trial.names, lambda gone: costs.without(gone) <= budget, candidates, costs.branches)


def named(patterns: Collection[str], trial: Trial) -> list[str]:
    """The residual adds that names or glob patterns mean.

    Raises:
        UsageError: One of them means none.
    """
    known, found = trial.names, dict[str, None]()
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
