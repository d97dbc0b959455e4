"""Networks whose kernels are small: what a step costs beside its arithmetic.

Fifty blocks of two 1x1 convolutions and norms on tensors of 2 x 2 x 2 numbers a row: every operator takes the
microseconds that any operator takes, as on a GPU most do. What surgeon adds to a block in Python shows here
and nowhere better. A step is forward, cross-entropy and backward; an optimizer would thin the difference out.
"""

import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

import surgeon
from benchmarks._step_measure import Bench
from benchmarks._step_models import Net

BLOCKS, RATE = 50, 0.5
ROWS = (2, 8)


class Small(nn.Module):
    """A residual block; with a rate it has timm's drop path on its branch."""

    def __init__(self, rate: float | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.relu = nn.ReLU()
        self.drop_path = nn.Identity() if rate is None else DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def small(final: float | None = None) -> nn.Sequential:
    """The network, with timm's drop path where ``final`` is the drop rate of the last block."""
    torch.manual_seed(0)
    rates = [None if final is None else final * number / BLOCKS for number in range(1, BLOCKS + 1)]
    return nn.Sequential(nn.Conv2d(3, 2, 1), *map(Small, rates), nn.Flatten(), nn.Linear(8, 10))


def _gated(**options: Any) -> nn.Module:
    return surgeon.apply(small(), example=torch.zeros(2, 3, 2, 2), **options)


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "plain": small,
    "rate 0": lambda: _gated(drop_rate=0.0, skip=True),
    "batch": lambda: _gated(drop_rate=RATE, unit="batch"),
    "sample": lambda: _gated(drop_rate=RATE, skip=True),
    "mask": lambda: _gated(drop_rate=RATE, skip=False),
    "timm's drop path": lambda: small(RATE),
    "auto": lambda: _gated(drop_rate=RATE),
    "plain again": small,
}
EVALUATED: dict[str, Callable[[], nn.Module]] = {
    "plain": small,
    "evaluation": lambda: _gated(drop_rate=RATE),
    "plain again": small,
}


def rows(batch: int, rounds: int, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """Every variant's step over the mean of the two plain networks' steps of the same round.

    Args:
        batch: Rows.
        rounds: How often each variant takes its turn, in an order drawn anew.
        device, threads: As in `Bench`.
    """
    bench = Bench(Net(small, 2), batch, device, threads)
    first = small()  # the first network of a process takes some eight percent longer than those after it
    found: list[dict[str, Any]] = []
    for variants, training in ((TRAINED, True), (EVALUATED, False)):
        models = {name: make().to(device).train(training) for name, make in variants.items()}
        steps = {name: bench.step(model, optimized=False) for name, model in models.items()}
        seconds = _seconds(bench, steps, rounds)
        found += [
            {"variant": name if training else _still(name), **_row(seconds, name)}
            for name in variants
            if name != "plain"
        ]
    del first
    return found


def _still(name: str) -> str:
    return name if name == "evaluation" else f"{name}, evaluation"


def _seconds(bench: Bench, steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):
            seconds[name].append(bench.timed(steps[name]))
    return seconds


def _row(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    """A variant beside the plain network; the second plain one beside the first."""
    plain = seconds["plain"]
    if name != "plain again":
        plain = [(a + b) / 2 for a, b in zip(plain, seconds["plain again"], strict=True)]
    ratios = [a / b for a, b in zip(seconds[name], plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"seconds": statistics.median(seconds[name]), "ratio": middle, "low": low, "high": high}


def table(found: list[dict[str, Any]]) -> str:
    """One line per variant and number of rows."""
    lines = ["| rows | variant | ms per step | over plain | quartiles |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['batch']} | {r['variant']} | {r['seconds'] * 1e3:.2f} | {r['ratio']:.3f} "
        f"| {r['low']:.3f} to {r['high']:.3f} |"
        for r in found
    ]
    return "\n".join(lines)
