"""Which branches to delete: the least missed ones, measured together, as deletions interact."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from surgeon._pruning.score import Worth
from surgeon.errors import UsageError


@dataclass(frozen=True, slots=True)
class Costs:
    """What a network costs and what each branch has of that, in one unit, as `surgeon.latency` measures it.

    Attributes:
        full: Of the whole network.
        branches: What is saved without a branch, by the name of its residual add.
        unit: In words.
    """

    full: float
    branches: Mapping[str, float]
    unit: str = "ms"

    def without(self, gone: Collection[str]) -> float:
        """What the network costs without these branches: each saves what it saves alone."""
        return self.full - sum(self.branches.get(name, 0.0) for name in gone)

    def check(self, budget: float) -> None:
        """Checks that a budget can be met.

        Raises:
            UsageError: It cannot, not even without all branches; with the nearest that can.
        """
        least = self.without([name for name, saved in self.branches.items() if saved > 0])
        if budget < least:
            raise UsageError(
                f"a budget of {budget:.4g} {self.unit} cannot be met: the whole network takes "
                f"{self.full:.4g}, and without every branch that can be deleted {least:.4g} are left; give "
                "that or more"
            )


def choose(
    worth: Callable[[Collection[str]], Worth],
    names: Sequence[str],
    enough: Callable[[Sequence[str]], bool],
    candidates: int,
    saves: Mapping[str, float] | None = None,
) -> list[str]:
    """Chooses some of the branches ``names``, one after another, so that the rest loses little.

    At first every branch is left out alone. Then, at each step, the ``candidates`` that did least harm when
    they were last measured are each left out along with those chosen so far, and the best one joins them.

    Args:
        worth: What the network is worth without some branches.
        names: Of all branches, in execution order.
        enough: Whether those that were chosen will do.
        candidates: How many are measured again at each step, 1 or more; 1 trusts the first measurement.
        saves: What each branch saves: harm then counts per unit saved. What saves nothing is not chosen.

    Returns:
        The names, in the order in which they were chosen; all there are if none will do.
    """
    chosen: list[str] = []
    if enough(chosen):
        return chosen
    left = [name for name in names if saves is None or saves.get(name, 0.0) > 0]
    whole = worth([]).loss
    harm = {name: worth([name]).loss - whole for name in left}

    def price(name: str) -> float:
        saved = 1.0 if saves is None else saves[name]
        return harm[name] / saved if harm[name] > 0 else harm[name] * saved

    while left and not enough(chosen):
        tried = sorted(left, key=price)[: max(candidates, 1)]
        if chosen and len(tried) > 1:
            before = worth(chosen).loss
            harm |= {name: worth([*chosen, name]).loss - before for name in tried}
        best = min(tried, key=price)
        left.remove(best)
        chosen.append(best)
    return chosen
