"""Which branches ``surgeon export`` deletes first, and what came of it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from surgeon.cli._images import Measuring, batches
from surgeon.cli._run import Output
from surgeon.cli._subject import Subject
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from surgeon._onnx.export_report import ExportReport
    from surgeon._onnx.shorter import Shorter
    from surgeon._pruning.choose import Costs
    from surgeon._pruning.trial import Trial

Body = Callable[..., Any]
_CANDIDATES, _DRAWS, _POINTS = 8, 5, 4


@dataclass(frozen=True, slots=True)
class Shortening:
    """The options that say what to delete; one of the first three at most.

    Attributes:
        drop_blocks: Names or patterns.
        depth: The share of the branches that stays.
        latency_budget: Milliseconds.
        plot: Where to draw this choice beside others.
        cache: Where to keep what was measured.
    """

    drop_blocks: tuple[str, ...]
    depth: float | None
    latency_budget: float | None
    plot: str | None
    cache: str | None

    @property
    def asked(self) -> bool:
        """Whether anything is to be deleted.

        Raises:
            UsageError: In several ways.
        """
        given = [bool(self.drop_blocks), self.depth is not None, self.latency_budget is not None].count(True)
        if given > 1:
            raise UsageError("give one of --drop-blocks, --depth and --latency-budget")
        return bool(given)


def shortening_options(body: Body) -> Body:
    """Adds the options of `Shortening`, which the body gets as ``shortening``."""
    options = (
        click.option(
            "--drop-blocks", multiple=True, metavar="PATTERN", help="Delete these branches; may be repeated."
        ),
        click.option("--depth", type=float, help="Delete branches until this share is left."),
        click.option(
            "--latency-budget",
            type=click.FloatRange(min=0, min_open=True),
            metavar="MS",
            help="Delete branches until a run takes so long, one thread, batch 1.",
        ),
        click.option("--plot", type=click.Path(), help="Draw that choice beside others into this file."),
        click.option("--cache", type=click.Path(), help="Keep what was measured in this file."),
    )
    keys = [held.name for held in fields(Shortening)]

    @functools.wraps(body)
    def call(*args: Any, **arguments: Any) -> Any:
        return body(*args, shortening=Shortening(**{k: arguments.pop(k) for k in keys}), **arguments)

    made: Body = call
    for option in reversed(options):
        made = option(made)
    return made


@dataclass(frozen=True, slots=True)
class Choice:
    """What goes.

    Attributes:
        trial: Of the whole network.
        deleted: Names of the branches, in the order of their choice.
        costs: Of the branches; None where nobody asked for a latency.
        measured: Whether there is data to measure on.
    """

    trial: "Trial"
    deleted: list[str]
    costs: "Costs | None"
    measured: bool

    def shorter(self) -> "nn.Module":
        """The network without them."""
        return self.trial.shorter(self.deleted)


def choose(out: Output, subject: Subject, shortening: Shortening, measuring: Measuring) -> Choice | None:
    """Which branches go; None if the network is to stay, or meets its budget as it is.

    Raises:
        UsageError: The options do not fit, or a budget cannot be met.
    """
    if not shortening.asked:
        return None
    import surgeon
    from surgeon._pruning.prune import chosen, named
    from surgeon._pruning.trial import Trial

    by_data = not shortening.drop_blocks or measuring.data is not None
    data = batches(measuring, subject) if by_data else None
    cache = shortening.cache if by_data else None
    trial = Trial(subject.model, data=data, example=subject.example, cache=cache)
    if shortening.drop_blocks:
        return Choice(trial, named(shortening.drop_blocks, trial), None, by_data)
    budget = shortening.latency_budget
    costs = None if budget is None else surgeon.latency(subject.model, subject.example)
    names = chosen(trial, shortening.depth, budget, costs, _CANDIDATES)
    if names or costs is None:
        return Choice(trial, names, costs, by_data)
    takes = f"the whole network takes {costs.full:.4g} ms, within {budget:g} ms"
    out.note(f"surgeon: {takes}; nothing was deleted")
    return None


def told(
    out: Output,
    subject: Subject,
    shortening: Shortening,
    choice: Choice,
    shorter: "nn.Module",
    export: "Callable[[nn.Module, str], ExportReport]",
    report: "ExportReport",
) -> "Shorter":
    """Measures the exported file beside the whole network's, which is exported the same way and not kept."""
    from surgeon._onnx.shorter import beside
    from surgeon._pruning.lesion import lesions

    found, count = None, len(choice.deleted)
    if choice.measured and count < len(choice.trial.names):
        points = sorted({max(1, round(count * part / _POINTS)) for part in range(1, _POINTS + 1)})
        found = lesions(choice.trial, choice.deleted, points, _DRAWS, 0)
    costs = choice.costs
    predicted = None if costs is None else costs.without(choice.deleted) / costs.full
    with TemporaryDirectory() as folder:
        whole = export(choice.trial.full, str(Path(folder) / "whole.onnx"))
        result = beside(
            choice.trial, shorter, (whole, report), choice.deleted, lesions=found, predicted=predicted
        )
    if shortening.plot and found is not None:
        from surgeon._pruning.picture import draw

        draw(found, Path(shortening.plot), subject.spec)
    budget = shortening.latency_budget
    if budget is not None and costs is not None and result.shorter.ms > budget:
        out.note(
            f"surgeon: the file takes {result.shorter.ms:.4g} ms now, above {budget:g} ms: the whole network "
            f"takes {result.whole.ms:.4g} ms now, and took {costs.full:.4g} when branches were chosen"
        )
    return result
