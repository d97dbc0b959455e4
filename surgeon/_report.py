"""What surgeon says of a model: the state of its gates, as data and as text."""

from dataclasses import dataclass
from typing import Any

from surgeon._text import table


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


@dataclass(frozen=True, slots=True)
class Status:
    """The gates of a model, in execution order.

    Attributes:
        gates: One entry per gate.
        schedule: The schedule asked of `surgeon.apply`, in words.
        column: Of a network with joins, the column that the last step ran, from 1, the shortest; one for each
            sample where each has its own; ``None`` in it where paths were dropped by themselves.
    """

    gates: tuple[GateStatus, ...]
    schedule: str
    column: tuple[int | None, ...] = ()

    @property
    def expected_depth(self) -> float:
        """Branches that run per training forward on average: the sum of the survival probabilities."""
        return sum(gate.survival for gate in self.gates)

    @property
    def expected_flops(self) -> float:
        """FLOPs of a training step over those of the ungated model, in (0, 1]; masks save none."""
        return 1 - sum(gate.flops_share * (1 - gate.survival) for gate in self.gates if gate.skips)

    def __str__(self) -> str:
        rows = [
            (g.name, g.block_type, g.kind, f"{g.survival:.4f}", f"{g.flops_share:.1%}", g.note)
            for g in self.gates
        ]
        head = ("gate", "block", "kind", "p_l", "FLOPs", "")
        first = self.gates[0] if self.gates else None
        title = f"{len(self.gates)} gates" + (
            f", {self.schedule}, unit {first.unit}, {first.scaling}" if first else ""
        )
        if first and first.keep_eval:
            title += ", weights divided to keep evaluation"
        depth = f"expected depth {self.expected_depth:.2f} of {len(self.gates)}"
        foot = f"{depth}, training FLOPs {self.expected_flops:.1%}"
        return "\n".join([title, *table(head, rows), foot])


def schedule_text(schedule: Any) -> str:
    """A schedule in words: its name, or what it is."""
    if isinstance(schedule, str):
        return schedule
    if not callable(schedule):
        return "explicit rates"
    return f"callable {getattr(schedule, '__name__', type(schedule).__name__)}"
