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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from surgeon._gating.cost import Cost, assumed, measured, pays
from surgeon._gating.decided import BranchFacts, Columns, Decision, Leftover, Watch
from surgeon._gating.regions import Compiler
from surgeon._torch import transformed
from surgeon._tracing.fake import coins

PARTS = 1 << 20
CELLS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
"""Drop rates at which a compiled graph's room for rows changes, shared by all gates of a model."""


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
        watch: Who looks at its sides in training, if anybody does.
    """

    decided: Decision
    branch: BranchFacts
    drop_rate: float
    scale: float = 1.0
    settled: bool = False
    leftover: Leftover | None = None
    marked_as: str | None = field(default=None, init=False, repr=False)
    tally: Tally | None = field(default=None, init=False, repr=False)
    watch: Watch | None = field(default=None, init=False, repr=False)
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
    def columns(self) -> Columns | None:
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
        shape, rate = [1] * branch.ndim, self.drop_rate
        if self.decided.unit == "sample":
            shape[self.branch.dim] = branch.shape[self.branch.dim]
        if (ranks := self.decided.ranks) is not None and not coins.stopped:
            mask = (ranks.numbers(self, math.prod(shape)) < 1 - rate).view(shape).to(branch)
        elif is_compiling():
            return self._mask_in_graph(branch, shape)
        else:
            mask = branch.new_empty(shape).bernoulli_(1 - rate)
        if self.tally is not None:
            self._note(mask.detach().float().mean())
        return mask.div_(1 - rate) if self.scale == 1.0 else mask.mul_(self.correction())

    def _mask_in_graph(self, branch: Tensor, shape: list[int]) -> Tensor:
        keep = self.keep.to(branch.device)
        kept = torch.rand(shape, device=branch.device) < keep
        return (kept * (self.scale / keep)).to(branch.dtype)

    def survives(self) -> bool:
        """Tosses the coin for the whole mini-batch, on the CPU generator: no device is waited for."""
        if coins.stopped:
            return True
        if (ranks := self.decided.ranks) is not None and ranks.sync == "depth":
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
        if coins.stopped:
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
        """Which ``kept`` of ``count`` rows survive, in any order; every such set is equally likely."""
        if self.decided.ranks is None:
            order = torch.randperm(count, device=device)
        else:
            order = self.decided.ranks.numbers(self, count).argsort().to(device)
        return order[:kept]

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
