"""The stochastic depth that is already in a model: what it does, whether it runs, what a drop leaves over.

A site is a module without parameters that scales whole rows of its argument, or all of it, by a random
number; it is known by what it does to a tensor of ones, never by its class. Two things go wrong with them in
models that people use: a site that no forward ever calls, or whose result nothing reads (the model trains
without the regularisation that its configuration asks for), and a site that is on no branch: on the shortcut
itself (a drop loses the input there) or on a path without one (a drop sets the signal to zero). Random draws
in evaluation are a third.

Whether anything is left after a drop is read from the model's own graph: the model is recorded with that one
site giving zeros, and either some output still depends on an input, or none does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgeon._finding.analysis import analyse
from surgeon._finding.findings import Residual
from surgeon._plain import check_plain
from surgeon._text import Listed, Part
from surgeon._torch import FakeTensorMode
from surgeon._tracing.example import Example, inputs
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.record import record
from surgeon._tracing.undisturbed import undisturbed

Verdict = Literal["residual", "never-called", "unused", "on-shortcut", "no-shortcut"]

_ROWS = 256
_TRIES = 64


@dataclass(frozen=True, slots=True)
class Site:
    """One stochastic-depth module of a model.

    Attributes:
        name: Qualified name.
        module: Its class.
        rate: Its drop rate in (0, 1], read from what it does: exact where survivors are scaled up, else a
            share of the rows of a trial.
        verdict: ``"residual"`` (on the branch of a residual add), ``"never-called"``, ``"unused"`` (no output
            depends on what it gives), ``"on-shortcut"`` (it drops the input of a residual add and leaves the
            branch), or ``"no-shortcut"``.
        adds: Names of the residual adds on whose branches or shortcuts it sits.
        silences: A drop leaves no output that depends on the model's input; ``False`` for a residual.
    """

    name: str
    module: str
    rate: float
    verdict: Verdict
    adds: tuple[str, ...] = ()
    silences: bool = False

    @property
    def remark(self) -> str:
        """The verdict in words."""
        if self.verdict == "residual":
            return f"on the branch of {', '.join(self.adds)}"
        if self.verdict == "never-called":
            return "never called: it drops nothing"
        if self.verdict == "unused":
            return "nothing reads what it gives: it drops nothing"
        if self.verdict == "on-shortcut":
            return f"on the shortcut of {', '.join(self.adds)}: where it drops, the input is lost there"
        lost = "the whole signal becomes zero" if self.silences else "only other paths go on"
        return f"no shortcut beside it: where it drops, {lost}"


@dataclass(frozen=True, slots=True)
class AuditReport(Listed[Site]):
    """The stochastic depth of a model, in the order of its modules; iterating gives the sites.

    Attributes:
        sites: One for each module that drops rows when the model trains.
        random: Names of the modules whose own forward draws random numbers in evaluation, ``""`` for the
            model itself: what the model gives differs from call to call, so nothing can be compared with it.
    """

    sites: tuple[Site, ...]
    random: tuple[str, ...] = ()

    def _entries(self) -> Sequence[Site]:
        return self.sites

    @property
    def wrong(self) -> tuple[Site, ...]:
        """The sites that are never called, have no effect, or sit on a shortcut or beside none."""
        return tuple(site for site in self.sites if site.verdict != "residual")

    @property
    def ok(self) -> bool:
        """Whether every site sits on the branch of a residual add, and evaluation draws nothing."""
        return not self.wrong and not self.random

    @property
    def summary(self) -> str:
        """How many sites there are, how many of them are wrong in which way, and what evaluation draws."""
        return "\n".join([self._summary, *self._drawing])

    @property
    def _drawing(self) -> list[str]:
        names = ", ".join(name or "the model itself" for name in self.random)
        return [f"draws random numbers also in evaluation: {names}"] if names else []

    @property
    def _summary(self) -> str:
        count = len(self.sites)
        if not self.wrong:
            return f"{count} of {count} sites on a residual add" if count else "no stochastic depth"
        kinds = {
            "never-called": "never called",
            "unused": "without effect",
            "on-shortcut": "on a shortcut",
            "no-shortcut": "without a shortcut",
        }
        told = [
            f"{number} of {count} {words}"
            for verdict, words in kinds.items()
            if (number := sum(site.verdict == verdict for site in self.sites))
        ]
        return ", ".join(told)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ok": self.ok,
            "random": list(self.random),
            "sites": [asdict(site) | {"remark": site.remark} for site in self.sites],
        }

    def parts(self) -> Sequence[Part]:
        """The summary and a table of the sites."""
        head = ("module", "class", "drop rate", "remark")
        rows = tuple((site.name, site.module, f"{site.rate:.3f}", site.remark) for site in self.sites)
        return (Part(self._summary, head, rows, frozenset({"drop rate"}), tuple(self._drawing)),)


def audit(model: nn.Module, example: Example = None) -> AuditReport:
    """Lists the stochastic depth that is already in ``model``, and random draws in its evaluation.

    The model is left as it was.

    Args:
        model: Any module, in any mode.
        example: As in `surgeon.find`.

    Returns:
        One site per module that drops rows when it trains. A module with a drop rate of zero does nothing and
        is not listed.

    Raises:
        RecordError: The model does not run on the example.
    """
    check_plain(model)
    args, kwargs = inputs(model, example)
    rates = {name: rate for name, module in model.named_modules() if (rate := _drop_rate(module))}
    random = _drawn_in_evaluation(model, args, kwargs)
    if not rates:
        return AuditReport((), random)
    analysis = analyse(model, args, kwargs)
    adds, drops_input = dict[str, list[str]](), dict[str, list[str]]()
    for residual in analysis.findings:
        for name in residual.replaces:
            adds.setdefault(name, []).append(residual.name)
        for name in _on_shortcut(residual, rates):
            drops_input.setdefault(name, []).append(residual.name)
    calls, log = analysis.recording.calls, analysis.recording.log
    called = {call.module for call in calls}
    behind = log.behind(tensors(calls[0].output))
    heard = {call.module for call in calls if not behind.isdisjoint(range(call.first_op, call.last_op))}
    sites = []
    for name, rate in rates.items():
        module = model.get_submodule(name)
        kind = type(module).__name__
        if name in adds:
            sites.append(Site(name, kind, rate, "residual", tuple(adds[name])))
        elif module not in called:
            sites.append(Site(name, kind, rate, "never-called"))
        elif module not in heard:
            sites.append(Site(name, kind, rate, "unused"))
        else:
            verdict: Verdict = "on-shortcut" if name in drops_input else "no-shortcut"
            silences = _silences(model, module, args, kwargs)
            sites.append(Site(name, kind, rate, verdict, tuple(drops_input.get(name, ())), silences))
    return AuditReport(tuple(sites), random)


def _on_shortcut(residual: Residual, sites: Iterable[str]) -> list[str]:
    """Those of ``sites`` that run as a step of the residual add's shortcut, or inside one."""
    if residual.kind == "identity":
        return []
    prefix = f"{residual.block}." if residual.block else ""
    steps = tuple(f"{prefix}{step}." for step in residual.shortcut.split())
    return [site for site in sites if f"{site}.".startswith(steps)]


def _drawn_in_evaluation(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Names of the modules whose own forward draws random numbers in evaluation."""
    found = record(model, args, kwargs, training=False)
    names = {module: name for name, module in model.named_modules()}
    drawing = []
    for number, op in enumerate(found.log.ops):
        if op.random:  # the innermost call that it belongs to was entered last
            inside = [call for call in found.calls if call.first_op <= number < call.last_op]
            drawing.append(names[inside[-1].module])
    return tuple(dict.fromkeys(drawing))


def _drop_rate(module: nn.Module) -> float | None:
    """The rate at which a module drops rows, by trying it; ``None`` if it does no such thing."""
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return None
    if any(True for _ in module.buffers()):
        return None
    with undisturbed(module, training=True), torch.no_grad():
        torch.default_generator.manual_seed(0)  # not those of other devices, whose states are not kept
        ones = torch.ones(_ROWS, 4, 4, 4)
        seen: list[Tensor] = []
        for _ in range(_TRIES):
            rows = _trial(module, ones)
            if rows is None:
                return None
            seen.append(rows)
            kept = rows[rows != 0]
            if len(kept) and kept[0] > 1:  # survivors are divided by the survival probability
                return round(1 - 1 / float(kept[0]), 6)
    dropped = float((torch.cat(seen) == 0).float().mean())
    return dropped or None


def _trial(module: nn.Module, ones: Tensor) -> Tensor | None:
    """The factor of each row, if the module scales rows of ``ones`` at random; else ``None``."""
    log = OpLog(FakeTensorMode(allow_non_fake_inputs=True))
    log.real = True
    try:
        with log:
            out = module(ones.clone())
    except Exception:  # noqa: BLE001 - whatever does not take one tensor of images is no such module
        return None
    drawn = [op.random for op in log.ops if op.random]
    if not drawn or any(number not in (1, len(ones)) for number in drawn):
        return None
    if not isinstance(out, Tensor) or out.shape != ones.shape:
        return None
    rows = out.flatten(1)
    whole = bool((rows == rows[:, :1]).all())
    return rows[:, 0].clone() if whole and len(rows[:, 0].unique()) <= 2 else None


def _silences(model: nn.Module, site: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether no output depends on an input of the model while the site gives zeros."""
    handle = site.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
    try:
        found = record(model, args, kwargs)
    finally:
        handle.remove()
    return not any(found.log.active(t) for t in tensors(found.calls[0].output))
