"""The paper's rule without a jump: a pretrained network evaluates after surgery as it did before.

Under ``scaling="paper"`` gate l evaluates ``shortcut + p_l * branch(x)``, which a network trained without
gates does not expect. `divide` runs the fold backwards: the parameters that a fold would multiply by a power
of ``p_l`` are divided by it, so that each branch yields ``branch(x) / p_l`` and the gate's factor makes that
``branch(x)`` again. The laws of the fold (`_folding.algebra`) hold for any positive scale, so the plan is
the fold's own, and a fold afterwards gives back the weights.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from surgeon._folding.fold import commit
from surgeon._folding.planning import plan_gates
from surgeon._gating.gated import Placed
from surgeon.errors import FoldError


def divide(model: nn.Module, gates: Sequence[Placed], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Divides what a fold would multiply, in place: the gated ``model`` evaluates as the ungated one did.

    All of it or nothing: products are taken in float64 and checked before the first is written.

    Args:
        model: The gated model, its weights still those of the plain one.
        gates: Its gates.
        args: Positional arguments of one call; no arithmetic is done on them.
        kwargs: Keyword arguments of the same call.

    Raises:
        FoldError: The scale of a gate fits into no parameter, or a quotient does not fit its type.
    """
    scaled = [one for one in gates if one.gate.scale != 1.0]
    scales = {number: one.gate.scale for number, one in enumerate(scaled)}
    found = plan_gates(model, [one.gate for one in scaled], scales, args, kwargs)
    if found.kept:
        kept = {scaled[one.gate].name: one.reason for one in found.kept}
        listed = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise FoldError(
            f"evaluation cannot be kept: no weight takes the scale of {len(kept)} of {len(gates)} gates "
            f"({listed}). Leave them out with exclude={list(kept)}, or gate with scaling='inverted', which "
            "trains alike and never changes evaluation"
        )
    commit(model, found, {number: 1 / scale for number, scale in scales.items()})


def check_state_is_free(blocks: Sequence[nn.Module]) -> None:
    """Checks that no block has an extra state of its own, whose place in the ``state_dict`` is needed.

    Raises:
        FoldError: One has.
    """
    for block in blocks:
        if type(block).get_extra_state is not nn.Module.get_extra_state:
            raise FoldError(
                f"{type(block).__name__} has an extra state of its own in the state_dict, where "
                f"keep_eval=True notes its scales; leave it out with exclude={type(block).__name__!r}"
            )
