"""Solving the laws of the fold: exponents that push one gate's scale into parameters.

``solve`` asks for exponent 1 on the branch of a gate (or of several gates of equal scale that share
weights) and 0 behind it. Everything else counts as 0 until a law forces it. Where a product leaves a
choice, the parameter takes the scale before an activation does, which finds the absorbers nearest to the
gate; a dead end goes back to the last choice. Only values that lead to the gate may be scaled: what else
the model computes keeps every number it had.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from surgeon._folding.algebra import Law
from surgeon._folding.balance import STAYS, Balance
from surgeon._folding.flat import Source
from surgeon._folding.recorder import OpCall, Value
from surgeon._tracing.aten import Family, family_of, named

_MOST = 4  # the largest power of a scale worth writing into a weight
_REACHES_SHORTCUT = (
    "the branch reaches its own shortcut without passing a parameter that could take the scale"
)
_CHOICES = 300  # tries per gate; real branches need fewer than ten, and each may be a level of recursion


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What is in the way of a scale."""

    depth: int
    """How many laws lie between it and the gate."""
    reason: str
    call: OpCall | None = None
    """The operator that is to blame, if it is one."""


@dataclass(frozen=True, slots=True)
class NoSolution:
    """Why no exponents exist, and which parameters were tried on the way."""

    reason: str
    tried: frozenset[Value]
    call: OpCall | None = None


Exponents = Mapping[Value, int]
"""Of the parameters that change; all others have exponent 0."""


@dataclass(slots=True)
class _Search:
    """One solve: exponents found so far, and how to take them back."""

    balance: Balance
    gates: frozenset[str]
    equations: list[tuple[dict[int, int], Law, OpCall]]
    touching: dict[int, list[int]]
    exponents: dict[int, int] = field(default_factory=dict)
    depth: dict[int, int] = field(default_factory=dict)
    trail: list[int] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    """Laws that were seen broken with more than one way to mend them."""
    tried: set[Value] = field(default_factory=set)
    obstacles: list[Obstacle] = field(default_factory=list)
    choices: int = 0

    def run(self) -> Exponents | NoSolution:
        """Exponents of the parameters, or the reason nearest to the gate."""
        marks = [call for gate, calls in self.balance.marks.items() if gate in self.gates for call in calls]
        seeds = [(mark, mark.outputs[0], 0) for mark in marks] + [(mark, mark.inputs[0], 1) for mark in marks]
        for mark, value, exponent in seeds:
            if not self._assign(self.balance.root(value), exponent, value, 0, mark):
                return self._refusal()
        if not self._settle([self.balance.root(value) for _, value, _ in seeds]) or not self._choose():
            return self._refusal()
        found = {v: self.exponents.get(self.balance.root(v), 0) for v in self.balance.flat.parameters}
        changed = {value: exponent for value, exponent in found.items() if exponent}
        return changed or NoSolution("the branch is always zero, or no parameter leads to it", frozenset())

    def _refusal(self) -> NoSolution:
        if self.choices >= _CHOICES:
            cut = f"the search for a place to put the scale was cut after {_CHOICES} tries"
            self.obstacles.append(Obstacle(0, cut))
        nearest = min(self.obstacles, key=lambda one: one.depth)
        return NoSolution(nearest.reason, frozenset(self.tried), nearest.call)

    def _assign(self, root: int, exponent: int, entry: Value, depth: int, call: OpCall) -> bool:
        """Give a class its exponent; on a contradiction note why."""
        known = self.exponents.get(root)
        if known == exponent or (root == STAYS and not exponent):
            return True
        if root != STAYS:
            self.tried.update(
                v for v in self.balance.members.get(root, ()) if v in self.balance.flat.parameters
            )
        if known is None and (not exponent or self._allowed(root, exponent)):
            self.exponents[root], self.depth[root] = exponent, depth
            self.trail.append(root)
            return True
        self.obstacles.append(self._why(root, entry, depth, call))
        return False

    def _allowed(self, root: int, exponent: int) -> bool:
        return (
            root != STAYS
            and abs(exponent) <= _MOST
            and all(map(self._inside, self.balance.members.get(root, ())))
        )

    def _inside(self, value: Value) -> bool:
        """Whether a value leads to one of the gates."""
        bits = self.balance.reach[value]
        return any(bits & self.balance.bits[gate] for gate in self.gates)

    def _settle(self, roots: list[int]) -> bool:
        """Follow every consequence of new exponents; False on a contradiction."""
        queue = deque(roots)
        while queue:
            for index in self.touching.get(queue.popleft(), ()):
                terms, _, _ = self.equations[index]
                rest, unknown = self._state(terms)
                if not rest:
                    continue
                if not unknown:
                    self._broken(index)
                    return False
                if len(unknown) > 1:
                    self.open.append(index)
                elif not self._mend(index, unknown[0], rest, queue):
                    return False
        return True

    def _state(self, terms: Mapping[int, int]) -> tuple[int, list[int]]:
        """What the known exponents of a law add up to, and the classes not known yet."""
        rest = sum(c * self.exponents[root] for root, c in terms.items() if root in self.exponents)
        return rest, [root for root in terms if root not in self.exponents]

    def _mend(self, index: int, root: int, rest: int, queue: deque[int]) -> bool:
        """Give one class of a law the exponent that makes it hold."""
        terms, law, call = self.equations[index]
        depth = 1 + max(self.depth.get(other, 0) for other in terms if other in self.exponents)
        exponent, remainder = divmod(-rest, terms[root])
        if remainder:
            reason = f"only a root of the scale would do before {described(call)}"
            self.obstacles.append(Obstacle(depth, reason, call))
            return False
        entry = next(value for value, _ in law.terms if self.balance.root(value) == root)
        if not self._assign(root, exponent, entry, depth, call):
            return False
        queue.append(root)
        return True

    def _broken(self, index: int) -> None:
        terms, _, call = self.equations[index]
        depth = 1 + max(self.depth[root] for root in terms)
        reason = f"the scale would reach both sides of {described(call)}, or neither"
        self.obstacles.append(Obstacle(depth, reason, call))

    def _choose(self) -> bool:
        """Mend the oldest broken law that leaves a choice, and all after it; undo what fails."""
        for index in self.open:
            rest, unknown = self._state(self.equations[index][0])
            if rest:
                break
        else:
            return True
        for root in sorted(unknown, key=self._is_activation):
            self.choices += 1
            if self.choices >= _CHOICES:
                return False
            at, pending, queue = len(self.trail), list(self.open), deque[int]()
            if self._mend(index, root, rest, queue) and self._settle(list(queue)) and self._choose():
                return True
            self.open = pending
            while len(self.trail) > at:
                self.exponents.pop(self.trail.pop())
        return False

    def _is_activation(self, root: int) -> bool:
        """Whether a class holds anything that depends on the model's input."""
        return any(value not in self.balance.fixed for value in self.balance.members.get(root, ()))

    # Words for what went wrong.

    def _why(self, root: int, entry: Value, depth: int, call: OpCall) -> Obstacle:
        """Why a class cannot have the exponent asked of it.

        A class stays because of a pin in it; another one may not be scaled because one of its values does
        not lead to the gate. The nearest of these is to blame.
        """
        if root != STAYS and not self._inside(entry):
            return Obstacle(depth, _outside(None, call), call)
        queue = deque([(entry, not depth)])
        seen = {entry}
        while queue:
            value, ends = queue.popleft()
            links = self.balance.near.get(value, [])
            if any(self._is_shortcut(by) for _, by in links):
                return Obstacle(depth, _REACHES_SHORTCUT)
            if (reason := self._blame(value, ends)) is not None:
                return Obstacle(depth, reason, self.balance.pins[value].call)
            for other, by in links:
                if other in seen or self.balance.root(other) != root:
                    continue
                seen.add(other)
                named = self.balance.flat.parameters.get(value)
                if (root != STAYS or named) and not self._inside(other):
                    return Obstacle(depth, _outside(named, by), by)
                queue.append((other, ends and value in by.outputs and other in by.inputs))
        nowhere = "no parameter of the branch can take the scale without changing something else"
        return Obstacle(depth, nowhere)

    def _is_shortcut(self, call: OpCall) -> bool:
        behind = {mark.outputs[0] for gate in self.gates for mark in self.balance.marks[gate]}
        return not behind.isdisjoint(call.inputs)

    def _blame(self, value: Value, ends: bool) -> str | None:
        pin = self.balance.pins.get(value)
        if pin is None:
            return None
        if pin.call is None:
            return f"the scale would have to go into a value that {pin.why}"
        if ends and value in pin.call.outputs:
            return f"the branch ends in {described(pin.call)}, which {pin.why}"
        return f"the scale would have to pass {described(pin.call)}, which {pin.why}"


def _outside(source: Source | None, call: OpCall) -> str:
    if source is not None:
        return f"the parameter {source.names[0]!r} is also used outside of the branch"
    return f"a value inside the branch is also read outside of it, by {described(call)}"


def solve(balance: Balance, gates: frozenset[str]) -> Exponents | NoSolution:
    """Push the common scale of some gates into parameters.

    Args:
        balance: The merged laws.
        gates: One gate, or several whose scales are the same number.
    """
    linear = [
        (Law(((call.outputs[0], 1), (call.inputs[0], -1))), call)
        for gate, calls in balance.marks.items()
        if gate not in gates
        for call in calls
        if balance.reach.get(call.outputs[0])
    ]
    equations = [(balance.terms(law), law, call) for law, call in (*balance.kept, *linear)]
    touching: dict[int, list[int]] = {}
    for index, (terms, _, _) in enumerate(equations):
        for root in terms:
            touching.setdefault(root, []).append(index)
    return _Search(balance, gates, equations, touching).run()


_SPOKEN = {
    "fused_rms_norm": "rms_norm",
    "safe_softmax": "softmax",
    "linalg_vector_norm": "norm",
    "mm": "matmul",
    "bmm": "matmul",
    "addmm": "linear",
    "surgeon.written": "a write in place",
    "local_scalar_dense": "item",
}


def described(call: OpCall) -> str:
    """An operator as a user knows it, with the module it ran in."""
    return f"{spoken(call)} in {call.module!r}" if call.module else spoken(call)


def spoken(call: OpCall) -> str:
    """An operator as a user knows it."""
    if family_of(call.name) is Family.BATCH_NORMS:
        return "batch_norm"
    name = named(call.name)
    name = _SPOKEN.get(name, name.removeprefix("native_"))
    if name == "hardtanh" and (call.arguments["min_val"], call.arguments["max_val"]) == (0, 6):
        name = "relu6"
    return name
