"""Which addition of another trace of a block is the one that carries a gate: the same line of its forward.

Called in another way a block may sum up more, or less. An addition is known by the children and weights that
run for each of its sides; ordinals decide among those alike, as where a forward goes round in a loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._finding.paths import side
from surgeon._finding.residual import additions

_Sides = tuple[frozenset[str], frozenset[str]]


@dataclass(frozen=True, slots=True)
class Traits:
    """What an addition is known by in other traces of its block.

    Attributes:
        sides: Names of the children and weights that run for its left side alone, and for its right.
        code: Why it was refused, if it was.
        turn: How many before it have the same sides and code.
        turn_of_all: How many before it have the same sides.
        alike: How many have the same sides, itself included.
        ordinal: Its place among all additions.
        count: How many additions there are.
    """

    sides: _Sides
    code: str | None
    turn: int
    turn_of_all: int
    alike: int
    ordinal: int
    count: int


def located(flow: Flow) -> tuple[list[Addition], list[Traits]]:
    """Every addition of a trace, and what it is known by; blocks that share the trace share this."""
    if "located" not in flow.shared:
        adds = additions(flow)
        known = [(_sides(flow, add.node), add.code) for add in adds]
        sides = [both for both, _ in known]
        flow.shared["located"] = (
            adds,
            [
                Traits(
                    *known[i],
                    turn=known[:i].count(known[i]),
                    turn_of_all=sides[:i].count(sides[i]),
                    alike=sides.count(sides[i]),
                    ordinal=add.ordinal,
                    count=len(adds),
                )
                for i, add in enumerate(adds)
            ],
        )
    located: tuple[list[Addition], list[Traits]] = flow.shared["located"]
    return located


def again(flow: Flow, wanted: Sequence[Traits], *, all_gated: bool) -> list[Addition | None]:
    """For each addition of another trace the one of this trace that it is; ``None`` if there is none.

    Args:
        flow: This trace.
        wanted: What the additions that carry gates are known by, in order.
        all_gated: Every residual add of the other trace carries one.
    """
    residual = [add for add in located(flow)[0] if add.code is None]
    # Each residual add carries a gate still, whatever its branch runs now.
    there = residual if all_gated and len(residual) == len(wanted) else [None] * len(wanted)
    chosen = [_again(flow, traits, add) for traits, add in zip(wanted, there, strict=True)]
    return [add if add and chosen.count(add) == 1 else None for add in chosen]


def _again(flow: Flow, wanted: Traits, there: Addition | None) -> Addition | None:
    pairs = list(zip(*located(flow), strict=True))
    alike = [(add, traits) for add, traits in pairs if traits.sides == wanted.sides]
    same = [add for add, traits in alike if traits.code == wanted.code]
    if len(same) > wanted.turn:
        return same[wanted.turn]
    if len(alike) == wanted.alike:  # in evaluation it may be refused for another reason
        return alike[wanted.turn_of_all][0]
    if there is not None:
        return there
    # Its branch runs more or less than it did: the one with its number, if it runs some of that.
    if len(pairs) != wanted.count:
        return None
    numbered = ((add, traits) for add, traits in pairs if traits.ordinal == wanted.ordinal)
    return next((add for add, traits in numbered if _akin(traits.sides, wanted.sides)), None)


def _akin(sides: _Sides, others: _Sides) -> bool:
    return all(not (a or b) or a & b for a, b in zip(sides, others, strict=True))


def _sides(flow: Flow, node: fx.Node) -> _Sides:
    left, right = (operand for operand in node.args if isinstance(operand, fx.Node))
    return _named(side(flow, left, right)), _named(side(flow, right, left))


def _named(nodes: Sequence[Any]) -> frozenset[str]:
    return frozenset(str(node.target) for node in nodes if node.op in ("call_module", "get_attr"))
