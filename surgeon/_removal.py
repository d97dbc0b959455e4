"""Gates out: folded into the weights, or taken off."""

import warnings
from collections.abc import Sequence

from torch import nn

from surgeon._copy import copied
from surgeon._folding.fold import FoldPlan, commit
from surgeon._gating.block import check_class, ungate_block
from surgeon._gating.decided import Leftover
from surgeon._gating.gated import Placed, gated_blocks, is_gated, placed_gates, recorded_inputs
from surgeon._meant import says_the_call
from surgeon._note import renew_note
from surgeon._scales import plan_gates, scales_of
from surgeon._tracing.example import Example
from surgeon.errors import FoldError, NotGatedError


@says_the_call
def fold(model: nn.Module, *, inplace: bool = False, example: Example = None) -> nn.Module:
    """Writes every evaluation scale into the branch's own weights and takes the gates out.

    ``model`` is left as it is and a folded copy returned, unless ``inplace``. What comes out is stock: its
    class, keys and forward are those of the model before `apply`, and its evaluation equals that of the gated
    model to rounding. With ``scaling="inverted"`` there is no scale to write, and no weight changes. Where no
    weight can take a scale (a branch that ends in SiLU, say), the gate stays as one multiplication: a warning
    and `status` of the result name it with the reason.

    The weights are found by one evaluating call on the example. Where a gated block has been called in other
    ways since `apply` (with an optional argument, say), a gate folds only if the same weights take its scale
    in those, too. What no gated block has seen does not count: a path that a layer inside a block takes for
    other sizes than the example's, or the model around the blocks for other sizes or values, is not looked
    at. Where values decide inside a block what runs (a mixture of experts), its gates stay multiplications.

    Args:
        model: A gated model.
        inplace: Change and return ``model`` itself.
        example: As in `find`; by default the example that `apply` recorded.

    Raises:
        NotGatedError: The model has no gates.
        WrappedModelError: Something else has been put onto a gated block since `apply`.
        FoldError: The model could not be analysed, or a product is not finite; nothing was changed.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5, scaling="paper")
        >>> images = torch.randn(2, 3, 160, 160)
        >>> plain = surgeon.fold(model).eval()
        >>> torch.allclose(plain(images), model.eval()(images), atol=1e-4)
        True
        >>> timm.create_model("test_resnet", num_classes=10).load_state_dict(plain.state_dict())
        <All keys matched successfully>
    """
    gates = placed_gates(model)
    if not gates:
        raise NotGatedError("the model has no gates; there is nothing to fold")
    _check_classes(model)
    plan = _plan(model, gates, example)
    if plan.kept:
        told = f"{len(plan.kept)} of {len(gates)} gates keep one multiplication: {_listed(plan)}"
        warnings.warn(told, stacklevel=3)
    return _settled(model if inplace else copied(model), plan, gates)


@says_the_call
def remove(model: nn.Module) -> nn.Module:
    """Takes every gate out of ``model`` in place and returns ``model``, as it was before `apply`.

    Under ``scaling="paper"`` this drops the evaluation scales; `fold` keeps them. Weights that were divided
    for ``keep_eval=True`` are multiplied again, as `fold` does: evaluation stays, and the weights are those
    from before `apply`, or what training has made of them, to rounding.

    Raises:
        NotGatedError: The model has no gates.
        WrappedModelError: Something else has been put onto a gated block since `apply`.
        FoldError: With ``keep_eval=True`` alone: as for `fold`, or a branch was changed since so that no
            weight takes its scale any more. Nothing was changed.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5)
        >>> type(surgeon.remove(model)).__name__
        'ResNet'
    """
    if not is_gated(model):
        raise NotGatedError("the model has no gates; there is nothing to remove")
    _check_classes(model)
    gates = placed_gates(model)
    if any(one.gate.keeps_eval for one in gates):
        plan = _plan(model, gates, None)
        if plan.kept:
            raise FoldError(
                f"the gates cannot be removed: no weight takes the scale of {len(plan.kept)} of {len(gates)} "
                f"any more ({_listed(plan)}), and the weights were divided by it (keep_eval=True). "
                "surgeon.fold(model) keeps one multiplication for each"
            )
        return _settled(model, plan, gates)
    for _, block, _ in list(gated_blocks(model)):
        ungate_block(block)
    renew_note(model)
    return model


def _plan(model: nn.Module, gates: Sequence[Placed], example: Example) -> FoldPlan:
    """Which weights take the scales of the gates."""
    scales = scales_of(gates)
    if not scales:
        return FoldPlan((), ())
    args, kwargs = recorded_inputs(model, gates[0].gate.decided, example)
    return plan_gates(model, gates, scales, args, kwargs)


def _listed(plan: FoldPlan) -> str:
    return "; ".join(f"{kept.gate}: {kept.reason}" for kept in plan.kept)


def _settled(target: nn.Module, plan: FoldPlan, gates: Sequence[Placed]) -> nn.Module:
    """Carries out a plan for ``gates`` on their model or a copy of it, in place."""
    commit(target, plan, scales_of(gates))
    stays = {kept.gate: Leftover(kept.reason, kept.operator) for kept in plan.kept}
    for one in placed_gates(target):
        one.gate.settle(stays.get(one.name))
    for _, block, gating in list(gated_blocks(target)):
        if all(gate.folded for gate in gating.gates):
            ungate_block(block)
    renew_note(target)
    return target


def _check_classes(model: nn.Module) -> None:
    for name, block, _ in gated_blocks(model):
        check_class(name, block)
