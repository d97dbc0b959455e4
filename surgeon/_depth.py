"""How deep a network with gates is: the law of the number of branches that run, and of path lengths.

A draw runs branch l with probability ``p_l``, each by itself, so the number of branches that run follows
the *Poisson-binomial* law of ``p_1 .. p_L`` (Huang et al. 2016, section 4, "expected network depth").

Veit et al. 2016 read a residual network as a sum of paths: each residual add doubles them, through its
branch or past it. So a network of L adds has ``2^L`` paths, and the number of branches on one of them, its
length, is binomial. With gates, the expected number of paths of length k that are alive is the coefficient
of ``z^k`` in ``(1 + p_1 z) ... (1 + p_L z)``. Divided by the sum, that is the Poisson-binomial law of
``p_l / (1 + p_l)``.
"""

import bisect
import itertools
from collections.abc import Iterable


def poisson_binomial(probabilities: Iterable[float]) -> list[float]:
    """The law of the number of successes in independent trials.

    Args:
        probabilities: Of success in each of L trials, in [0, 1].

    Returns:
        L + 1 numbers that add up to 1: the probability of 0, 1, ... L successes.
    """
    law = [1.0]
    for p in probabilities:
        law = [stay * (1 - p) + come * p for stay, come in zip([*law, 0.0], [0.0, *law], strict=True)]
    return law


def depth_law(survival: Iterable[float]) -> list[float]:
    """The probability that 0, 1, ... L branches run in one draw, given the survival probabilities."""
    return poisson_binomial(survival)


def path_lengths(survival: Iterable[float]) -> list[float]:
    """The share of paths that pass through 0, 1, ... L branches; all ones is the network without gates."""
    return poisson_binomial(p / (1 + p) for p in survival)


def interval(law: list[float], mass: float = 0.95) -> tuple[int, int]:
    """The quantiles between which ``mass`` of a law lies, as much of the rest below as above."""
    cut = (1 - mass) / 2
    below = list(itertools.accumulate(law))
    return bisect.bisect_left(below, cut), min(bisect.bisect_left(below, 1 - cut), len(law) - 1)
