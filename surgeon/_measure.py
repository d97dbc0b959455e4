"""What a training step takes with gates: predicted from the arithmetic, and beside it as it is.

Steps are timed of the plain network, with every branch masked, with every branch dropped, and with half of
the rows dropped everywhere. What lies between the first and the third is the branches' own time, which they
share as they share the FLOPs. So a step at survival probabilities ``p_l`` takes

    masked - (plain - empty) * sum_l w_l (1 - p_l) + extra * sum_l w_l q_l,    w_l = f_l / sum f,

with ``f_l`` the FLOPs of branch l, and ``q_l`` the chance that some of its rows run and others do not. These
are gathered and put back, and a few rows take more time each than many: that is ``extra``, by which the step
with half of the rows is longer than the rest of the sum says. A coin for the whole batch multiplies no mask
and gathers nothing. The step is then taken, too. As the rate falls, so does the saving, and some rows run
without others more seldom: the break-even is the rate from which on skipping is reckoned to take less.

Each way takes one step per round, in an order drawn anew, and counts against the plain network's step of the
same round. On one thread of a CPU the clock counts processor time, so that a wait is not counted.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._copy import copied
from surgeon._gating.gate import Gate
from surgeon._gating.gated import first_weight, gates_of
from surgeon._plan import Settings
from surgeon._surgery import apply, status
from surgeon._text import Drawn, Part
from surgeon._torch import pytree
from surgeon._tracing.example import inputs
from surgeon._tracing.nests import tensors
from surgeon.errors import NoResidualsError, UsageError

_DRAWS, _SEEDS, _STEPS, _NEVER = 3, 300, 1000, 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Measured(Drawn):
    """Training steps (forward and backward) over those of the plain network: medians over the rounds.

    Attributes:
        batch: Samples in a step.
        drop_rate: The last gate's.
        unit: ``"sample"`` or ``"batch"``.
        device: What it ran on.
        threads: Of the CPU.
        plain: Milliseconds of the plain network's step.
        masked: With every branch computed and masked.
        empty: With every branch dropped that can be.
        predicted: With branches skipped, reckoned from those.
        skipped: The same as it is.
        quartiles: Of that.
        break_even: The last drop rate from which skipping is reckoned to take less than masking; above 1 it
            never does, 0 it always does.
    """

    batch: int
    drop_rate: float
    unit: str
    device: str
    threads: int
    plain: float
    masked: float
    empty: float
    predicted: float
    skipped: float
    quartiles: tuple[float, float]
    break_even: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a break-even that is never reached is null."""
        return {**asdict(self), "break_even": self.break_even if self.break_even <= 1 else None}

    def parts(self) -> Sequence[Part]:
        """A table of the ways to drop, and the break-even."""
        low, high = self.quartiles
        rows = (
            ("plain", "", f"{self.plain:.4g} ms", ""),
            ("masked", "", f"{self.masked:.3f}", ""),
            ("skipped", f"{self.predicted:.3f}", f"{self.skipped:.3f}", f"{low:.3f} to {high:.3f}"),
            ("all dropped", "", f"{self.empty:.3f}", ""),
        )
        title = (
            f"a step at batch {self.batch}, over the plain network's ({self.device}, threads: {self.threads})"
        )
        right = frozenset({"predicted", "realised", "quartiles"})
        return (Part(title, ("way", "predicted", "realised", "quartiles"), rows, right, (self._even(),)),)

    def _even(self) -> str:
        if self.break_even <= 0:
            return "break-even  none: skipping takes less than a mask at any drop rate"
        if self.break_even >= 1:
            return "break-even  none: a mask takes less than skipping at every drop rate"
        return f"break-even  skipping takes less than a mask from drop rate {self.break_even:.2g} on"


def measure(model: nn.Module, settings: Settings, *, batch: int, rounds: int = 9) -> Measured:
    """Times a few training steps of ``model``, which is left as it was, gated as ``settings`` say.

    Args:
        model: Without gates.
        settings: As for `surgeon.plan`.
        batch: Samples in a step.
        rounds: Steps of each way.

    Raises:
        UsageError: ``batch`` or ``rounds`` is below 1, or the inputs have no common number of samples.
        NoResidualsError: There is nothing to gate.
    """
    if batch < 1 or rounds < 1:
        raise UsageError(f"batch is {batch} and rounds is {rounds}; give 1 or more of each")
    with torch.random.fork_rng():  # inputs, draws and whatever layers draw
        return _measured(model, settings, batch, rounds)


def _measured(model: nn.Module, settings: Settings, batch: int, rounds: int) -> Measured:
    args, kwargs = _batch(model, settings, batch)

    def gated(**changed: Any) -> nn.Module:
        asked = replace(settings, **changed)
        return apply(copied(model), **{f.name: getattr(asked, f.name) for f in fields(Settings)})

    never = {"schedule": "uniform", "drop_rate": _NEVER, "overrides": None, "rounding": "random"}
    models = {
        "plain": copied(model),
        "masked": gated(skip=False, rounding="random"),
        "skipped": gated(skip=True),
        "empty": gated(skip=True, unit="batch", sync="none", **never),
    }
    gates = gates_of(models["skipped"])
    if not gates:
        raise NoResidualsError(f"{type(model).__name__} has no residual add, so there is nothing to measure")
    apart = _apart(gates, batch, [0.5] * len(gates))
    if apart:
        models["half"] = gated(skip=True, schedule="uniform", drop_rate=0.5, overrides=None)
    device = next((t.device for t in tensors((args, kwargs))), torch.device("cpu"))
    steps = {name: _step(one.train(), args, kwargs) for name, one in models.items()}
    taken = _in_turns(steps, rounds, device, _typical(gates, settings.unit, batch))
    ratios = {
        name: [a / b for a, b in zip(seconds, taken["plain"], strict=True)] for name, seconds in taken.items()
    }
    middle = {name: statistics.median(values) for name, values in ratios.items()}
    base, branches = middle["masked"] if settings.unit == "sample" else 1.0, 1 - middle["empty"]
    extra = (middle["half"] - base + branches / 2) / apart if apart else 0.0

    def saved(share: float) -> float:
        """What skipping saves where all drop rates are multiplied by ``share``."""
        rates = [gate.drop_rate * share for gate in gates]
        return branches * _mean(gates, rates) - extra * _apart(gates, batch, rates)

    quartiles = statistics.quantiles(ratios["skipped"], n=4) if rounds > 1 else ratios["skipped"] * 3
    return Measured(
        batch,
        status(models["skipped"]).gates[-1].drop_rate,
        settings.unit,
        device.type,
        torch.get_num_threads(),
        1e3 * statistics.median(taken["plain"]),
        middle["masked"],
        middle["empty"],
        base - saved(1.0),
        middle["skipped"],
        (quartiles[0], quartiles[2]),
        _break_even(saved, max(gate.drop_rate for gate in gates)),
    )


def _batch(model: nn.Module, settings: Settings, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example's arguments with so many samples, their numbers drawn where they are of floating point."""
    given = inputs(model, settings.example)
    sizes = {t.shape[0] for t in tensors(given) if t.ndim}
    if len(sizes) != 1:
        raise UsageError(
            f"the inputs have {sizes or 'no'} samples and not one number of them; nothing to time"
        )
    weight = first_weight(model)
    device = torch.device("cpu") if weight is None else weight.device

    def sized(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor.to(device)
        if tensor.is_floating_point():
            return torch.randn(batch, *tensor.shape[1:], dtype=tensor.dtype, device=device)
        return tensor[:1].expand(batch, *tensor.shape[1:]).to(device).clone()

    args, kwargs = pytree.tree_map_only(Tensor, sized, given)
    return args, kwargs


def _step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        made = [t for t in tensors(model(*args, **kwargs)) if t.requires_grad]
        sum(t.float().square().mean() for t in made).backward()  # type: ignore[union-attr]

    return step


def _in_turns(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device, seeds: Sequence[int]
) -> dict[str, list[float]]:
    own = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if own else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):  # the first warms up
        for name in random.sample(list(steps), len(steps)):
            torch.manual_seed(seeds[round_ % len(seeds)])
            start = clock()
            steps[name]()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if round_:
                taken[name].append(clock() - start)
    return taken


def _typical(gates: Sequence[Gate], unit: str, batch: int) -> list[int]:
    """Seeds under which the coins drop nearly what they do in the mean."""
    expected, away = sum(g.branch.flops_share * g.survival for g in gates), dict[int, float]()
    for seed in range(_SEEDS):
        torch.manual_seed(seed)
        kept = [_kept(gate, unit, batch) for gate in gates]
        drawn = sum(g.branch.flops_share * share for g, share in zip(gates, kept, strict=True))
        away[seed] = abs(drawn - expected)
    return sorted(away, key=away.__getitem__)[:_DRAWS]


def _kept(gate: Gate, unit: str, batch: int) -> float:
    """The share of rows that survives, drawn as a step draws it."""
    if gate.drop_rate == 0:
        return 1.0
    if unit == "batch":
        return float(gate.survives())
    kept = gate.survivors(batch)
    if 0 < kept < batch:
        gate.rows(batch, kept, torch.device("cpu"))  # which ones, from the same generator
    return kept / batch


def _mean(gates: Sequence[Gate], values: Sequence[float]) -> float:
    """The mean of a number for each gate, over those that skip, by the FLOPs of their branches."""
    skipping = [
        (g.branch.flops_share, value) for g, value in zip(gates, values, strict=True) if g.branch.skips
    ]
    whole = sum(share for share, _ in skipping)
    return sum(share * value for share, value in skipping) / whole if whole else 0.0


def _apart(gates: Sequence[Gate], batch: int, rates: Sequence[float]) -> float:
    """The chance that some rows of a branch run and others do not, at these drop rates: such a mean."""
    return _mean(gates, [_partly(gate, batch, rate) for gate, rate in zip(gates, rates, strict=True)])


def _partly(gate: Gate, batch: int, rate: float) -> float:
    """The same of one gate; `Gate.survivors` says how many rows there are."""
    if gate.decided.unit == "batch" or not 0 < rate < _NEVER:
        return 0.0
    rows, more = divmod((1 - rate) * batch, 1)
    if gate.decided.rounding == "fixed":
        rows, more = max(1.0 + gate.branch.statistics, round(rows + more)), 0.0

    def chance(kept: float) -> float:
        lonely = gate.branch.statistics and kept == 1  # then two rows run, or none
        return (0.5 if batch > 2 else 0.0) if lonely else float(0 < kept < batch)

    return (1 - more) * chance(rows) + more * chance(rows + 1)


def _break_even(saved: Callable[[float], float], highest: float) -> float:
    """The drop rate of the highest gate from which on something is saved; 0: at any, infinity: at none."""
    steps = range(1, _STEPS)
    losing = [step for step in steps if saved(step / _STEPS / highest) <= 0] if highest else steps
    if not losing:
        return 0.0
    return math.inf if losing[-1] == steps[-1] else (losing[-1] + 1) / _STEPS
