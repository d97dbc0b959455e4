"""Plans that hold for every way of calling a block, not only for the one that they were made for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from surgeon._folding.flat import Flat
from surgeon._folding.fold import FoldPlan, Kept, plan_flat, tensor_named
from surgeon._folding.operators import laws
from surgeon._folding.state import memory_of
from surgeon._mark import MARK
from surgeon.errors import FoldError, UnseenCallError

_ELSEWHERE = (
    "its block was also called in another way than here, in which the scale would have to go elsewhere"
)
_UNKNOWN = "its block was also called in another way than here, which cannot be analysed"
_CHOSEN = "its block was also called with other values of its attributes, which run other weights"

Way = Callable[[], Flat]
"""A block called in one way, flattened; raises `FoldError` where it cannot be."""


@dataclass(frozen=True, slots=True)
class Called:
    """A block with marks in it, and the ways in which it has been called.

    Attributes:
        block: The block.
        marks: Its gates.
        planned: The ways in which the planned call of the model calls it.
        others: All others.
        attributes_choose: Whether values of its attributes decide which weights run.
    """

    block: nn.Module
    marks: tuple[str, ...]
    planned: Sequence[Way]
    others: Sequence[Way]
    attributes_choose: bool


def in_all_ways(
    model: nn.Module, plan: FoldPlan, scales: Mapping[str, float], blocks: Iterable[Called]
) -> FoldPlan:
    """The plan without the gates whose scale would have to go elsewhere in another call of their block.

    Args:
        model: The model that the plan was made for.
        plan: The plan.
        scales: A scale above 0 for each gate.
        blocks: Those of its blocks that have been called in several ways.
    """
    stays: dict[str, str] = {}
    for called in blocks:
        gates = [gate for gate in called.marks if gate in plan.folded]
        if called.attributes_choose:
            stays |= dict.fromkeys(gates, _CHOSEN)
            continue
        for way in called.others if gates else ():
            stays |= _differing(model, plan, called, way, {gate: scales[gate] for gate in gates})
    return _without(plan, stays, list(scales))


def _without(plan: FoldPlan, stays: Mapping[str, str], order: Sequence[str]) -> FoldPlan:
    """The plan without some gates, and those that fold only together with them."""
    torn = [group for group in plan.together if not stays.keys().isdisjoint(group)]
    all_ = {gate: _ELSEWHERE for group in torn for gate in group} | dict(stays)
    kept = [*plan.kept, *(Kept(gate, reason) for gate, reason in all_.items())]
    return replace(
        plan,
        products=tuple(product for product in plan.products if product.gate not in all_),
        kept=tuple(sorted(kept, key=lambda one: order.index(one.gate))),
        together=tuple(group for group in plan.together if group not in torn),
    )


def _differing(
    model: nn.Module, plan: FoldPlan, called: Called, way: Way, scales: Mapping[str, float]
) -> dict[str, str]:
    """Those of the gates whose scale other parameters would take in this way; why.

    Where the laws are those of a planned way, so is the plan; else it has to come out the same for the
    block alone.
    """
    try:
        there = way()
        by_rows = any(product.rows for product in plan.products if product.gate in scales)
        if not by_rows and any(_laws(planned()) == _laws(there) for planned in called.planned):
            return {}
        here = plan_flat(there, scales)
    except (FoldError, UnseenCallError):
        return dict.fromkeys(scales, _UNKNOWN)
    leads = {gate: group[0] for group in plan.together for gate in group}
    return {
        gate: _ELSEWHERE
        for gate in scales
        if _targets(model, plan, leads.get(gate, gate)) != _targets(called.block, here, gate)
    }


def _laws(flat: Flat) -> Any:
    """All that a plan depends on but the sizes of rows."""
    named = {value.number: source for value, source in flat.parameters.items()}
    calls = [(c.name == MARK and c.arguments["gate"], c.inputs, c.outputs, list(laws(c))) for c in flat.calls]
    return named, flat.outputs, calls


def _targets(model: nn.Module, plan: FoldPlan, gate: str) -> set[tuple[Any, ...]]:
    """What a plan does for a gate, whatever the parameters are called."""
    own = (product for product in plan.products if product.gate == gate)
    return {
        (memory_of(tensor_named(model, one.parameter)), replace(one, parameter="", gate="")) for one in own
    }
