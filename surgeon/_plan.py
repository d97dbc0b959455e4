"""What `surgeon.apply` will do, before it does it."""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

from torch import Tensor, nn

from surgeon._finding.analysis import Analysis, Block, analyse, most_paths
from surgeon._gating.decided import BranchFacts, Columns, Decision, Paths, Rounding, Scaling, Unit, Unused
from surgeon._gating.forwards import Gating
from surgeon._gating.gate import Gate
from surgeon._gating.gated import first_weight, is_gated
from surgeon._gating.preparation import prepare
from surgeon._gating.ranks import Ranks, Sync
from surgeon._gating.schedule import Schedule, drop_rates, places
from surgeon._meant import right_call
from surgeon._plain import check_plain
from surgeon._report import Plan, PlannedGate, gate_status, schedule_text, structure
from surgeon._torch import pytree
from surgeon._tracing.example import Example, inputs
from surgeon._tracing.undisturbed import collected_later
from surgeon.errors import AlreadyGatedError, UsageError

_TOLD = ("shortcut", "branch", "replaces", "shape", "parameters", "activations", "paths")


@dataclass(frozen=True, eq=False)
class Settings:
    """What `surgeon.plan` and `surgeon.apply` are asked for; the attributes are their arguments."""

    schedule: Schedule | Plan = "linear"
    _: KW_ONLY
    drop_rate: float = 0.5
    unit: Unit = "sample"
    scaling: Scaling = "inverted"
    keep_eval: bool = False
    skip: bool | Literal["auto"] = "auto"
    unused: Unused = "auto"
    sync: Sync = "none"
    rounding: Rounding = "random"
    paths: Paths = "both"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Mapping[str, float] | None = None
    example: Example = None

    def given(self) -> list[str]:
        """The names of those that are not the defaults."""
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return [n for n, value, usual in values if isinstance(value, Tensor) or value != usual]

    def check(self) -> None:
        """Checks what can be checked without a model.

        Raises:
            UsageError: An argument is out of range or unknown.
        """
        known = {"unit": Unit, "scaling": Scaling, "unused": Unused, "sync": Sync, "paths": Paths}
        known["rounding"] = Rounding
        for what, values in known.items():
            if getattr(self, what) not in get_args(values):
                listed = ", ".join(map(repr, get_args(values)))
                raise UsageError(f"{what} is {getattr(self, what)!r}; known are {listed}")
        if self.skip not in (True, False, "auto"):
            raise UsageError(f"skip is {self.skip!r}; give True, False or 'auto'")
        self._check_draws()
        if isinstance(self.rule, str):
            drop_rates(self.rule, self.drop_rate, ["any"])

    @property
    def rule(self) -> Schedule:
        """The schedule.

        Raises:
            UsageError: It is a plan.
        """
        if isinstance(self.schedule, Plan):
            raise UsageError("the schedule is a plan, which surgeon.apply(model, plan) carries out")
        return self.schedule

    def _check_draws(self) -> None:
        if self.rounding == "fixed" and (self.unit == "batch" or self.skip is False):
            rows = "unit='batch', one coin for all rows"
            given = rows if self.unit == "batch" else "skip=False, a coin per row"
            raise UsageError(
                f"rounding='fixed' is a number of rows to run, and this is {given}; leave it out"
            )
        if self.sync == "depth" and self.unit != "batch":
            raise UsageError(
                "sync='depth' is about whole branches, and this is unit='sample'; give unit='batch'"
            )


Given = ParamSpec("Given")
Result = TypeVar("Result")
OfSettings = Callable[[nn.Module, Settings], Result]
OfArguments = Callable[Concatenate[nn.Module, Given], Result]


def asks(settings: Callable[Given, Settings]) -> Callable[[OfSettings[Result]], OfArguments[Given, Result]]:
    """Lets a function of a model and its settings take these as arguments."""
    listed = inspect.signature(settings).parameters.values()

    def asking(function: OfSettings[Result]) -> OfArguments[Given, Result]:
        own = inspect.signature(function)
        signature = own.replace(parameters=[next(iter(own.parameters.values())), *listed])

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Result:
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise UsageError(right_call(function, signature, args, kwargs, error)) from None
            model, *rest = given.args
            return function(model, settings(*rest, **given.kwargs))

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return asking


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, and what it takes to carry it out.

    Attributes:
        plan: The plan.
        blocks: Each block with its gated forwards.
        decided: What the gates share.
        args, kwargs: The example.
    """

    plan: Plan
    blocks: Sequence[tuple[Block, Gating]]
    decided: Decision
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@asks(Settings)
def plan(model: nn.Module, settings: Settings) -> Plan:
    """Says what `apply` would do with the same arguments; the model is left as it was.

    Printing the plan gives a table: every residual add with its survival probability, whether a dropped
    branch is skipped or masked and why, its share of the FLOPs, and why each other addition gets no gate.
    ``surgeon.apply(model, plan)`` carries it out. All arguments are those of `apply`.

    Returns:
        The plan; it is empty where there is nothing to gate.

    Raises:
        UsageError: An argument is out of range, unknown, or a pattern matches nothing.
        AlreadyGatedError: The model has gates; `status` shows them.
        WrappedModelError: The model is wrapped.
        RecordError: The model does not run on the example.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> plan = surgeon.plan(model, "linear", drop_rate=0.4)
        >>> [round(gate.survival, 2) for gate in plan.gates]
        [0.9, 0.8, 0.7, 0.6]
        >>> surgeon.apply(model, plan) is model
        True
    """
    return prepared(model, settings).plan


@collected_later()
def prepared(model: nn.Module, settings: Settings) -> Prepared:
    """Makes a plan, and the gated forwards that it asks for; the model is left as it was.

    Raises:
        SurgeonError: As for `plan`.
    """
    check_plain(model)
    settings.check()
    if is_gated(model):
        raise AlreadyGatedError("the model already has gates; call surgeon.remove(model) first")
    args, kwargs = inputs(model, settings.example)
    analysis = analyse(model, args, kwargs, settings.include, settings.exclude)
    decided = _decision(model, analysis, settings, args, kwargs)
    gates = _gates(analysis, settings, decided)
    blocks = prepare(analysis, gates) if gates else []
    rows = []
    found = [(block, residual) for block in analysis.blocks for residual in block.residuals]
    numbers = places([r.block for _, r in found], [r.depth for _, r in found])
    for (block, residual), place in zip(found, numbers, strict=True):
        row = gate_status(residual.name, block.name, block.module, gates[residual.name])
        told = {name: getattr(residual, name) for name in _TOLD}
        rows.append(PlannedGate(**{f.name: getattr(row, f.name) for f in fields(row)}, **told, place=place))
    made = Plan(
        tuple(rows),
        analysis.refused,
        decided.schedule,
        analysis.recording.flops,
        sum(op.made for op in analysis.recording.log.ops),
        settings,
        structure(model),
        weakref.ref(model),
    )
    return Prepared(made, blocks, decided, args, kwargs)


def replanned(model: nn.Module, plan: Plan) -> Prepared:
    """The same plan made again, to be carried out; the model is left as it was.

    Raises:
        UsageError: The plan was made for another model, or the model has changed since.
        SurgeonError: As for `plan`.
    """
    if plan.model() is not model:
        raise UsageError(
            f"the plan was made for another model than this {type(model).__name__}; make one for it with "
            "surgeon.plan(model, ...), or give apply the arguments of the plan"
        )
    again = prepared(model, plan.settings) if plan.made_for == structure(model) else None
    if again is None or again.plan != plan:
        raise UsageError(
            f"the {type(model).__name__} has changed since the plan was made{_difference(plan, again)}; make "
            "a new plan with surgeon.plan(model, ...)"
        )
    return again


def _difference(old: Plan, again: Prepared | None) -> str:
    if again is None:
        return " (it has other modules or weights)"
    pairs = zip(old.gates, again.plan.gates, strict=False)
    changed = [one.name for one, other in pairs if one != other]
    return f" (first at {changed[0]})" if changed else ""


def _decision(
    model: nn.Module, analysis: Analysis, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Decision:
    names = tuple(residual.name for block in analysis.blocks for residual in block.residuals)
    shapes = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    weight = first_weight(model)
    return Decision(
        unit=settings.unit,
        scaling=settings.scaling,
        schedule=schedule_text(settings.rule),
        named=settings.rule if isinstance(settings.rule, str) else "",
        overrides=tuple((settings.overrides or {}).items()),
        by_cost=settings.skip == "auto" and settings.unit == "sample",
        unused=settings.unused,
        keep_eval=settings.keep_eval and settings.scaling == "paper",
        columns=_columns(model, analysis, settings.paths),
        rounding=settings.rounding,
        ranks=Ranks(names, sync=settings.sync) if settings.sync != "none" else None,
        ran=names,
        args=shapes[0],
        kwargs=shapes[1],
        dtype=None if weight is None else weight.dtype,
    )


def _gates(analysis: Analysis, settings: Settings, decided: Decision) -> dict[str, Gate]:
    """The gates by the name of their residual add, nothing found of their branches yet."""
    adds = [pair for block in analysis.blocks for pair in zip(block.residuals, block.found, strict=True)]
    if not adds:
        return {}
    residuals = [residual for residual, _ in adds]
    blocks, depths = [r.block for r in residuals], [r.depth for r in residuals]
    rates = drop_rates(settings.rule, settings.drop_rate, blocks, decided.ran, settings.overrides, depths)
    flops, gates = max(analysis.recording.flops, 1), dict[str, Gate]()
    for (residual, addition), rate in zip(adds, rates, strict=True):
        share = residual.flops / flops
        branch = BranchFacts(
            addition.ordinal,
            residual.kind,
            residual.depth,
            share,
            skips=bool(settings.skip),
            paths=residual.paths,
        )
        plain = decided.scaling == "inverted" or residual.kind == "mean"
        scale = 1.0 if plain else 1 - rate
        gates[residual.name] = Gate(decided, branch, rate, scale)
    if decided.ranks is not None:
        decided.ranks.gates += gates.values()
    return gates


def _columns(model: nn.Module, analysis: Analysis, paths: Paths) -> Columns:
    count = most_paths(analysis)
    if paths == "global" and count < 2:
        raise UsageError(
            f"paths='global' keeps one column of a network in each step, and {type(model).__name__} has one "
            "column: none of its sums is a join, which takes the mean of several paths. Leave paths out"
        )
    return Columns(paths, count)
