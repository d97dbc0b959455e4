"""The operations on a model: residual adds found, gates put in, looked at and re-scheduled."""

import numbers
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from surgeon._finding.analysis import analyse
from surgeon._finding.findings import Findings
from surgeon._gating.block import gate_block, ungate_block
from surgeon._gating.decided import Decision
from surgeon._gating.gate import make_room
from surgeon._gating.gated import Placed, grouped_gates, placed_gates
from surgeon._gating.schedule import Schedule, drop_rates
from surgeon._meant import says_the_call
from surgeon._plain import check_plain, held_elsewhere
from surgeon._plan import Prepared, Settings, asks, prepared, replanned
from surgeon._report import Plan, Status, gate_status, schedule_text
from surgeon._scales import check_state_is_free, divide
from surgeon._tracing.example import Example, inputs
from surgeon.errors import NoResidualsError, NotGatedError, UsageError

NewRate = float | Sequence[float] | Callable[[int, int], float]


@says_the_call
def find(
    model: nn.Module,
    example: Example = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Findings:
    """Finds the residual adds of a model and the reason why each other addition is none.

    The model is left as it was; no arithmetic is done (one forward on fake tensors).

    Args:
        model: Any ``torch.nn.Module``.
        example: A tensor, a tuple of positional arguments or a dict of keyword arguments to call it with;
            by default two images of the size in ``model.pretrained_cfg``, else 3 x 224 x 224.
        include: As in `apply`.
        exclude: As in `apply`.

    Returns:
        The findings; printing them gives a table.

    Raises:
        RecordError: The model does not run on the example.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> found = surgeon.find(model)
        >>> [add.name for add in found.residuals]
        ['layer1.0.add', 'layer2.0.add', 'layer3.0.add', 'layer4.0.add']
    """
    check_plain(model)
    return analyse(model, *inputs(model, example), include, exclude).findings


@asks(Settings)
def apply(model: nn.Module, settings: Settings) -> nn.Module:  # noqa: D417 - the arguments are what it asks for
    """Puts a stochastic-depth gate on every residual add of ``model``, in place, and returns ``model``.

    The object, its class, its methods, its ``state_dict`` keys and its Parameters stay what they were; with
    the default scaling evaluation is bit-identical. Stochastic depth that the model already had on a gated
    branch is stood in for, never doubled.

    Args:
        model: The plain model, before it is wrapped (DDP, FSDP, EMA, ``torch.compile``).
        schedule: ``"linear"`` (Huang et al. 2016: block l of L drops with ``l / L * drop_rate``),
            ``"linear-from-zero"`` (timm: ``(l - 1) / (L - 1) * drop_rate``), ``"uniform"``, a callable
            ``(l, L) -> drop rate``, or a sequence of drop rates (one per block or one per residual add). Or a
            plan that `plan` made for this model: it says all the rest.
        drop_rate: Final drop rate r in [0, 1).
        unit: ``"sample"`` (what is dropped is a row of the batch) or ``"batch"`` (the whole mini-batch, as in
            the paper).
        scaling: ``"inverted"`` (survivors are divided by p in training, evaluation is untouched) or
            ``"paper"`` (survivors as they are, evaluation multiplies the branch by p).
        keep_eval: With ``"paper"``, for a pretrained model: divide the weights that a fold would multiply by
            p, so that evaluation stays what it was, to rounding, and `fold` gives these weights back. The
            weights have another meaning then, so the ``state_dict`` notes the scales in an ``_extra_state``
            of each gated block; `load` converts between such weights and stock ones. Under ``"inverted"``
            evaluation is kept anyway.
        skip: Whether what is dropped is left uncomputed, forward and backward. True: wherever it can be;
            `status` notes where it cannot. ``"auto"``: with unit ``"batch"`` likewise; with unit ``"sample"``
            only where that takes less time than a mask. False: everything is computed and masked; with unit
            ``"sample"`` these are the draws and numbers of timm's own drop path.
        unused: What the parameters of a branch get in a step that did not run it on any row: ``"none"``
            (``grad`` stays None: the optimizer passes over them), ``"zero"`` (zeros, as in the code of Huang
            et al.: momentum and weight decay go on), or ``"auto"``: zeros where `torch.distributed` is
            initialised, as DDP needs a gradient of every parameter on every rank.
        sync: ``"none"``: every rank of a distributed training draws for itself. ``"ranks"``: all draw the
            same, from a seed of rank 0; the ranks' drop rates are compared at the first draw. ``"depth"``,
            with unit ``"batch"``: each draws which branches run, and as many run on every rank, so that none
            waits for another. How many is the mean of the schedule, rounded up or down.
        rounding: With unit ``"sample"``, how many of ``B`` rows a branch runs on. ``"random"``: ``p B``,
            rounded up or down at random so that each row survives with probability p. ``"fixed"``: always the
            nearest number k, at least 1 (2 where the branch takes statistics over the batch), with survivors
            multiplied by ``c B / k``; at small batches k may be all of them, and nothing drops.
        paths: What is dropped at joins, which take the mean of several paths (FractalNet). ``"local"``: each
            path by itself, but never all; ``"global"``: all but one column of the network, drawn in each
            step; ``"both"``: one or the other, half of the steps each, as in the paper. Evaluation is the
            mean of all paths under either scaling.
        include: Glob patterns on names of residual adds, blocks or block classes: only these. The full name
            of a refused addition, or its reason code, brings that in; where either side of the sum may be
            the shortcut, ``:left`` or ``:right`` behind a pattern tells which.
        exclude: Patterns of what to leave out.
        overrides: Pattern -> drop rate, on top of the schedule.
        example: As in `find`.

    Returns:
        ``model``.

    Raises:
        UsageError: An argument is out of range, unknown, or a pattern matches nothing; ``paths="global"`` for
            a model without joins; a plan was made for another model, or the model has changed since.
        AlreadyGatedError: The model has gates; `remove` takes them out.
        WrappedModelError: The model is wrapped.
        NoResidualsError: There is nothing to gate; the message counts the reasons.
        RecordError: The model does not run on the example.
        FoldError: ``keep_eval``, and no weight can take the scale of some gate; nothing was changed.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> surgeon.apply(model, "linear", drop_rate=0.4, unit="batch", exclude="layer4*") is model
        True
        >>> [round(gate.drop_rate, 3) for gate in surgeon.status(model).gates]
        [0.133, 0.267, 0.4]
    """
    if isinstance(settings.schedule, Plan):
        if told := replace(settings, schedule="linear").given():
            raise UsageError(
                f"a plan has settled everything; leave out {', '.join(told)}, or make a new plan"
            )
        work = replanned(model, settings.schedule)
    else:
        work = prepared(model, settings)
    elsewhere = held_elsewhere(model) if work.decided.scaling == "paper" else ()
    install(model, work)
    for held in elsewhere:
        warning = f"{held}. scaling='inverted' trains alike and needs no scales"
        warnings.warn(warning, stacklevel=3)  # for the line that called what `asks` made
    return model


def install(model: nn.Module, work: Prepared) -> None:
    """Carries out a plan; all of it or, where that fails, nothing.

    Raises:
        NoResidualsError: There is nothing to gate.
        FoldError: ``keep_eval``, and no weight can take the scale of some gate.
    """
    if not work.blocks:
        raise NoResidualsError(_nothing_found(model, work.plan))
    keeps = work.decided.keep_eval
    if keeps:
        check_state_is_free([block.module for block, _ in work.blocks])
    try:
        for block, gating in work.blocks:
            gate_block(block.module, gating)
        if keeps:
            divide(model, placed_gates(model), work.args, work.kwargs)
    except BaseException:  # an interrupt, too, leaves all of it or nothing
        for block, _ in work.blocks:
            ungate_block(block.module)
        raise


@says_the_call
def status(model: nn.Module) -> Status:
    """The gates of ``model`` as they stand, in execution order; the model is only read.

    Raises:
        NotGatedError: The model has no gates.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5)
        >>> surgeon.status(model).expected_depth
        2.75
    """
    placed = placed_gates(model)
    if not placed:
        raise NotGatedError("the model has no gates; surgeon.apply(model) puts them in")
    schedules = dict.fromkeys(one.gate.decided.schedule for one in placed)
    gates = [gate_status(one.name, one.block_name, one.block, one.gate) for one in placed]
    columns = [one.gate.columns for one in placed if one.gate.columns]
    drawn = columns[-1].drawn if columns else None
    numbered = () if drawn is None else tuple(None if c < 0 else c + 1 for c in drawn.tolist())
    return Status(tuple(gates), ", ".join(schedules), numbered)


@says_the_call
def set_drop_rate(
    model: nn.Module,
    rate: NewRate,
    *,
    overrides: Mapping[str, float] | None = None,
) -> nn.Module:
    """Changes the drop rates of a gated model in place, from its next forward on, and returns ``model``.

    Evaluation does not change: the evaluation scale of a gate is fixed when it is put in.

    Args:
        model: A gated model.
        rate: A final drop rate in [0, 1) for the schedule that the gates follow (named schedules only), or a
            new schedule: a sequence of rates or a callable, as in `apply`. Blocks are counted as they are
            now; where several networks with gates of their own are built into one, each is counted by itself.
        overrides: Pattern -> drop rate, on top of that; None keeps those of `apply`, ``{}`` drops them.

    Raises:
        UsageError: A rate outside [0, 1), one number for gates made with explicit rates, or an override that
            matches nothing.
        NotGatedError: The model has no gates, or a fold has left nothing of them but multiplications.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5)
        >>> model = surgeon.set_drop_rate(model, 0.2)
        >>> surgeon.status(model).gates[-1].drop_rate
        0.2
    """
    groups = grouped_gates(model)
    if not groups:
        raise NotGatedError("the model has no gates; surgeon.apply(model) puts them in")
    if all(one.gate.settled for group in groups for one in group):
        raise NotGatedError(
            "the model is folded: what is left of its gates multiplies in evaluation and drops nothing. "
            "surgeon.remove takes that out as well, surgeon.apply then puts gates in"
        )
    for placed, value, decided in list(_new_rates(groups, rate, overrides)):
        if not placed.gate.settled:
            placed.gate.set_drop_rate(value)
            placed.gate.decided = decided
    for group in groups:
        make_room([placed.gate for placed in group if not placed.gate.settled])
    return model


def strayed(model: nn.Module, rate: float) -> list[str]:
    """The gates that would evaluate otherwise than the paper's rule has it, if training ended at this rate.

    Evaluation goes on multiplying by the survival probability that a gate was put in with.
    """
    new = _new_rates(grouped_gates(model), rate, None)
    return [
        placed.name
        for placed, value, decided in new
        if decided.scaling == "paper" and abs(placed.gate.scale - (1 - value)) > _SAME
    ]


_SAME = 1e-6


def _new_rates(
    groups: Sequence[Sequence[Placed]], rate: NewRate, overrides: Mapping[str, float] | None
) -> Iterator[tuple[Placed, float, Decision]]:
    """Each gate with a new drop rate, and what is decided of it from then on; nothing is changed."""
    if isinstance(rate, str):
        raise UsageError(f"rate is {rate!r}; give a number, a sequence of drop rates or a callable")
    for group in groups:
        rates, decided = _rescheduled(group, rate, overrides)
        for placed, value in zip(group, rates, strict=True):
            yield placed, value, decided


def _rescheduled(
    group: Sequence[Placed],
    rate: NewRate,
    overrides: Mapping[str, float] | None,
) -> tuple[list[float], Decision]:
    """The drop rates of gates that one schedule counts, and what is decided of them from now on."""
    decided = group[0].gate.decided
    schedule: Schedule
    if not isinstance(rate, float | numbers.Real):
        schedule, final = rate, 0.0
    elif decided.named:
        schedule, final = decided.named, float(rate)
    else:
        raise UsageError(f"the gates follow {decided.schedule}; give a sequence of drop rates or a callable")
    over = dict(decided.overrides if overrides is None else overrides)
    blocks, names = [one.block_name for one in group], [one.name for one in group]
    rates = drop_rates(schedule, final, blocks, names, over, [one.gate.branch.depth for one in group])
    return rates, replace(decided, schedule=schedule_text(schedule), overrides=tuple(over.items()))


def _nothing_found(model: nn.Module, plan: Plan) -> str:
    reasons = Counter(refusal.reason for refusal in plan.refused)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    kind = type(model).__name__
    if not reasons:
        return f"{kind} performs no addition of two activations, so it has no residual add to gate"
    return f"{kind} has no residual add to gate; its additions: {listed}"
