"""The gate on one residual add: its coin, its correction, its evaluation scale.

With survival probability ``p`` and evaluation scale ``c`` (1 for ``"inverted"``, the scheduled ``p``
for ``"paper"``) a gate computes ``y = shortcut + g * branch(x)``:

* evaluation: ``g = c``; nothing is multiplied when ``c = 1``;
* training, unit ``"batch"``: one coin for the mini-batch. Heads: ``g = c / p``. Tails: the branch does
  not run and the result is the shortcut (Huang et al. 2016, section 3);
* training, unit ``"sample"``, skipping: the branch runs on the rows drawn to survive (`_gating.skip`);
* training, unit ``"sample"``, masking: a Bernoulli mask over the rows, divided by ``p``, times ``c`` (timm's
  ``DropPath`` when ``c = 1``, number for number under the same seed).

The drop rate may change while training runs; ``c`` never does, so evaluation does not drift.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from surgeon._gating.cost import Cost, assumed, measured, pays
from surgeon._gating.ranks import Ranks
from surgeon._gating.regions import Compiler
from surgeon._mark import mark
from surgeon._torch import transformed
from surgeon._tracing.fake import held

Unit = Literal["sample", "batch"]
Scaling = Literal["inverted", "paper"]
Paths = Literal["both", "local", "global"]
Unused = Literal["auto", "zero", "none"]
Rounding = Literal["random", "fixed"]
Branch = Callable[..., Tensor]

PARTS = 1 << 20
CELLS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
"""Drop rates at which a compiled graph's room for rows changes, shared by all gates of a model."""

NOTE = "surgeon_scales"
"""Where the metadata beside a ``state_dict`` notes the evaluation scales of a block's gates."""


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
    columns: "Columns | None" = field(default=None, repr=False)
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


@dataclass(eq=False)
class Columns:
    """What the joins of one network share: the column that a step was given.

    Attributes:
        mode: What is dropped: paths, all but a column, or both in turn.
        count: How many columns the network has: the paths of its widest join.
        lead: The gate that draws for all: the one that runs first.
        drawn: The columns of this step, from 0, the shortest: one for each sample or for all; -1 where paths
            are dropped by themselves. ``None`` before the first step.
    """

    mode: Paths
    count: int
    lead: "Gate | None" = field(default=None, repr=False)
    drawn: Tensor | None = None

    def draw(self, gate: "Gate", rows: int) -> Tensor:
        """The columns of this step, of shape ``(rows,)``; drawn anew where the first join runs."""
        self.lead = self.lead or gate
        if self.drawn is None or gate is self.lead or len(self.drawn) != rows:
            self.drawn = self._drawn(gate, rows)
        return self.drawn

    def _drawn(self, gate: "Gate", rows: int) -> Tensor:
        numbers = gate.numbers(1 + rows)
        columns = (numbers[1:] * self.count).long().clamp(max=self.count - 1)
        by_themselves = {"local": numbers[:1] >= 0, "both": numbers[:1] < 0.5, "global": numbers[:1] < 0}
        return torch.where(by_themselves[self.mode], -1, columns)


@dataclass(eq=False)
class Tally:
    """What one gate drew since it was last asked.

    Attributes:
        draws: How often it drew.
        kept: The sum of the shares of rows that survived, 0 to 1 each; a tensor where a device holds them.
    """

    draws: int = 0
    kept: float | Tensor = 0.0

    def note(self, share: float | Tensor) -> None:
        self.draws, self.kept = self.draws + 1, self.kept + share


@dataclass(eq=False)
class Gate:
    """A gate on one residual add. It holds no parameter and no buffer: a ``state_dict`` never shows it.

    It has no name and no order: both follow from where its block is in a model (`surgeon._gating.gated`).

    Attributes:
        decided: What `surgeon.apply` decided, shared by its gates.
        branch: What was found of its residual add and branch.
        drop_rate: The present drop rate, ``1 - p``, in [0, 1).
        scale: The evaluation scale ``c``.
        settled: A fold has been: it takes no part in training any more.
        leftover: Why it still multiplies after a fold; None if it does not, or if none has been.
        keep: ``p`` as a tensor where the block is. Compiled graphs read it: a new rate compiles nothing.
        room: For how many of `PARTS` rows a compiled graph has room: ``p``, or more while the rate changes.
        gathers: Whether a compiled graph gathers rows if ``by_cost``; a graph asks this, not `room`.
        compiler: What `surgeon.compile` compiles its branch with; None: nothing.
        marked_as: While a fold looks on, the name that stands in the graph in place of the scale.
        tally: What it drew, where a `DepthMeter` counts that.
    """

    decided: Decision
    branch: BranchFacts
    drop_rate: float
    scale: float = 1.0
    settled: bool = False
    leftover: Leftover | None = None
    marked_as: str | None = field(default=None, init=False, repr=False)
    tally: Tally | None = field(default=None, init=False, repr=False)
    types: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    choices: dict[tuple[str, float], bool] = field(default_factory=dict, init=False, repr=False)
    compiler: Compiler | None = field(default=None, init=False, repr=False)
    keep: Tensor = field(init=False, repr=False)
    room: int = field(init=False, repr=False)
    gathers: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.room = round(PARTS * (1 - self.drop_rate))
        self.move(torch.device("cpu"))

    @property
    def columns(self) -> "Columns | None":
        """What a join shares with the others of its network; None if this is a residual add."""
        return self.decided.columns if self.branch.kind == "mean" else None

    @property
    def keeps_eval(self) -> bool:
        """Whether weights were divided by its scale when it was put in; the mean of a join needs none."""
        return self.decided.keep_eval and self.branch.kind != "mean"

    @property
    def survival(self) -> float:
        """The survival probability ``p``."""
        return 1 - self.drop_rate

    def skipping(self, device: str = "cpu", rows: float = math.inf) -> bool:
        """Whether it skips at its present drop rate, on that type of device and for that many rows."""
        if not (self.branch.skips and self.decided.by_cost):
            return self.branch.skips
        chosen = self.choices.get((device, rows))
        if chosen is None:
            # Ranks that draw alike decide alike; and for no batch in particular nothing is measured.
            alike = self.decided.ranks is not None or rows == math.inf
            cost = assumed(device) if alike else measured(device)
            chosen = self.choices[device, rows] = self._pays(cost, self.drop_rate, rows)
        return chosen

    def _pays(self, cost: Cost, rate: float, rows: float) -> bool:
        branch = self.branch
        return pays(cost, rate, rows, branch.flops, branch.moved, statistics=branch.statistics)

    @property
    def folded(self) -> bool:
        """Whether its scale is in the weights, so that it does nothing any more."""
        return self.settled and self.leftover is None

    @property
    def zeroes(self) -> bool:
        """Whether the parameters of a branch that did not run get gradients of zeros."""
        if self.decided.unused == "auto":
            return torch.distributed.is_available() and torch.distributed.is_initialized()
        return self.decided.unused == "zero"

    def set_drop_rate(self, rate: float) -> None:
        """Changes the drop rate from the next forward on; the evaluation scale stays."""
        self.drop_rate = rate
        self.keep.fill_(1 - rate)
        self.make_room(round(PARTS * (1 - rate)))

    def make_room(self, room: int) -> None:
        """Gives a compiled graph room for so many of `PARTS` rows."""
        self.room = room
        self.choices.clear()
        self.gathers = self._pays(assumed(self.keep.device.type), 1 - room / PARTS, math.inf)

    def move(self, device: torch.device) -> None:
        """Puts `keep` on the block's device: a graph that copied it there could not become a CUDA graph."""
        if device.type != "meta":
            with torch.inference_mode(False):
                self.keep = torch.tensor(1 - self.drop_rate, dtype=torch.float32, device=device)
        self.make_room(self.room)

    def settle(self, leftover: Leftover | None = None) -> None:
        """Ends the gate's part in training. Its scale goes to 1, or stays, with the reason."""
        self.set_drop_rate(0.0)
        self.settled, self.leftover = True, leftover
        if leftover is None:
            self.scale = 1.0

    def correction(self) -> float:
        """What a surviving branch is multiplied by in training, ``c / p``; 1 under the paper's rule."""
        survival = 1 - self.drop_rate
        return 1.0 if self.scale == survival else self.scale / survival

    def mask(self, branch: Tensor) -> Tensor:
        """One factor per row (or one for the batch): 0 where the coin falls on dropped, else ``c / p``.

        Draws as timm's ``DropPath`` does, from PyTorch's generator of the branch's device.
        """
        rows, shape = 1, [1] * branch.ndim
        if self.decided.unit == "sample":
            rows = shape[self.branch.dim] = branch.shape[self.branch.dim]
        if self.decided.ranks is not None and not held.open:
            mask = (self.decided.ranks.numbers(self, rows) < self.survival).view(shape).to(branch)
        elif is_compiling():
            keep = self.keep.to(branch.device)
            kept = torch.rand(shape, device=branch.device) < keep
            return (kept * (self.scale / keep)).to(branch.dtype)
        else:
            mask = branch.new_empty(shape).bernoulli_(self.survival)
        if self.tally is not None:
            self._note(mask.detach().float().mean())
        if self.scale == 1.0:
            return mask.div_(self.survival)
        return mask.mul_(self.correction())

    def survives(self) -> bool:
        """Tosses the coin for the whole mini-batch, on the CPU generator: no device is waited for."""
        if held.open:
            return True
        ranks = self.decided.ranks
        if ranks is not None and ranks.sync == "depth":
            kept = ranks.runs(self)
        else:
            kept = self._tosses(1)[0] < 1 - self.drop_rate
        if self.tally is not None:
            self._note(float(kept))
        return kept

    def survivors(self, count: int) -> int:
        """How many of ``count`` rows survive: ``p * count``, rounded up or down so that this is the mean.

        One row of many is no sample to take statistics of: there it is two rows or none, each half the time.
        Fixed rounding goes to the nearest number, which is at least one, or two where statistics are taken.
        """
        if held.open:
            return count
        if self.decided.rounding == "fixed":
            nearest = (2 * self.room * count + PARTS) // (2 * PARTS)
            kept = min(count, max(1 + self.branch.statistics, nearest))
        else:
            toss = self._tosses(2)
            kept = min(count, int((1 - self.drop_rate) * count + toss[0]))
            if self.branch.statistics and kept == 1 < count:
                kept = 2 if toss[1] < 0.5 else 0
        if self.tally is not None:
            self._note(kept / count)
        return kept

    def most(self, count: int) -> int:
        """How many of ``count`` rows a compiled graph runs; those beyond the survivors count for nothing."""
        rows = (self.room * count - count + PARTS - 1) // PARTS  # p B rounded up, but for the error of `room`
        return min(count, max(1 + self.branch.statistics, rows))

    def weights(self, count: int, most: int, device: torch.device) -> Tensor:
        """What ``most`` rows in random order count in a compiled graph: ``c / p``, or 0 beyond the survivors.

        The number of survivors is drawn as by `survivors`, so that each row survives with probability ``p``.
        """
        keep = self.keep.to(device)
        survivors = (keep * count + torch.rand((), device=device)).floor()
        return (torch.arange(most, device=device) < survivors) * (self.scale / keep)

    def rows(self, count: int, kept: int, device: torch.device) -> Tensor:
        """Which ``kept`` of ``count`` rows survive, in ascending order; every such set is equally likely."""
        if self.decided.ranks is None:
            order = torch.randperm(count, device=device)
        else:
            order = self.decided.ranks.numbers(self, count).argsort().to(device)
        return order[:kept].sort().values

    def numbers(self, count: int) -> Tensor:
        """So many numbers in [0, 1), from the CPU's generator or the one that the ranks share."""
        if self.decided.ranks is None:
            return torch.rand(count, dtype=torch.float64, device="cpu")
        return self.decided.ranks.numbers(self, count)

    def _note(self, share: float | Tensor) -> None:
        """Tells the `DepthMeter`; nothing of what compilers and transforms run may get out."""
        if self.tally is not None and not is_compiling() and not transformed():
            self.tally.note(share)

    def _tosses(self, count: int) -> list[float]:
        # Compilers and transforms take no memory from outside that is written to.
        if self.decided.ranks is not None or is_compiling() or transformed():
            return self.numbers(count).tolist()
        return _drawn(count)


class _Purse(threading.local):
    """Memory that coins are tossed into, one piece per number of coins; a thread has its own."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}


_purse = _Purse()


def _drawn(count: int) -> list[float]:
    """So many numbers in [0, 1), those of ``torch.rand(count, dtype=torch.float64)`` on the CPU.

    A fresh tensor for each coin would take a multiple of the time of the coin.
    """
    numbers = _purse.held.get(count)
    if numbers is None:
        with torch.inference_mode(False):
            numbers = _purse.held[count] = torch.empty(count, dtype=torch.float64, device="cpu")
    return numbers.uniform_().tolist()


def make_room(gates: Sequence[Gate]) -> None:
    """To be called when rates have changed: compiled graphs get room for what survives from now on.

    The number of rows is part of a graph, so each change of it compiles the graph anew. While the largest
    rate moves within one of `CELLS` and the others in proportion, there is none. Fixed rounding has no spare
    rows, so there each change of the rate may be one.
    """
    highest = max((gate.drop_rate for gate in gates), default=0.0)
    cell = max(one for one in CELLS if one <= highest)
    for gate in gates:
        if gate.decided.ranks is not None:
            gate.decided.ranks.fates.clear()
        if gate.decided.rounding == "random" and highest:
            gate.make_room(round(PARTS * (1 - gate.drop_rate * cell / highest)))


def open_gate() -> Gate:
    """A gate that never drops and scales nothing: the sum as it was."""
    return Gate(Decision(unit="batch"), BranchFacts(), 0.0)


def masked_add(gate: Gate, shortcut: Tensor, branch: Tensor, onto: str) -> Tensor:
    """Training, the branch computed: ``shortcut + mask * branch``."""
    # A compiled graph must not depend on the rate's value: it would be compiled anew with each change.
    if is_compiling() or gate.drop_rate > 0:
        branch = branch * gate.mask(branch)
    elif gate.scale != 1.0:
        branch = branch * gate.scale
    return combine(shortcut, branch, onto)


def evaluating_add(gate: Gate, shortcut: Tensor, branch: Tensor, onto: str) -> Tensor:
    """Evaluation: ``shortcut + c * branch``; while a fold looks on, a mark instead of the factor."""
    if gate.marked_as is not None:
        branch = mark(branch, gate.marked_as)
    elif gate.scale != 1.0:
        branch = branch * gate.scale
    return combine(shortcut, branch, onto)


def combine(shortcut: Tensor, branch: Tensor, onto: str) -> Tensor:
    """Adds the two sides as the original did: into one, ``"shortcut"`` or ``"branch"``, or apart (``""``)."""
    if not onto:
        return shortcut + branch
    return shortcut.add_(branch) if onto == "shortcut" else branch.add_(shortcut)
