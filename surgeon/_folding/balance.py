"""The laws of a whole flat model, merged into classes of values that share one exponent.

Most laws are equalities and zeros. Merging them leaves one class for everything that must stay, a few
products between classes, and the gates. ``near`` and ``pins`` remember which call joined which values, and
which call made a value stay, so that a refusal can name the nearest obstacle.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from surgeon._folding.algebra import Law
from surgeon._folding.flat import Flat
from surgeon._folding.operators import laws
from surgeon._folding.recorder import OpCall, Value
from surgeon._mark import MARK

STAYS = -1
"""Root of the class of everything that must keep exponent 0."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A value that must stay, by which call (none for a source), and why."""

    call: OpCall | None
    why: str


class Balance:
    """The laws of one flat model, merged."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.marks: dict[str, list[OpCall]] = {}
        for call in flat.calls:
            if call.name == MARK:
                self.marks.setdefault(call.arguments["gate"], []).append(call)
        self.bits = {gate: 2 << place for place, gate in enumerate(self.marks)}
        self.reach = _reach(flat, self.bits)
        """For each value that matters a set of bits: 1 for an output of the model, and those of the gates."""
        self.fixed = independent_of_inputs(flat)
        self.readers: dict[Value, list[OpCall]] = {}
        self.producer: dict[Value, OpCall] = {}
        known = {*flat.parameters, *flat.buffers}
        for call in flat.calls:
            known.update(call.inputs)
            self.producer.update({value: call for value in call.outputs if value not in known})
            known.update(call.outputs)
            for value in dict.fromkeys(call.inputs):
                self.readers.setdefault(value, []).append(call)
        self.pins: dict[Value, Pin] = {}
        self.near: dict[Value, list[tuple[Value, OpCall]]] = {}
        """Which values share a value's exponent, and by which call."""
        self._root: dict[Value, int] = {}
        self._parent: dict[int, int] = {}
        self.kept: list[tuple[Law, OpCall]] = []
        self._merge(list(self._laws()))
        self.members: dict[int, list[Value]] = {}
        for value in self.reach:
            self.members.setdefault(self.root(value), []).append(value)

    def root(self, value: Value) -> int:
        """The class of a value."""
        return self._find(value.number)

    def terms(self, law: Law) -> dict[int, int]:
        """A law in terms of classes; what must stay and what cancels is gone."""
        found: dict[int, int] = {}
        for value, coefficient in law.terms:
            root = self.root(value)
            if root != STAYS:
                found[root] = found.get(root, 0) + coefficient
        return {root: coefficient for root, coefficient in found.items() if coefficient}

    def _find(self, number: int) -> int:
        while (above := self._parent.get(number, number)) != number:
            self._parent[number] = self._parent.get(above, above)
            number = above
        return number

    def _laws(self) -> Iterator[tuple[Law, OpCall]]:
        """Every law between values that matter; pins are noted on the way."""
        for call in self.flat.calls:
            idle = call.outputs and not any(self.reach.get(value) for value in call.outputs)
            if call.name == MARK or idle:
                continue
            for law in laws(call):
                if not all(self.reach.get(value) for value, _ in law.terms):
                    continue
                if len(law.terms) == 1:
                    self.pins.setdefault(law.terms[0][0], Pin(call, law.why))
                else:
                    yield law, call
        for value in self.reach:
            if (source := self._source(value)) is not None:
                self.pins[value] = source

    def _source(self, value: Value) -> Pin | None:
        """Why a value must stay whatever reads it; None where that is for the laws to say."""
        if value in self.flat.outputs:
            return Pin(None, "is an output of the model")
        if name := self.flat.buffers.get(value):
            return Pin(None, f"is the buffer {name!r}, or shares its memory, and must not be written")
        if not value.scalable:
            return Pin(self.producer.get(value), "holds no real numbers")
        if not self._may_scale(value):
            return Pin(None, "comes from outside of the model's parameters")
        return None

    def _may_scale(self, value: Value) -> bool:
        return value in self.producer or value in self.flat.parameters

    def _merge(self, found: list[tuple[Law, OpCall]]) -> None:
        """Join classes until only laws with a choice are left; equalities first, as they say most."""
        for value in self.pins:
            self._parent[self._find(value.number)] = STAYS
        found.sort(key=lambda one: len(one[0].terms))
        while True:
            self.kept = [(law, call) for law, call in found if not self._joined(law, call)]
            if len(self.kept) == len(found):
                return
            found = self.kept

    def _joined(self, law: Law, call: OpCall) -> bool:
        """Whether a law is done with: empty, a zero, or an equality, which are carried out here."""
        values = [value for value, _ in law.terms]
        live = [value for value in values if self.root(value) != STAYS]
        match list(self.terms(law).items()):
            case []:
                self._link(values if len(values) == 2 else [], values, call)
                return True
            case [(root, _)]:
                # A factor pinned by itself is not to blame where another one stays because of something.
                others = [value for value in values if value in live or value not in self.pins]
                self._link(live, others if len(others) > len(live) else values, call)
                self._parent[root] = STAYS
                return True
            case [(one, a), (other, b)] if a == -b:
                self._link(live, live, call)
                self._parent[one] = other
                return True
        return False

    def _link(self, those: list[Value], to: list[Value], call: OpCall) -> None:
        """Note that values stay or go with others because of a call; what stays already is not to blame."""
        for value in those:
            self.near.setdefault(value, []).extend((other, call) for other in to if other != value)


def _reach(flat: Flat, gates: Mapping[str, int]) -> dict[Value, int]:
    """What each value leads to, in bits."""
    reach = dict.fromkeys(flat.outputs, 1)
    for call in reversed(flat.calls):
        bits = 0 if call.outputs else 1  # what Python looked at may decide anything
        for value in call.outputs:
            bits |= reach.get(value, 0)
        if call.name == MARK:
            bits |= gates[call.arguments["gate"]]
        if bits:
            for value in call.inputs:
                reach[value] = reach.get(value, 0) | bits
    return reach


def independent_of_inputs(flat: Flat) -> frozenset[Value]:
    """Values made of parameters and buffers alone."""
    fixed = {*flat.parameters, *flat.buffers}
    for call in flat.calls:
        if fixed.issuperset(call.inputs):
            fixed.update(call.outputs)
    return frozenset(fixed)
