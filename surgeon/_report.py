"""What surgeon says of gates: those that a plan puts in, and those that a model has, as data and drawn."""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from surgeon._finding.findings import Refusal
from surgeon._gating.decided import Leftover
from surgeon._gating.gate import Gate
from surgeon._gating.joins import survival
from surgeon._text import Listed, Part, count

_SHOWN_GROUPS = 12


@dataclass(frozen=True, slots=True)
class GateStatus:
    """One gate as it stands.

    Attributes:
        name, block, block_type, kind: As in `Residual`.
        drop_rate: The present drop rate, in [0, 1).
        survival: The survival probability ``p_l = 1 - drop_rate``; of a join, that of one of its paths.
        scale: What evaluation multiplies the branch by.
        unit: ``"sample"`` or ``"batch"``.
        scaling: ``"inverted"`` or ``"paper"``.
        flops_share: FLOPs of the branch over those of the model, in [0, 1].
        skips: Whether a dropped branch is not computed.
        note: What is special about this gate; ``""`` if nothing.
        keep_eval: Whether the weights were divided by ``scale`` when the gate was put in.
        obstacle: After a fold, the operator that keeps the scale out of the weights, such as ``"silu"``.
    """

    name: str
    block: str
    block_type: str
    kind: str
    drop_rate: float
    survival: float
    scale: float
    unit: str
    scaling: str
    flops_share: float
    skips: bool
    note: str
    keep_eval: bool = False
    obstacle: str = ""

    @property
    def drifts(self) -> bool:
        """Whether evaluation multiplies by another number than the present survival probability (paper)."""
        return self.scaling == "paper" and abs(self.scale - self.survival) > 1e-6


@dataclass(frozen=True, slots=True)
class PlannedGate(GateStatus):
    """One gate that a plan puts in.

    Attributes:
        shortcut, branch, replaces, shape, parameters, activations, paths: As in `Residual`.
        place: The l of the schedules' formulas: the number of its block, from 1.
    """

    shortcut: str = ""
    branch: str = ""
    replaces: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    parameters: int = 0
    activations: int = 0
    paths: int = 0
    place: int = 0


class _Gates(Listed[Any]):
    """Gates in execution order, and what they come to together."""

    __slots__ = ()
    gates: tuple[GateStatus, ...]
    schedule: str

    def _entries(self) -> Sequence[Any]:
        return self.gates

    @property
    def expected_depth(self) -> float:
        """Branches that run per training forward on average: the sum of the survival probabilities."""
        return sum(gate.survival for gate in self.gates)

    @property
    def expected_flops(self) -> float:
        """FLOPs of a training step over those of the ungated model, in (0, 1]; masks save none."""
        return 1 - sum(gate.flops_share * (1 - gate.survival) for gate in self.gates if gate.skips)

    @property
    def scales(self) -> dict[str, float]:
        """The evaluation scale of each gate that has one, by its name: what a checkpoint has to note."""
        return {gate.name: gate.scale for gate in self.gates if gate.scale != 1.0}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "gates": [asdict(gate) for gate in self.gates],
            "schedule": self.schedule,
            "expected_depth": self.expected_depth,
            "expected_flops": self.expected_flops,
        }

    def _totals(self) -> Part:
        first, last = self.gates[0], self.gates[-1]
        masks = "" if any(gate.skips for gate in self.gates) else f": unit {first.unit} masks"
        share = self.expected_depth / len(self)
        kept = ", weights divided to keep evaluation" if first.keep_eval else ""
        rate = f"{self.schedule}, last drop rate {last.drop_rate:g}"
        branches = count(len(self), "branch", "branches")
        lines = (
            f"schedule           {rate}, unit {first.unit}, scaling {first.scaling}{kept}",
            f"expected depth     {self.expected_depth:.2f} of {branches}, {share:.0%}",
            f"expected training  {self.expected_flops:.1%} of the plain network's FLOPs{masks}",
        )
        return Part(lines=lines)


@dataclass(frozen=True, slots=True)
class Status(_Gates):
    """The gates of a model as they stand, in execution order; iterating gives them.

    Attributes:
        gates: One entry per gate.
        schedule: The schedule that they follow, in words.
        column: Of a network with joins, the column that the last step ran, from 1, the shortest; one for each
            sample where each has its own; ``None`` in it where paths were dropped by themselves.
    """

    gates: tuple[GateStatus, ...]
    schedule: str
    column: tuple[int | None, ...] = ()

    def parts(self) -> Sequence[Part]:
        """A table of the gates, and the totals."""
        columns = {
            "gate": [gate.name for gate in self],
            "block": [gate.block_type for gate in self],
            "kind": [gate.kind for gate in self],
            "p_l": [f"{gate.survival:.4f}" for gate in self],
            "evaluates x": [f"{gate.scale:.4f}" for gate in self] if any(g.drifts for g in self) else [],
            "FLOPs": [f"{gate.flops_share:.1%}" for gate in self],
            "note": [gate.note for gate in self] if any(g.note for g in self) else [],
        }
        return _tabled(count(len(self), "gate"), columns), self._totals()


@dataclass(frozen=True, slots=True)
class Plan(_Gates):
    """What `surgeon.apply` will do to a model; iterating gives the gates. The model is not changed yet.

    Attributes:
        gates: One entry per gate that goes in, in execution order.
        refused: Every other addition, with its reason.
        schedule: The schedule, in words.
        flops: FLOPs of one forward of the whole model on the example.
        activations: Bytes of the tensors that this forward makes.
        settings: What `surgeon.plan` was asked for.
        made_for: The modules and weights of the model.
        model: The model.
    """

    gates: tuple[PlannedGate, ...]
    refused: tuple[Refusal, ...]
    schedule: str
    flops: int
    activations: int
    settings: Any = field(repr=False, compare=False)
    made_for: tuple[Any, ...] = field(repr=False)
    model: weakref.ref[nn.Module] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        refused = [asdict(refusal) for refusal in self.refused]
        # Not super(): a dataclass with slots is another class than the one that it was written as.
        return {
            **_Gates.to_dict(self),
            "refused": refused,
            "flops": self.flops,
            "activations": self.activations,
        }

    def parts(self, *, every: bool = False) -> Sequence[Part]:
        """A table of the gates, what is left alone, and the totals.

        Args:
            every: List each addition that is left alone; else one line per reason and class of block.
        """
        columns = {
            "gate": [gate.name for gate in self.gates],
            "block": [gate.block_type for gate in self.gates],
            "kind": [gate.kind for gate in self.gates],
            "shortcut": [gate.shortcut for gate in self.gates],
            "p_l": [f"{gate.survival:.3f}" for gate in self.gates],
            "FLOPs": [f"{gate.flops_share:.1%}" for gate in self.gates],
            "dropped": ["skipped" if gate.skips else "masked" for gate in self.gates],
            "note": [gate.note for gate in self.gates] if any(g.note for g in self.gates) else [],
        }
        gates = _tabled(count(len(self.gates), "residual add"), columns)
        totals = (self._totals(),) if self.gates else ()
        return (gates, *left_alone(self.refused, every=every), *totals)


def gate_status(name: str, block_name: str, block: nn.Module, gate: Gate) -> GateStatus:
    """A gate as it stands, under the name that it has now."""
    device = next((p.device.type for p in block.parameters()), "cpu")
    leftover = gate.leftover or Leftover(gate.branch.note)
    return GateStatus(
        name=name,
        block=block_name,
        block_type=type(block).__name__,
        kind=gate.branch.kind,
        drop_rate=gate.drop_rate,
        survival=survival(gate),
        scale=gate.scale,
        unit=gate.decided.unit,
        scaling=gate.decided.scaling,
        flops_share=gate.branch.flops_share,
        skips=gate.skipping(device),
        note=leftover.reason,
        keep_eval=gate.keeps_eval,
        obstacle=leftover.operator,
    )


def structure(model: nn.Module) -> tuple[Any, ...]:
    """The modules and weights of a model, in a form to compare: a plan holds for these alone."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    weights = [(name, id(p), tuple(p.shape), p.dtype) for name, p in model.named_parameters()]
    return *modules, *weights


def left_alone(refused: Sequence[Refusal], *, every: bool) -> tuple[Part, ...]:
    """The additions left alone with their reasons: one line per reason and class of block, or every one."""
    if not refused:
        return ()
    title = f"left alone: {count(len(refused), 'addition')}"
    if every:
        rows = tuple((one.name, one.block_type, one.reason) for one in refused)
        return (Part(title, ("addition", "block", "reason"), rows),)
    first: dict[tuple[str, str], Refusal] = {}
    for one in refused:
        first.setdefault((one.block_type, one.reason), one)
    groups = Counter((one.block_type, one.reason) for one in refused).most_common()
    shown, rest = groups[:_SHOWN_GROUPS], groups[_SHOWN_GROUPS:]
    table = tuple((str(n), key[0], first[key].name, key[1]) for key, n in shown)
    more = sum(n for _, n in rest)
    lines = (
        (f"and {more} more of {count(len(rest), 'other kind')}; `surgeon inspect -v` shows all",)
        if rest
        else ()
    )
    return (Part(title, ("count", "block", "for example", "reason"), table, frozenset({"count"}), lines),)


def schedule_text(schedule: Any) -> str:
    """A schedule in words: its name, or what it is."""
    if isinstance(schedule, str):
        return schedule
    if not callable(schedule):
        return "explicit rates"
    return f"callable {getattr(schedule, '__name__', type(schedule).__name__)}"


def _tabled(title: str, columns: dict[str, list[str]]) -> Part:
    """A table of the columns that hold something."""
    filled = {name: cells for name, cells in columns.items() if cells}
    rows = tuple(zip(*filled.values(), strict=True))
    return Part(title, tuple(filled), rows, frozenset({"p_l", "FLOPs", "evaluates x"}))
