"""What is settled about gates: decided by the user, found of their branches, left over by a fold."""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from surgeon._gating.ranks import Ranks

Unit = Literal["sample", "batch"]
Scaling = Literal["inverted", "paper"]
Paths = Literal["both", "local", "global"]
Unused = Literal["auto", "zero", "none"]
Rounding = Literal["random", "fixed"]


class Draws(Protocol):
    """What is to be known of a gate here."""

    def numbers(self, count: int) -> Tensor:
        """So many numbers in [0, 1)."""
        ...


class Watch(Protocol):
    """Looks at the two sides of a residual add before they are added, where the branch runs."""

    def see(self, shortcut: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """What is added instead, of the same numbers; the branch is as it was before any factor."""
        ...


@dataclass(eq=False)
class Columns:
    """What the joins of one network share: the column that a step was given.

    Attributes:
        mode: What is dropped: paths, all but a column, or both in turn.
        count: How many columns the network has: the paths of its widest join.
        lead: What draws for all: the gate that runs first.
        drawn: The columns of this step, from 0, the shortest: one for each sample or for all; -1 where paths
            are dropped by themselves. ``None`` before the first step.
    """

    mode: Paths
    count: int
    lead: Draws | None = field(default=None, repr=False)
    drawn: Tensor | None = None

    def draw(self, gate: Draws, rows: int) -> Tensor:
        """The columns of this step, of shape ``(rows,)``; drawn anew where the first join runs."""
        self.lead = self.lead or gate
        if self.drawn is None or gate is self.lead or len(self.drawn) != rows:
            self.drawn = self._drawn(gate, rows)
        return self.drawn

    def _drawn(self, gate: Draws, rows: int) -> Tensor:
        numbers = gate.numbers(1 + rows)
        columns = (numbers[1:] * self.count).long().clamp(max=self.count - 1)
        by_themselves = {"local": numbers[:1] >= 0, "both": numbers[:1] < 0.5, "global": numbers[:1] < 0}
        return torch.where(by_themselves[self.mode], -1, columns)


@dataclass(frozen=True, eq=False)
class Decision:
    """What one call of `surgeon.apply` decided for all of its gates, which share it.

    Attributes:
        unit: What one coin decides: each sample of the batch, or the mini-batch.
        scaling: Where the correction goes.
        schedule: The present schedule in words; its name, if it has one.
        named: The named schedule by which a final drop rate counts, the latest; ``""`` if none was given.
        overrides: Pattern and drop rate, as given.
        by_cost: A branch is left uncomputed only where the arithmetic saved outweighs handling rows.
        unused: What the parameters of a branch that did not run at all get: zero gradients, none, or zero
            where `torch.distributed` is in use.
        keep_eval: The weights were divided by the evaluation scales, so that evaluation stayed.
        columns: What the joins of the network share.
        rounding: How the number of rows that survive follows from ``p B``.
        ranks: What ``sync="ranks"`` or ``"depth"`` shares among the gates; None where each rank draws alone.
        ran: Names of the gated residual adds in the order in which they ran on the example.
        args, kwargs: The example, its tensors on the meta device: shapes and types, no numbers.
        dtype: Type of the model's weights then; None if it had none.
    """

    unit: Unit = "sample"
    scaling: Scaling = "inverted"
    schedule: str = "linear"
    named: str = ""
    overrides: tuple[tuple[str, float], ...] = ()
    by_cost: bool = False
    unused: Unused = "auto"
    keep_eval: bool = False
    columns: Columns | None = field(default=None, repr=False)
    rounding: Rounding = "random"
    ranks: Ranks | None = field(default=None, repr=False)
    ran: tuple[str, ...] = field(default=(), repr=False)
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: dict[str, Any] = field(default_factory=dict, repr=False)
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class BranchFacts:
    """What was found of one gate's residual add and its branch.

    Attributes:
        ordinal: The add's place among the additions of its block.
        kind: ``"identity"`` or ``"projection"``; ``"left"`` or ``"right"`` where ``include`` told the side of
            the shortcut; ``"mean"`` for a join of paths, ``"concat"`` for new features.
        depth: Its place in the longest chain of residual adds of its block, from 1.
        flops_share: FLOPs of the branch over those of the whole model, in [0, 1].
        skips: Whether a dropped branch can be left uncomputed.
        flops: FLOPs of the branch's forward on one row.
        moved: Bytes of one row of what the branch reads and of the shortcut.
        statistics: It computes statistics over its rows, so it never runs on a single one of many.
        dim: The dimension along which samples lie; where a gate skips it is 0.
        note: Why it is computed also when dropped, or what was assumed; ``""`` otherwise.
        paths: Of a join, how many paths it has.
    """

    ordinal: int = 0
    kind: str = "identity"
    depth: int = 1
    flops_share: float = 0.0
    skips: bool = False
    flops: int = 0
    moved: int = 0
    statistics: bool = False
    dim: int = 0
    note: str = ""
    paths: int = 0


@dataclass(frozen=True, slots=True)
class Leftover:
    """Why a fold has left one multiplication of a gate.

    Attributes:
        reason: In words.
        operator: The operator that keeps the scale out of the weights, such as ``"silu"``; ``""`` if none.
    """

    reason: str
    operator: str = ""
