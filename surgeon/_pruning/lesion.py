"""What each branch of a trained network is worth: the network is measured without it.

Veit et al. 2016 (section 4.1) delete single blocks of a trained residual network and find that most are
hardly missed; networks trained with stochastic depth miss them less still. `lesion` measures that.
"""

import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from surgeon._meant import says_the_call
from surgeon._pruning.choose import choose
from surgeon._pruning.score import NOTHING, Data, Score, Worth
from surgeon._pruning.trial import Trial
from surgeon._text import Listed, Part
from surgeon._text import count as counted
from surgeon._tracing.example import Example
from surgeon.errors import UsageError


@dataclass(frozen=True, slots=True)
class Loss:
    """What the network is worth without one branch.

    Attributes:
        name: Of the residual add.
        block_type: Class of its block.
        flops_share: FLOPs of the branch over those of the network, in [0, 1].
        worth: Of the network without it.
    """

    name: str
    block_type: str
    flops_share: float
    worth: Worth


@dataclass(frozen=True, slots=True)
class Row:
    """What networks without ``deleted`` of their branches are worth.

    Attributes:
        deleted: How many branches are left out.
        chosen: Names of the least important ones, chosen one after another.
        worth: Without those.
        at_random: Without as many at random, one entry per draw.
        tail: Without the last ones, as where a network is cut off at its end.
    """

    deleted: int
    chosen: tuple[str, ...]
    worth: Worth
    at_random: tuple[Worth, ...]
    tail: Worth


@dataclass(frozen=True, slots=True)
class Lesions(Listed[Loss]):
    """What the branches of a network are worth; iterating gives one `Loss` per branch, in execution order.

    Attributes:
        full: The worth of the whole network.
        single: Without each branch alone.
        curve: Without more and more of them.
        labelled: Whether accuracy counts right answers; else agreement with the whole network.
    """

    full: Worth
    single: tuple[Loss, ...]
    curve: tuple[Row, ...]
    labelled: bool

    def _entries(self) -> Sequence[Loss]:
        return self.single

    def parts(self) -> Sequence[Part]:
        """A table of the branches one by one, and one of more and more of them."""
        kind = "accuracy" if self.labelled else "agreement"
        right = frozenset({"FLOPs", "loss", kind, "branches", "at random", "the last ones"})
        rows = tuple(
            (one.name, one.block_type, f"{one.flops_share:.1%}", *_cells(one.worth)) for one in self.single
        )
        whole = f"{counted(len(self.single), 'branch', 'branches')}; whole network: {_said(self.full)}"
        shown = [Part(whole, ("without", "block", "FLOPs", "loss", kind), rows, right)]
        if self.curve:
            more = tuple(
                (str(row.deleted), *_cells(row.worth), _spread(row.at_random), _cells(row.tail)[1])
                for row in self.curve
            )
            head = ("branches", "loss", kind, "at random", "the last ones")
            shown.append(Part("deleted together", head, more, right))
        return shown


def _cells(worth: Worth) -> tuple[str, str]:
    return f"{worth.loss:.4g}", "" if worth.accuracy is None else f"{worth.accuracy:.1%}"


def _said(worth: Worth) -> str:
    loss, accuracy = _cells(worth)
    return f"loss {loss}" + (f", {accuracy}" if accuracy else "")


def _spread(draws: Sequence[Worth]) -> str:
    values = [w.accuracy for w in draws if w.accuracy is not None]
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1%} ± {spread:.1%}"


@says_the_call
def lesion(
    model: nn.Module,
    data: Data | None = None,
    *,
    score: Score | None = None,
    counts: Sequence[int] = (),
    draws: int = 5,
    candidates: int = 8,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    example: Example = None,
    progress: Callable[[int], object] | None = None,
) -> Lesions:
    """Measures what ``model`` is worth without each of its branches; ``model`` is left as it was.

    A gated model is measured as its folded copy.

    Args:
        model: A trained network with residual adds.
        data: As in `prune`: batches with labels, or inputs alone for agreement with the whole network.
        score: Instead of ``data``: a function of a network in evaluation mode, the higher the better.
        counts: How many branches to delete together, for each of these numbers: the least important, as many
            at random, and the last ones.
        draws: How many random sets for each.
        candidates: As in `prune`.
        seed: Of the random sets.
        cache: As in `prune`; a lesion that was stopped goes on.
        example: As in `find`.
        progress: Is called after each measurement with the number of them so far.

    Raises:
        UsageError: Neither or both of ``data`` and ``score``, or a count out of range.
        NoResidualsError: The model has no residual add.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> data = [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))]
        >>> found = surgeon.lesion(model, data)
        >>> len(found.single)
        4
    """
    if data is None and score is None:
        raise UsageError(NOTHING)
    trial = Trial(model, data=data, score=score, example=example, cache=cache, progress=progress)
    for count in counts:
        if not 0 < count < len(trial.names):
            raise UsageError(
                f"counts has {count}; the network has {len(trial.names)} branches, so give 1 to "
                f"{len(trial.names) - 1}"
            )
    most = max(counts, default=0)
    chosen = choose(trial, trial.names, lambda gone: len(gone) == most, candidates)
    return lesions(trial, chosen, sorted(counts), draws, seed)


def lesions(trial: Trial, chosen: Sequence[str], counts: Sequence[int], draws: int, seed: int) -> Lesions:
    """What a network is worth without each branch, and without several.

    Args:
        trial: Of the network.
        chosen: Branches, the least important one first.
        counts: How many of these go, each beside as many at random and as many at the end.
        draws: How often at random.
        seed: Of that.
    """
    analysis = trial.deleter.analysis
    flops = max(analysis.recording.flops, 1)
    residuals = [r for r in analysis.findings.residuals if r.name in trial.deleter.blocks]
    single = tuple(Loss(r.name, r.block_type, r.flops / flops, trial([r.name])) for r in residuals)
    generator = random.Random(seed)  # noqa: S311 - which branches, no secret
    curve = tuple(_row(trial, chosen[:count], draws, generator) for count in counts)
    return Lesions(trial([]), single, curve, trial.labelled)


def _row(trial: Trial, chosen: Sequence[str], draws: int, generator: random.Random) -> Row:
    count = len(chosen)
    at_random = tuple(trial(generator.sample(trial.names, count)) for _ in range(draws))
    return Row(count, tuple(chosen), trial(chosen), at_random, trial(trial.names[-count:]))
