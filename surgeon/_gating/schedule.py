"""Schedules: the rule that gives each block its drop rate.

Blocks are counted l = 1..L in the order in which they first run; the residual adds of one block (two in a
transformer block) share its rate, as in the paper, timm and torchvision. A module in whose own forward more
than four residual adds follow on one another is a stack of blocks written in one place: there each of them
counts as a block, and adds side by side share a rate.
With final drop rate r:

* ``"linear"``: ``1 - p_l = (l / L) * r``, the paper's linear decay (Huang et al. 2016, equation 4, whose
  ``p_L`` is ``1 - r``); the last block drops with r, the first with ``r / L``;
* ``"linear-from-zero"``: ``(l - 1) / (L - 1) * r``, timm's ``calculate_drop_path_rates``, number for
  number; the first block never drops;
* ``"uniform"``: r everywhere;
* a callable ``(l, L) -> drop rate``;
* a sequence with one drop rate per block, or one per residual add.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from surgeon._meant import did_you_mean, meant, nearest
from surgeon.errors import UsageError

Schedule = str | Callable[[int, int], float] | Sequence[float]

NAMES = ("linear", "linear-from-zero", "uniform")
_MOST_ADDS = 4


def drop_rates(
    schedule: Schedule,
    drop_rate: float,
    blocks: Sequence[str],
    names: Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    depths: Sequence[int] = (),
) -> list[float]:
    """Computes one drop rate per residual add.

    Args:
        schedule: A name in `NAMES`, a callable or a sequence; see the module's text.
        drop_rate: Final drop rate r in [0, 1); unused by callables and sequences.
        blocks: For each residual add in execution order, the block it belongs to.
        names: For each residual add, its own name; needed for ``overrides`` only.
        overrides: Glob patterns on add or block names, each with a rate that replaces the scheduled one;
            the last pattern that matches counts.
        depths: For each residual add, how many of its block follow on one another up to it; by default they
            all do.

    Returns:
        The rates, in the order of ``blocks``, each in [0, 1).

    Raises:
        UsageError: An unknown name, a rate outside [0, 1) or NaN, a sequence of another length, a pattern
            that matches nothing.
    """
    schedule = schedule.tolist() if hasattr(schedule, "tolist") else schedule  # NumPy, torch
    units = _counted(blocks, depths)
    order = {unit: index for index, unit in enumerate(dict.fromkeys(units), start=1)}
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        rates = _explicit(schedule, units, order)
    else:
        per_block = _scheduled(schedule, drop_rate, len(order))
        rates = [per_block[order[unit] - 1] for unit in units]
    for pattern, rate in (overrides or {}).items():
        hits = [i for i, (n, b) in enumerate(zip(names, blocks, strict=True)) if _matches(pattern, n, b)]
        if not hits:
            raise UsageError(
                f"overrides: {pattern!r} matches no residual add. {meant(pattern, (*names, *blocks))}"
                "surgeon.find(model) lists them"
            )
        for i in hits:
            rates[i] = rate
    return [
        checked_rate(rate, f"drop rate of {block or 'the model'}")
        for rate, block in zip(rates, blocks, strict=True)
    ]


def places(blocks: Sequence[str], depths: Sequence[int] = ()) -> list[int]:
    """For each residual add its l, the number of its block among the blocks, from 1; arguments as above."""
    units = _counted(blocks, depths)
    order = {unit: index for index, unit in enumerate(dict.fromkeys(units), start=1)}
    return [order[unit] for unit in units]


def _counted(blocks: Sequence[str], depths: Sequence[int]) -> list[Any]:
    return _units(blocks, depths or [blocks[: i + 1].count(block) for i, block in enumerate(blocks)])


def _units(blocks: Sequence[str], depths: Sequence[int]) -> list[str | tuple[str, int]]:
    """What each residual add belongs to that counts as a block: its block, or a level of a stack of them."""
    deepest: dict[str, int] = {}
    for block, depth in zip(blocks, depths, strict=True):
        deepest[block] = max(depth, deepest.get(block, 0))
    return [b if deepest[b] <= _MOST_ADDS else (b, d) for b, d in zip(blocks, depths, strict=True)]


def checked_rate(rate: float, what: str = "drop_rate") -> float:
    """``rate`` as a float in [0, 1).

    Raises:
        UsageError: It is not a number, NaN, or outside [0, 1).
    """
    try:
        value = float(rate)
    except (TypeError, ValueError):
        raise UsageError(f"{what} is {rate!r}; give a number in [0, 1)") from None
    if math.isnan(value) or not 0 <= value < 1:
        raise UsageError(
            f"{what} is {value}; a drop rate lies in [0, 1) (0 never drops, 0.5 drops every second)"
        )
    return value


def _explicit(rates: Sequence[float], blocks: Sequence[Any], order: Mapping[Any, int]) -> list[float]:
    if len(rates) == len(blocks):
        return list(rates)
    if len(rates) == len(order):
        return [rates[order[block] - 1] for block in blocks]
    raise UsageError(
        f"the schedule has {len(rates)} rates; this model needs {len(order)} (one per block)"
        + (f" or {len(blocks)} (one per residual add)" if len(order) != len(blocks) else "")
    )


def _scheduled(schedule: str | Callable[[int, int], float], r: float, count: int) -> list[float]:
    if callable(schedule):
        return [schedule(l, count) for l in range(1, count + 1)]
    r = checked_rate(r)
    if schedule == "linear":
        return [l / count * r for l in range(1, count + 1)]
    if schedule == "linear-from-zero":
        # In float32 as timm does it, so that the very same numbers come out.
        rates: list[float] = torch.linspace(0, r, count, dtype=torch.float32, device="cpu").tolist()
        return rates
    if schedule == "uniform":
        return [r] * count
    raise UsageError(_no_schedule(schedule))


def _no_schedule(given: object) -> str:
    if isinstance(given, int | float):
        return f"the schedule is {given!r}, a number; write drop_rate={given!r}"
    close = nearest(given.replace("_", "-"), NAMES) if isinstance(given, str) else []
    question = f". {did_you_mean([repr(name) for name in close])}".rstrip(" .")
    return (
        f"unknown schedule {given!r}; known are {', '.join(map(repr, NAMES))}, "
        f"a callable (l, L) -> drop rate, or a sequence of drop rates{question}"
    )


def _matches(pattern: str, name: str, block: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(block, pattern)
