"""One training step, taken apart: its time, the arithmetic really drawn, the activations it saves."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import surgeon
from benchmarks._step_models import COUNTED, Net, variant
from surgeon._gating.gate import Gate
from surgeon._gating.gated import gates_of

DRAWS = 3  # a coin for a whole batch makes steps of different length; each draw is measured several times


@dataclass
class Taken:
    """What was measured of one variant, one entry per round; round ``i`` had draw ``i % DRAWS``."""

    seconds: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    @property
    def fastest(self) -> float:
        """Seconds of the fastest step of each draw, in the mean: what it takes when nothing else disturbs."""
        return statistics.fmean(min(self.seconds[i::DRAWS]) for i in range(min(DRAWS, len(self.seconds))))


class Bench:
    """One network at one batch size: every variant takes its turn once per round, in an order drawn anew."""

    def __init__(self, net: Net, batch: int, device: torch.device, threads: int) -> None:
        self.net, self.batch, self.device = net, batch, device
        # On one thread the processor time is what a step costs, whatever else the machine does.
        self.clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
        self.x = torch.randn(batch, 3, net.size, net.size, device=device)
        self.y = torch.randint(0, 10, (batch,), device=device)

    def steps(self, rate: float, variants: tuple[str, ...], rounds: int) -> dict[str, Taken]:
        """Training steps of each variant at one final drop rate."""
        models = {v: variant(self.net, v, rate).to(self.device).train() for v in variants}
        taken, step = {v: Taken() for v in models}, {v: self.step(m) for v, m in models.items()}
        for v, model in models.items():  # to warm up, and for the memory
            for _ in range(3 if v in COUNTED else 1):
                taken[v].bytes.append(self._saved(model))
            step[v]()
        seeds = typical(models["batch"], DRAWS) if "batch" in models else random.sample(range(1 << 31), DRAWS)
        for i in range(rounds):
            seed = seeds[i % DRAWS]  # what is drawn by hand is what the gates draw
            for v in random.sample(list(models), len(models)):
                torch.manual_seed(seed)
                with drawing(models[v] if v in COUNTED else None) as share:
                    taken[v].seconds.append(self.timed(step[v]))
                taken[v].drawn.append(share())
        return taken

    def still(self, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
        """Seconds, plain and gated, where nothing is dropped: evaluating, and training at rate 0."""
        plain, gated = (variant(self.net, v, 0.0).to(self.device) for v in ("plain", "auto"))
        found: dict[str, tuple[list[float], list[float]]] = {}
        for name in ("evaluation", "rate 0"):
            pair = [self.step(model.train(name != "evaluation")) for model in (plain, gated)]
            for run in pair:
                run()
            found[name] = [], []
            for i in range(rounds):
                for one in (0, 1) if i % 2 else (1, 0):
                    found[name][one].append(self.timed(pair[one]))
        return found

    def step(self, model: nn.Module, *, optimized: bool = True) -> Callable[[], None]:
        """A step of a model that trains, with or without the optimizer's; a forward of one that evaluates."""
        if not model.training:
            return lambda: self._forward(model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(self.x), self.y).backward()
            if optimized:
                optimizer.step()

        return step

    @torch.no_grad()
    def _forward(self, model: nn.Module) -> None:
        model(self.x)

    def timed(self, run: Callable[[], None]) -> float:
        """Seconds of one run; the device is waited for."""
        self._wait()
        start = self.clock()
        run()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _saved(self, model: nn.Module) -> int:
        """Bytes that a forward keeps for its backward: on CUDA the peak, else what autograd saves."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            nn.functional.cross_entropy(model(self.x), self.y).backward()
            return torch.cuda.max_memory_allocated(self.device) - before
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return t.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = nn.functional.cross_entropy(model(self.x), self.y)
        del out
        return sum(kept.values())


@contextmanager
def drawing(model: nn.Module | None) -> Iterator[Callable[[], float]]:
    """Yields a function that gives the share of the FLOPs which the gates drew inside the block."""
    lost: list[float] = []
    survivors, survives = Gate.survivors, Gate.survives

    def rows(gate: Gate, count: int) -> int:
        kept = survivors(gate, count)
        lost.append(gate.branch.flops_share * (1 - kept / count))
        return kept

    def whole(gate: Gate) -> bool:
        kept = survives(gate)
        lost.append(0.0 if kept else gate.branch.flops_share)
        return kept

    if model is not None:
        Gate.survivors, Gate.survives = rows, whole  # type: ignore[method-assign]
    try:
        yield lambda: 1 - math.fsum(lost)
    finally:
        Gate.survivors, Gate.survives = survivors, survives  # type: ignore[method-assign]


def typical(model: nn.Module, count: int) -> list[int]:
    """Seeds under which a model with a coin per batch draws, nearly, the FLOPs that it draws in the mean."""
    expected, away = surgeon.status(model).expected_flops, dict[int, float]()
    for seed in range(500):
        torch.manual_seed(seed)
        with drawing(model) as share:
            for gate in gates_of(model):
                gate.survives()
        away[seed] = abs(share() - expected)
    return sorted(away, key=away.__getitem__)[:count]


def row(taken: Taken, plain: Taken, hand: Taken | None, model_bound: float) -> dict[str, Any]:
    """One line of the table: a variant beside the plain model, and what is written by hand, of each round."""
    ratios = _ratios(taken, plain)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {
        "seconds": statistics.median(taken.seconds),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "fastest": taken.fastest / plain.fastest,
        "drawn": statistics.fmean(taken.drawn),
        "over_drawn": taken.fastest / plain.fastest / statistics.fmean(taken.drawn),
        "over_hand": hand and taken.fastest / hand.fastest,
        "bound": model_bound,
        "memory": statistics.fmean(taken.bytes) / statistics.fmean(plain.bytes),
        "megabytes": statistics.fmean(taken.bytes) / 2**20,
    }


def _ratios(one: Taken, other: Taken) -> list[float]:
    return [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]


def bound(net: Net, which: str, rate: float) -> float:
    """The share of the FLOPs that is left on average, from the recording."""
    return surgeon.status(variant(net, which, rate)).expected_flops if which in COUNTED else 1.0
