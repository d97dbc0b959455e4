"""A pruned network's ONNX file beside that of the whole network."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from surgeon._onnx.export_report import ExportReport
from surgeon._onnx.latency import timed
from surgeon._onnx.signature import signature
from surgeon._pruning.lesion import Lesions
from surgeon._pruning.score import Worth
from surgeon._pruning.trial import Trial
from surgeon._text import Drawn, Part
from surgeon._text import count as counted
from surgeon._tracing.record import record


@dataclass(frozen=True, slots=True)
class Figures:
    """What is to be said of one network.

    Attributes:
        worth: On the data; None without.
        parameters: How many numbers its weights hold.
        flops: Of one forward on the example.
        bytes: Size of its file.
        ms: Of one run in ONNX Runtime on one thread, batch 1.
    """

    worth: Worth | None
    parameters: int
    flops: int
    bytes: int
    ms: float


@dataclass(frozen=True, slots=True)
class Shorter(Drawn):
    """A pruned network beside the whole one.

    Attributes:
        deleted: The branches that went.
        branches: How many there were.
        whole, shorter: The two networks.
        predicted: Milliseconds that were reckoned for the shorter one; None where nobody asked.
        lesions: Beside other ways to delete as many; None without data.
    """

    deleted: tuple[str, ...]
    branches: int
    whole: Figures
    shorter: Figures
    predicted: float | None
    lesions: Lesions | None

    def parts(self) -> Sequence[Part]:
        """A table of both, and of what deleting as many in other ways would leave."""
        title = f"{counted(len(self.deleted), 'branch', 'branches')} of {self.branches} deleted"
        head = ("", "whole", "shorter", "ratio")
        lines = (*self._others(), f"without  {', '.join(self.deleted)}")
        return (Part(title, head, tuple(self._rows()), frozenset(head[1:]), lines),)

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        one, other = self.whole, self.shorter
        if one.worth is not None and other.worth is not None:
            if one.worth.accuracy is not None and other.worth.accuracy is not None:
                kind = "accuracy" if self.lesions and self.lesions.labelled else "agreement"
                yield kind, f"{one.worth.accuracy:.2%}", f"{other.worth.accuracy:.2%}", ""
            yield "loss", f"{one.worth.loss:.4g}", f"{other.worth.loss:.4g}", ""
        pairs = (
            ("parameters", one.parameters, other.parameters, "{:,}"),
            ("FLOPs", one.flops, other.flops, "{:,}"),
            ("file, bytes", one.bytes, other.bytes, "{:,}"),
            ("latency, ms", one.ms, other.ms, "{:.4g}"),
        )
        for name, a, b, form in pairs:
            yield name, form.format(a), form.format(b), f"{b / a:.3f}" if a else ""
        if self.predicted is not None:
            yield "predicted, ms", "", f"{self.predicted:.4g}", f"{self.predicted / one.ms:.3f}"

    def _others(self) -> Iterator[str]:
        if self.lesions is None or not self.lesions.curve:
            return
        row = self.lesions.curve[-1]
        shares = [worth.accuracy for worth in row.at_random if worth.accuracy is not None]
        if shares and row.tail.accuracy is not None:
            spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
            yield f"as many at random: {statistics.mean(shares):.2%} (deviation {spread:.2%})"
            yield f"as many at the end: {row.tail.accuracy:.2%}"


def beside(
    trial: Trial,
    shorter: nn.Module,
    reports: tuple[ExportReport, ExportReport],
    deleted: Sequence[str],
    *,
    lesions: Lesions | None,
    predicted: float | None,
) -> Shorter:
    """Measures a pruned network's file beside the whole network's.

    Args:
        trial: Of the whole network.
        shorter: The pruned one.
        reports: Of both exports, the whole network's first.
        deleted: Which branches went.
        lesions: What the data say, their last row for as many branches as these.
        predicted: The share of the whole network's time that was reckoned.
    """
    paths = {name: Path(report.path) for name, report in zip(("whole", "shorter"), reports, strict=True)}
    shares, ms = timed(paths, signature(trial.full, trial.args or trial.kwargs))
    worths = (None, None) if lesions is None else (lesions.full, trial(deleted))
    flops = (trial.deleter.analysis.recording.flops, record(shorter, trial.args, trial.kwargs).flops)
    figures = [
        Figures(worth, sum(p.numel() for p in net.parameters()), work, report.bytes, ms * share)
        for worth, net, work, report, share in zip(
            worths, (trial.full, shorter), flops, reports, (1.0, shares["shorter"]), strict=True
        )
    ]
    reckoned = None if predicted is None else ms * predicted
    return Shorter(tuple(deleted), len(trial.names), figures[0], figures[1], reckoned, lesions)
