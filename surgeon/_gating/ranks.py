"""Draws that are the same on every rank of a distributed training, ``sync="ranks"``.

The ranks agree once, at the first draw: on a seed, rank 0's, and that they have the same gates and drop
rates. After that nothing is sent. The n-th draw of a gate comes from a generator of its own, seeded by (seed,
gate, n), so what else a rank draws, and how much, does not matter.

``sync="depth"`` shares less: how many branches run, so that no rank waits for another. Let the ``p_l`` of the
gates, in an order that each rank draws for itself, lie one behind another on a line, and ticks at ``u``,
``u + 1``, ... for one ``u`` in [0, 1) of all ranks: a branch runs where a tick falls on its ``p_l``
(systematic sampling; Madow 1949). Each runs with probability ``p_l``, and every rank has as many ticks.

`torch.utils.checkpoint` repeats a forward with the rank's own generator set back. Each draw therefore takes
one number from that generator, as a token: the same token at the same gate means the same draw again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from surgeon._torch import without_compiler
from surgeon.errors import UsageError

Sync = Literal["none", "ranks", "depth"]

_PARTS = 1 << 40
_REMEMBERED = 1024  # draws per gate whose backward may still be to come


def several() -> bool:
    """Whether this process trains with others."""
    return _initialized() and dist.get_world_size() > 1


def _never() -> bool:
    return False


_initialized = dist.is_initialized if dist.is_available() else _never


class Member(Protocol):
    """What is to be known of a gate here."""

    drop_rate: float


@dataclass(eq=False)
class Ranks:
    """What the gates of one model share under ``sync="ranks"`` and ``sync="depth"``.

    Attributes:
        names: Names of their residual adds at `surgeon.apply`, for the message.
        gates: Those gates, in the same order.
        seed: What the ranks agreed on; None before the first draw.
        size: How many ranks agreed.
        tokens: For each gate (by its place in the list) the number of the draw that belongs to a
            token, oldest first.
        counts: How many draws each gate has made.
        sync: Which of the two.
        fates: Under ``"depth"``, which gates run, by place, of the latest draws.
    """

    names: tuple[str, ...] = ()
    gates: list[Member] = field(default_factory=list)
    seed: int | None = None
    size: int = 0
    tokens: dict[int, dict[float, int]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    sync: Sync = "ranks"
    fates: dict[int, frozenset[int]] = field(default_factory=dict, repr=False)

    @without_compiler
    def numbers(self, member: Member, count: int) -> Tensor:
        """The next draw of that gate: so many numbers in [0, 1), in float64 on the CPU.

        Raises:
            UsageError: At the first draw, on every rank: the ranks have other gates or other drop rates.
        """
        gate = self.gates.index(member)  # gates are equal to themselves only
        return self._random(f"{gate} {self._next(gate)}", count)

    @without_compiler
    def runs(self, member: Member) -> bool:
        """Whether the branch of that gate runs in its next draw, under ``"depth"``; raises as `numbers`."""
        gate = self.gates.index(member)
        draw = self._next(gate)
        if draw not in self.fates:
            self.fates[draw] = self._ticked(draw)
            if len(self.fates) > _REMEMBERED:
                del self.fates[next(iter(self.fates))]
        return gate in self.fates[draw]

    def _ticked(self, draw: int) -> frozenset[int]:
        """The gates, by place, on whose ``p_l`` a tick falls."""
        rank = dist.get_rank() if several() else 0
        order = self._random(f"order {rank} {draw}", len(self.gates)).argsort().tolist()
        rates = torch.tensor([1 - self.gates[place].drop_rate for place in order], dtype=torch.float64)
        # In whole parts: sums of floats depend on their order, and so would the number of ticks.
        ends = (rates * _PARTS).round().long().cumsum(0) + int(self._random(f"marks {draw}", 1) * _PARTS)
        ticks = (ends // _PARTS).tolist()
        return frozenset(place for place, a, b in zip(order, [0, *ticks], ticks, strict=False) if b > a)

    def _next(self, gate: int) -> int:
        """The number of the gate's next draw, or of an earlier one that a checkpoint repeats."""
        size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.seed is None or self.size != size:
            self._agree(size)
        token = float(torch.rand((), dtype=torch.float64, device="cpu"))
        known = self.tokens.setdefault(gate, {})
        if token not in known:
            known[token] = self.counts[gate] = self.counts.get(gate, -1) + 1
            if len(known) > _REMEMBERED:
                del known[next(iter(known))]
        return known[token]

    def _random(self, what: str, count: int) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(f"{self.seed} {what}".encode(), digest_size=7).digest(), "big")
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.rand(count, dtype=torch.float64, device="cpu", generator=generator)

    def _agree(self, size: int) -> None:
        with torch.random.fork_rng(devices=()):  # a checkpoint that repeats the first draw agrees on nothing
            seed = int(torch.randint(2**62, (), device="cpu"))
        rates = [(name, gate.drop_rate) for name, gate in zip(self.names, self.gates, strict=True)]
        mine = (seed, rates)
        every: list[Any] = [mine]
        if size > 1:
            every = [None] * size
            dist.all_gather_object(every, mine)
        _check([rates for _, rates in every], self.sync)
        self.seed, self.size = every[0][0], size
        self.tokens, self.counts, self.fates = {}, {}, {}


def _check(every: Sequence[Sequence[tuple[str, float]]], sync: Sync = "ranks") -> None:
    """Refuses ranks that do not have the same gates and rates, and names them."""
    others = [rank for rank, rates in enumerate(every) if rates != every[0]]
    if not others:
        return
    first, other = every[0], every[others[0]]
    pairs = [(a, b) for a, b in zip(first, other, strict=False) if a != b]
    what = f"{len(first)} gates against {len(other)}"
    if pairs:
        (name, rate), (theirs, drops) = pairs[0]
        gate = f"gate {name}" if name == theirs else f"gates {name} and {theirs}"
        what = f"{gate}: drop rate {rate:.6g} against {drops:.6g}"
    ranks = ", ".join(map(str, others))
    raise UsageError(
        f"sync={sync!r}: rank 0 and rank{'s' * (len(others) > 1)} {ranks} have different schedules ({what}); "
        "call surgeon.apply with the same arguments on every rank"
    )
