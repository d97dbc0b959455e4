"""Which branches to delete: the least missed ones, measured together, as deletions interact."""

from collections.abc import Callable, Collection, Sequence

from surgeon._pruning.score import Worth


def choose(
    worth: Callable[[Collection[str]], Worth], names: Sequence[str], count: int, candidates: int
) -> list[str]:
    """Chooses ``count`` of the branches ``names``, one after another, so that the rest loses little.

    At first every branch is left out alone. Then, at each step, the ``candidates`` that did least harm when
    they were last measured are each left out along with those chosen so far, and the best one joins them.

    Args:
        worth: What the network is worth without some branches.
        names: Of all branches, in execution order.
        count: How many to choose, at most all of them.
        candidates: How many are measured again at each step, 1 or more; 1 trusts the first measurement.

    Returns:
        The names, in the order in which they were chosen.
    """
    harm = {name: worth([name]).loss for name in names}
    chosen: list[str] = []
    while len(chosen) < count:
        ranked = sorted((name for name in names if name not in chosen), key=harm.__getitem__)
        tried = ranked[: max(candidates, 1)]
        if chosen and len(tried) > 1:
            harm |= {name: worth([*chosen, name]).loss for name in tried}
        chosen.append(min(tried, key=harm.__getitem__))
    return chosen
