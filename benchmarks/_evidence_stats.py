"""Paired differences between arms: bootstrap intervals, McNemar's test, the smallest effect to be seen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
_RESAMPLES = 20_000


@dataclass(frozen=True)
class Paired:
    """An arm against arm none, by pairs of one seed.

    Attributes:
        differences: Arm minus none, one for each seed.
        low: Lower end of the interval of the mean.
        high: Upper end.
        only: Answers that this arm alone had right, over all seeds.
        only_none: Answers that none alone had right.
        p: Of McNemar's exact test on these two numbers; 1 where neither has any.
    """

    differences: tuple[float, ...]
    low: float
    high: float
    only: int = 0
    only_none: int = 0
    p: float = 1.0

    @property
    def mean(self) -> float:
        """Of the differences."""
        return float(np.mean(self.differences))

    @property
    def visible(self) -> float:
        """The smallest effect that such pairs show four times out of five, by the scatter that was found."""
        return smallest(len(self.differences), float(np.std(self.differences, ddof=1)))

    def verdict(self, up: str = "helps", down: str = "harms") -> str:
        """In words: a difference is seen where the interval and Student's both leave zero out.

        With few pairs the bootstrap alone does so too often: with three, whenever all have one sign.
        """
        n = len(self.differences)
        if n < 3:
            return "too few pairs to say"
        student = stats.t.ppf(0.975, n - 1) * float(np.std(self.differences, ddof=1)) / math.sqrt(n)
        if self.low <= 0 <= self.high or abs(self.mean) <= student:
            return "no difference seen"
        return up if self.mean > 0 else down


def paired(
    rows: Sequence[Row], base: Sequence[Row], name: str = "test", what: str = "accuracy"
) -> Paired | None:
    """Compares two arms on one test set, by the seeds that both have; None where there is no such seed.

    `base` is arm none.
    """
    other = {row["seed"]: row[name] for row in base}
    pairs = [(row[name], other[row["seed"]]) for row in rows if row["seed"] in other]
    if not pairs:
        return None
    differences = tuple(a[what] - b[what] for a, b in pairs)
    only = sum(int((right(a) & ~right(b)).sum()) for a, b in pairs)
    only_none = sum(int((right(b) & ~right(a)).sum()) for a, b in pairs)
    p = stats.binomtest(only, only + only_none).pvalue if only + only_none else 1.0
    return Paired(differences, *interval(differences), only, only_none, float(p))


def compared(values: Mapping[int, float], base: Mapping[int, float]) -> Paired | None:
    """The same for one number for each seed."""
    differences = tuple(value - base[seed] for seed, value in values.items() if seed in base)
    return Paired(differences, *interval(differences)) if differences else None


def right(measured: Row) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which answers were right."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(measured["right"]), np.uint8))
    return bits[: measured["of"]].astype(bool)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the mean: the percentile bootstrap, expanded for small samples.

    The plain one is too narrow by a normal quantile for one of Student's t and by sqrt((n - 1) / n) for the
    scatter (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5). One value has no
    interval: NaN.
    """
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    means = np.asarray(values, float)[draws].mean(1)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def smallest(pairs: int, scatter: float) -> float:
    """The mean difference that a two-sided paired t test at 5 % finds with a chance of 80 %.

    Args:
        pairs: Two or more.
        scatter: Standard deviation of one difference.
    """
    if pairs < 2:
        return math.nan
    limit, low, high = stats.t.ppf(0.975, pairs - 1), 0.0, 100.0
    for _ in range(60):  # halving: the chance grows with the effect
        middle = (low + high) / 2
        low, high = (middle, high) if stats.nct.sf(limit, pairs - 1, middle) < 0.8 else (low, middle)
    return scatter * high / math.sqrt(pairs)
