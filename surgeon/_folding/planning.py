"""The plan of a fold for the gates of a model, in whatever ways its blocks have been called."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from surgeon._finding.flow import Flow
from surgeon._folding.balance import MARK
from surgeon._folding.flat import Flat, flatten
from surgeon._folding.fold import FoldPlan, Kept, held, plan, plan_flat
from surgeon._folding.operators import laws
from surgeon._folding.state import place
from surgeon._folding.still import spelled_out
from surgeon._gating.block import gating_of, marking
from surgeon._gating.forwards import Gating
from surgeon._gating.gate import Gate
from surgeon._gating.gated import first_weight
from surgeon._gating.ways import Arguments, forms, zeros
from surgeon._tracing.record import record
from surgeon._tracing.trace import trace
from surgeon._tracing.undisturbed import undisturbed
from surgeon.errors import FoldError, UnseenCallError

_ELSEWHERE = (
    "its block was also called in another way than here, in which the scale would have to go elsewhere"
)
_UNKNOWN = "its block was also called in another way than here, which cannot be analysed"
_CHOSEN = "its block was also called with other values of its attributes, which run other weights"

Known = dict[Any, Arguments | None]
"""Ways in which a block was called, with their arguments."""
Seen = dict[int, Known]
"""By the id of a gating, the ways in which one run of the model called its block."""


def plan_gates(
    model: nn.Module,
    gates: Sequence[Gate],
    scales: Mapping[int, float],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> FoldPlan:
    """Finds the parameters that can take the scales of some gates; no weight is changed.

    The plan is made for one call of the model. Where a gated block has been called in other ways as well,
    these are looked at, too: a gate folds only if the same parameters take its scale in all of them. (With
    ``keep_eval`` the weights have been divided for this call, and what was divided is multiplied.)

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
    with marking(model, gates):
        try:
            with _watched(model, strict=True) as seen:
                found = plan(model, args, kwargs, scales)
        except FoldError as error:
            if not isinstance(error.__cause__, UnseenCallError):
                raise
            # A block has no evaluating forward for this call yet, and none can be traced within a trace.
            _make_forwards(model, args, kwargs)
            with _watched(model, strict=False) as seen:
                found = plan(model, args, kwargs, scales)
        return _in_all_ways(model, found, scales, seen)


@contextmanager
def _watched(model: nn.Module, *, strict: bool) -> Iterator[Seen]:
    """Inside, it is noted how gated blocks are called; ``strict`` refuses ways without a forward."""
    gatings = [gating for module in model.modules() if (gating := gating_of(module))]
    seen: Seen = {id(gating): {} for gating in gatings}

    def noting(gating: Gating) -> Any:
        def run(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if strict and not gating.knows(block, args, kwargs):
                raise UnseenCallError(f"{gating.name or 'the model'} has no forward for this call")
            seen[id(gating)].setdefault(gating.way(args, kwargs), forms(args, kwargs))
            return Gating.run(gating, block, args, kwargs)

        return run

    try:
        for gating in gatings:
            gating.__dict__["run"] = noting(gating)
        yield seen
    finally:
        for gating in gatings:
            gating.__dict__.pop("run", None)


def _make_forwards(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes the evaluating forward of every gated block for the ways in which one run calls it."""
    with _ungated(model):
        recording = record(model, args, kwargs, training=False)
    for call in recording.calls:
        gating = gating_of(call.module)
        if gating is not None:
            given, named, log = recording.arguments(call)
            with spelled_out(), undisturbed(call.module, training=False):
                forward = gating.forward(call.module)
                flow = Flow(trace(call.module, given, named, log, below=gating.below, forward=forward))
                gating.prepare(call.module, flow, given, named)


@contextmanager
def _ungated(model: nn.Module) -> Iterator[None]:
    """Inside, every block runs its own forward."""
    gated = [(module, type(module)) for module in model.modules() if gating_of(module)]
    try:
        for module, cls in gated:
            module.__class__ = cls._ungated  # type: ignore[attr-defined]
            if (replaced := module.__dict__["_surgeon"].replaced) is not None:
                module.__dict__["forward"] = replaced
        yield
    finally:
        for module, cls in gated:
            module.__dict__.pop("forward", None)
            module.__class__ = cls


# Other ways of calling a block.


def _in_all_ways(model: nn.Module, found: FoldPlan, scales: Mapping[int, float], seen: Seen) -> FoldPlan:
    """The plan without the gates whose scale would have to go elsewhere in another call of their block."""
    stays: dict[int, str] = {}
    for block in model.modules():
        gating = gating_of(block)
        if gating is None:
            continue
        known = seen[id(gating)]
        gates = [g.marked_as for g in gating.gates if g.marked_as in found.folded and not g.keeps_eval]
        if gating.attributes_choose:
            stays |= dict.fromkeys(gates, _CHOSEN)
            continue
        others = [form for way, form in list(gating.ways.items()) if way not in known] if gates else []
        for form in others:
            stays |= _Other(block, gating, form).differing(model, found, {n: scales[n] for n in gates}, known)
    return _without(found, stays)


def _without(found: FoldPlan, stays: Mapping[int, str]) -> FoldPlan:
    """The plan without some gates, and those that fold only together with them."""
    torn = [group for group in found.together if not stays.keys().isdisjoint(group)]
    all_ = {number: _ELSEWHERE for group in torn for number in group} | dict(stays)
    kept = [*found.kept, *(Kept(number, reason) for number, reason in all_.items())]
    return replace(
        found,
        steps=tuple(step for step in found.steps if step.gate not in all_),
        kept=tuple(sorted(kept, key=lambda one: one.gate)),
        together=tuple(group for group in found.together if group not in torn),
    )


@dataclass(frozen=True, slots=True)
class _Other:
    """A block, and a way of calling it that is not the planned one."""

    block: nn.Module
    gating: Gating
    form: Arguments | None

    def differing(
        self, model: nn.Module, found: FoldPlan, scales: Mapping[int, float], known: Known
    ) -> dict[int, str]:
        """Those of the gates whose scale other parameters would take in this way; why.

        Where the laws are those of a planned way, so is the plan; else it has to come out the same for the
        block alone.
        """
        try:
            there = self._flat(self.form)
            if not any(step.rows for step in found.steps if step.gate in scales) and self._alike(
                there, known
            ):
                return {}
            here = plan_flat(there, scales)
        except (FoldError, UnseenCallError):
            return dict.fromkeys(scales, _UNKNOWN)
        leads = {number: group[0] for group in found.together for number in group}
        return {
            number: _ELSEWHERE
            for number in scales
            if _targets(model, found, leads.get(number, number)) != _targets(self.block, here, number)
        }

    def _alike(self, there: Flat, known: Known) -> bool:
        return any(_laws(self._flat(form)) == _laws(there) for form in known.values() if form is not None)

    def _flat(self, form: Arguments | None) -> Flat:
        if form is None:
            raise FoldError("the arguments hold objects that were not kept")
        device = next((p.device for p in self.block.parameters()), torch.device("cpu"))
        weight = first_weight(self.block)
        then = self.gating.gates[0].decided.dtype
        args, kwargs = zeros(form, device, None if weight is None else (then, weight.dtype))
        with undisturbed(self.block, training=False), spelled_out():
            self.gating.learn(self.block, args, kwargs)
        return flatten(self.block, args, kwargs)


def _laws(flat: Flat) -> Any:
    """All that a plan depends on but the sizes of rows."""
    named = {value.number: source for value, source in flat.parameters.items()}
    calls = [(c.name == MARK and c.arguments["gate"], c.inputs, c.outputs, list(laws(c))) for c in flat.calls]
    return named, flat.outputs, calls


def _targets(model: nn.Module, found: FoldPlan, number: int) -> set[tuple[Any, ...]]:
    """What a plan does for a gate, whatever the parameters are called."""
    steps = [step for step in found.steps if step.gate == number]
    return {(place(held(model, step.parameter)), replace(step, parameter="", gate=0)) for step in steps}
