"""The evaluation scales of gates, and the weights that take them.

Under ``scaling="paper"`` gate l evaluates ``shortcut + p_l * branch(x)``. A fold multiplies parameters by
powers of ``p_l`` and takes the gate out. `divide` runs it backwards, for a pretrained network, which does not
expect the factor: the same parameters are divided, so that each branch yields ``branch(x) / p_l``, of which
the gate makes ``branch(x)`` again. The laws of the fold (`_folding.algebra`) hold for any positive scale, so
the plan is the fold's own, and a fold afterwards gives back the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from surgeon._finding.flow import Flow
from surgeon._folding.evaluation import spelled_out
from surgeon._folding.flat import Flat, flatten
from surgeon._folding.fold import FoldPlan, commit, plan
from surgeon._folding.ways import Called, in_all_ways
from surgeon._gating.block import gating_of
from surgeon._gating.call_forms import Arguments, zeros
from surgeon._gating.forwards import Gating
from surgeon._gating.gated import Placed, first_weight, gated_blocks
from surgeon._gating.watched import Seen, marking, ungated, watching
from surgeon._tracing.record import record
from surgeon._tracing.trace import trace
from surgeon._tracing.undisturbed import undisturbed
from surgeon.errors import FoldError, UnseenCallError


def scales_of(gates: Sequence[Placed]) -> dict[str, float]:
    """The scale of each gate that has one, by name."""
    return {one.name: one.gate.scale for one in gates if one.gate.scale != 1.0}


def plan_gates(
    model: nn.Module,
    gates: Sequence[Placed],
    scales: Mapping[str, float],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> FoldPlan:
    """Finds the parameters that can take the scales of some gates; no weight is changed.

    The plan is made for one call of the model. Where a gated block has been called in other ways as well,
    these are looked at, too: a gate folds only if the same parameters take its scale in all of them. (With
    ``keep_eval`` the weights have been divided for this call, and what was divided is multiplied.)

    Args:
        model: The gated model.
        gates: Its gates.
        scales: A scale above 0 for each gate to plan for, by name.
        args: Positional arguments of one call; no arithmetic is done on them.
        kwargs: Keyword arguments of the same call.

    Raises:
        FoldError: The model cannot run on the arguments.
        RecordError: Likewise.
    """
    with marking(model, [placed for placed in gates if placed.name in scales]):
        try:
            with watching(model, strict=True) as seen:
                fold_plan = plan(model, args, kwargs, scales)
        except FoldError as error:
            if not isinstance(error.__cause__, UnseenCallError):
                raise
            # A block has no evaluating forward for this call yet, and none can be traced within a trace.
            _make_forwards(model, args, kwargs)
            with watching(model, strict=False) as seen:
                fold_plan = plan(model, args, kwargs, scales)
        return in_all_ways(model, fold_plan, scales, _called(model, seen))


def divide(model: nn.Module, gates: Sequence[Placed], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Divides what a fold would multiply, in place: the gated ``model`` evaluates as the ungated one did.

    All of it or nothing: products are taken in float64 and checked before the first is written.

    Args:
        model: The gated model, its weights still those of the plain one.
        gates: Its gates.
        args: Positional arguments of one call; no arithmetic is done on them.
        kwargs: Keyword arguments of the same call.

    Raises:
        FoldError: The scale of a gate fits into no parameter, or a quotient does not fit its type.
    """
    scales = scales_of(gates)
    fold_plan = plan_gates(model, gates, scales, args, kwargs)
    if fold_plan.kept:
        kept = {left.gate: left.reason for left in fold_plan.kept}
        listed = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise FoldError(
            f"evaluation cannot be kept: no weight takes the scale of {len(kept)} of {len(gates)} gates "
            f"({listed}). Leave them out with exclude={list(kept)}, or gate with scaling='inverted', which "
            "trains alike and never changes evaluation"
        )
    commit(model, fold_plan, {name: 1 / scale for name, scale in scales.items()})


def check_state_is_free(blocks: Sequence[nn.Module]) -> None:
    """Checks that no block has an extra state of its own, whose place in the ``state_dict`` is needed.

    Raises:
        FoldError: One has.
    """
    for block in blocks:
        if type(block).get_extra_state is not nn.Module.get_extra_state:
            raise FoldError(
                f"{type(block).__name__} has an extra state of its own in the state_dict, where "
                f"keep_eval=True notes its scales; leave it out with exclude={type(block).__name__!r}"
            )


def _make_forwards(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes the evaluating forward of every gated block for the ways in which one run calls it."""
    with ungated(model):
        recording = record(model, args, kwargs, training=False)
    for call in recording.calls:
        gating = gating_of(call.module)
        if gating is not None:
            inputs = recording.arguments(call)
            with spelled_out(), undisturbed(call.module, training=False):
                forward = gating.forward(call.module)
                flow = Flow(trace(call.module, *inputs, below=gating.below, forward=forward))
                gating.prepare(call.module, flow, *inputs[:2])


def _called(model: nn.Module, seen: Seen) -> Iterator[Called]:
    """The gated blocks, and how they have been called in the planned call and otherwise."""
    for _, block, gating in gated_blocks(model):
        marks = (gate.marked_as for gate in gating.gates if not gate.keeps_eval)
        planned = seen[id(gating)]
        others = [form for way, form in list(gating.ways.items()) if way not in planned]
        yield Called(
            block,
            tuple(mark for mark in marks if mark is not None),
            [partial(_flat, block, gating, form) for form in planned.values() if form is not None],
            [partial(_flat, block, gating, form) for form in others],
            gating.attributes_choose,
        )


def _flat(block: nn.Module, gating: Gating, form: Arguments | None) -> Flat:
    """A gated block called in one way, flattened."""
    if form is None:
        raise FoldError("the arguments hold objects that were not kept")
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    weight = first_weight(block)
    then = gating.gates[0].decided.dtype
    args, kwargs = zeros(form, device, None if weight is None else (then, weight.dtype))
    with undisturbed(block, training=False), spelled_out():
        gating.learn(block, args, kwargs)
    return flatten(block, args, kwargs)
