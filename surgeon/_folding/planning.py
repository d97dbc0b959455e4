"""The plan of a fold for the gates of a model, whatever state their forwards are in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgeon._finding.flow import Flow
from surgeon._folding.fold import FoldPlan, plan
from surgeon._gating.forwards import gating_of
from surgeon._gating.gate import Gate, marking
from surgeon._tracing.example import mode, no_inference_mode, untouched
from surgeon._tracing.fake import held_open
from surgeon._tracing.record import record
from surgeon._tracing.trace import trace
from surgeon.errors import FoldError, UnseenCallError


def plan_gates(
    model: nn.Module,
    gates: Sequence[Gate],
    scales: Mapping[int, float],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> FoldPlan:
    """Finds the parameters that can take the scales of some gates; no weight is changed.

    Args:
        model: The gated model.
        gates: The gates to plan for, numbered as they come.
        scales: A scale above 0 for each number.
        args: Positional arguments of one call; no arithmetic is done on them.
        kwargs: Keyword arguments of the same call.

    Raises:
        FoldError: The model cannot run on the arguments.
        RecordError: Likewise.
    """
    with marking(gates):
        try:
            return plan(model, args, kwargs, scales)
        except FoldError as error:
            if not isinstance(error.__cause__, UnseenCallError):
                raise
        # An unpickled block has no evaluating forward yet, and none can be traced within a trace.
        _make_forwards(model, args, kwargs)
        return plan(model, args, kwargs, scales)


def _make_forwards(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes the evaluating forward of every gated block for the ways in which one run calls it."""
    with _ungated(model):
        recording = record(model, args, kwargs)
    for call in recording.calls:
        gating = gating_of(call.module)
        if gating is not None:
            given, named, log = recording.arguments(call)
            with no_inference_mode(), mode(call.module, False), untouched(call.module), held_open():
                flow = Flow(trace(call.module, given, named, log, opened=gating.opened))
                gating.prepare(call.module, flow, given, named)


@contextmanager
def _ungated(model: nn.Module) -> Iterator[None]:
    """Inside, every block runs its own forward."""
    gated = [(module, type(module)) for module in model.modules() if gating_of(module)]
    try:
        for module, cls in gated:
            module.__class__ = cls._ungated  # type: ignore[attr-defined]
        yield
    finally:
        for module, cls in gated:
            module.__class__ = cls
