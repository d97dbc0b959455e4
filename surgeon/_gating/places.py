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
class Mark:
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


def located(flow: Flow) -> tuple[list[Addition], list[Mark]]:
    """Every addition of a trace, and what it is known by; blocks that share the trace share this."""
    if "located" not in flow.shared:
        found = additions(flow)
        known = [(_sides(flow, a.node), a.code) for a in found]
        sides, count = [s for s, _ in known], len(found)
        marks = [
            Mark(*one, known[:i].count(one), sides[:i].count(one[0]), sides.count(one[0]), a.ordinal, count)
            for i, (a, one) in enumerate(zip(found, known, strict=True))
        ]
        flow.shared["located"] = found, marks
    located: tuple[list[Addition], list[Mark]] = flow.shared["located"]
    return located


def again(flow: Flow, marks: Sequence[Mark], *, complete: bool) -> list[Addition | None]:
    """For each mark of another trace the addition of this one that it belongs to; ``None`` if there is none.

    Args:
        flow: This trace.
        marks: Of the additions that carry gates, in order.
        complete: Every residual add of the other trace carries one.
    """
    found, known = located(flow)
    plain = [a for a in found if a.code is None]
    # Each residual add carries a gate still, whatever its branch runs now.
    there = plain if complete and len(plain) == len(marks) else [None] * len(marks)
    chosen = [_again(mark, found, known, one) for mark, one in zip(marks, there, strict=True)]
    return [a if a and chosen.count(a) == 1 else None for a in chosen]


def _again(
    mark: Mark, found: Sequence[Addition], known: Sequence[Mark], there: Addition | None
) -> Addition | None:
    alike = [(a, m) for a, m in zip(found, known, strict=True) if m.sides == mark.sides]
    same = [a for a, m in alike if m.code == mark.code]
    if len(same) > mark.turn:
        return same[mark.turn]
    if len(alike) == mark.alike:  # in evaluation it may be refused for another reason
        return alike[mark.turn_of_all][0]
    if there is not None:
        return there
    # Its branch runs more or less than it did: the one in its place, if it runs some of that.
    if len(found) != mark.count:
        return None
    same_place = ((a, m) for a, m in zip(found, known, strict=True) if m.ordinal == mark.ordinal)
    return next((a for a, m in same_place if _akin(m.sides, mark.sides)), None)


def _akin(sides: _Sides, others: _Sides) -> bool:
    return all(not (a or b) or a & b for a, b in zip(sides, others, strict=True))


def _sides(flow: Flow, node: fx.Node) -> _Sides:
    left, right = (operand for operand in node.args if isinstance(operand, fx.Node))
    return _named(side(flow, left, right)), _named(side(flow, right, left))


def _named(nodes: Sequence[Any]) -> frozenset[str]:
    return frozenset(str(node.target) for node in nodes if node.op in ("call_module", "get_attr"))
