"""What a network takes in ONNX Runtime, and what each of its branches has of that.

A branch has what a run is shorter without it. Branches of one make (class of block, shapes, FLOPs) take the
same time, so all of a make are deleted together, exported and timed beside the whole network: a few exports
instead of one per branch, and a difference that stands out of the noise. Without all branches a run is
shorter by somewhat more than the sum; all take their part of that.

On one thread the clock counts processor time, so that a wait on a busy machine is not counted. Each run
stands between two runs of the whole network, in an order drawn anew in each round; what counts is the median
over the rounds of a run over the mean of those two. Of networks that take less than a few milliseconds it is
as many runs as fill them: the first one finds nothing of its own in the caches.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from surgeon._finding.findings import Residual
from surgeon._meant import says_the_call
from surgeon._onnx.exporter import to_onnx
from surgeon._onnx.signature import Signature, evaluating_copy, signature
from surgeon._pruning.choose import Costs
from surgeon._pruning.trial import Trial
from surgeon._text import Drawn, Part
from surgeon._torch import check_exporter
from surgeon._tracing.example import Example
from surgeon.errors import ExportError, PruneError, UsageError

_LEAST = 5e-3  # seconds


@dataclass(frozen=True, slots=True)
class Latency(Costs, Drawn):
    """Milliseconds of a run in ONNX Runtime on one thread, and of each branch in it.

    Attributes:
        full: Of the whole network.
        branches: What is saved without a branch, by the name of its residual add.
        unit: ``"ms"``.
        batch: Samples in a run.
    """

    batch: int = 1

    def parts(self) -> Sequence[Part]:
        """A table of the branches."""
        rows = tuple((n, f"{ms:.3f}", f"{ms / self.full:.1%}") for n, ms in self.branches.items())
        title = f"{self.full:.3g} ms a run, batch {self.batch}, one thread"
        return (Part(title, ("branch", "ms", "share"), rows, frozenset({"ms", "share"})),)


@says_the_call
def latency(model: nn.Module, example: Example = None, *, batch: int = 1, rounds: int = 30) -> Latency:
    """Measures what ``model`` takes in ONNX Runtime, and how much of that each branch; ``model`` stays.

    For ``prune(model, budget=MS, costs=latency(model))``. A gated model is measured as its folded copy.
    Branches that cannot be deleted are left out.

    Args:
        model: A network with residual adds.
        example: As in `find`; the sizes of the inputs, but for the batch.
        batch: Samples in a run.
        rounds: How often each file runs.

    Raises:
        UnsupportedTorchError: The exporter of this version of PyTorch will not do.
        NoResidualsError: The model has no residual add.
        ExportError: It does not export.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> costs = surgeon.latency(model, example=torch.zeros(1, 3, 64, 64))
    """
    check_exporter("surgeon.latency")
    trial = Trial(model, example=example)
    makes = dict[Any, list[str]]()
    for residual in trial.deleter.analysis.findings.residuals:
        if residual.name in trial.deleter.blocks:
            makes.setdefault(_make(residual), []).append(residual.name)
    parts, shorter = list[list[str]](), dict[str, nn.Module]()
    for names in makes.values():
        try:
            shorter[str(len(parts))] = trial.shorter(names)
        except PruneError:
            continue
        parts.append(names)
    none = trial.shorter([name for names in parts for name in names])
    called = signature(trial.full, trial.args or trial.kwargs)
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: _written(one, called, Path(folder) / f"{name}.onnx")
            for name, one in {"full": trial.full, "none": none, **shorter}.items()
        }
        shares, full = timed(files, called, batch=batch, rounds=rounds)
    saved = [max(0.0, 1 - shares[str(place)]) for place in range(len(parts))]
    together = (1 - shares["none"]) / max(sum(saved), 1e-9)
    branches = {
        name: full * together * saved[place] / len(names)
        for place, names in enumerate(parts)
        for name in names
    }
    return Latency(full, {name: branches[name] for name in trial.names if name in branches}, batch=batch)


def _make(residual: Residual) -> tuple[Any, ...]:
    return residual.block_type, residual.kind, residual.shape[1:], residual.flops, residual.parameters


def timed(
    files: Mapping[str, Path], called: Signature, *, batch: int = 1, rounds: int = 30
) -> tuple[dict[str, float], float]:
    """Runs ONNX files in turns, each between two runs of the first, on one thread.

    Args:
        files: By name; the first is what the others are measured against.
        called: How they are called.
        batch: Samples in a run.
        rounds: How often each runs.

    Returns:
        The time of each other over that of the first, and the first's in milliseconds: medians.

    Raises:
        ExportError: A file does not run at this batch.
    """
    if batch < 1 or rounds < 1:
        raise UsageError(f"batch is {batch} and rounds is {rounds}; give 1 or more of each")
    tensors = called.draw(batch, torch.Generator().manual_seed(0))
    runs = {name: _run(path, called, tensors) for name, path in files.items()}
    first, *others = runs
    times = max(1, round(_LEAST / runs[first]()))

    def taken(name: str) -> float:
        return sum(runs[name]() for _ in range(times)) / times

    shares: dict[str, list[float]] = {name: [] for name in others}
    whole: list[float] = []
    for round_ in range(rounds + 1):  # the first one warms up
        before = taken(first)
        for name in random.sample(others, len(others)):
            seconds, after = taken(name), taken(first)
            if round_:
                shares[name].append(2 * seconds / (before + after))
                whole.append(after)
            before = after
    return {n: statistics.median(s) for n, s in shares.items()}, 1e3 * statistics.median(whole)


def _written(model: nn.Module, called: Signature, place: Path) -> Path:
    ir.save(to_onnx(evaluating_copy(model), called, opset=None, dynamic_batch=True), place)
    return place


def _run(path: Path, called: Signature, tensors: Sequence[torch.Tensor]) -> Callable[[], float]:
    """Runs a file on this thread and says how many seconds that took."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    feed = {name: tensor.numpy() for name, tensor in zip(called.names, tensors, strict=True)}
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session.run(None, feed)
    except Exception as error:  # ONNX Runtime's errors share no public base class
        raise ExportError(f"ONNX Runtime does not run {path.name}: {error}") from error

    def run() -> float:
        start = time.thread_time()
        session.run(None, feed)
        return time.thread_time() - start

    return run
