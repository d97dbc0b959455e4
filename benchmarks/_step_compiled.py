"""Compiled steps over compiled plain ones: whether a graph keeps what dropping saves.

Each network is compiled once per variant and takes its steps in turns with the plain one's. A compiled graph
of unit ``"sample"`` runs a fixed number of rows per gate, so its bound is the share of the FLOPs of these;
unit ``"batch"`` draws seeds of nearly the FLOPs that it draws in the mean, as in the other tables.
"""

import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

import surgeon
from benchmarks._step_measure import Bench, bound, typical
from benchmarks._step_models import NETS, variant
from surgeon._gating.gated import gates_of

MODELS = ("vit_small", "convnext_tiny", "resnet50")
RATE = 0.5


def rows(name: str, batch: int, rounds: int, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """Every variant's step over the compiled plain network's of the same round.

    Args:
        name: One of `NETS`.
        batch: Rows.
        rounds: How often each variant takes its turn, in an order drawn anew.
        device, threads: As in `Bench`.
    """
    net, bench = NETS[name], Bench(NETS[name], batch, device, threads)
    models = {
        "plain": variant(net, "plain", RATE),
        "sample": variant(net, "sample", RATE),
        "sample, eager": variant(net, "sample", RATE),
        "batch": variant(net, "batch", RATE),
        "batch, eager": variant(net, "batch", RATE),
    }
    shares = {"sample": _share(models["sample"], batch), "batch": bound(net, "batch", RATE)}
    seeds = typical(models["batch"], 3)
    graphs: dict[str, int] = {}
    steps: dict[str, Callable[[], None]] = {}
    for which, model in models.items():
        model.to(device).train()
        if which in ("plain", "sample"):
            model.compile(fullgraph=True)
        elif which == "batch":
            surgeon.compile(model)
        steps[which] = bench.step(model)
        counters.clear()
        for _ in range(2):
            steps[which]()
        graphs[which] = counters["stats"]["unique_graphs"]
    seconds: dict[str, list[float]] = {which: [] for which in steps}
    counters.clear()
    for i in range(rounds):
        for which in random.sample(list(steps), len(steps)):
            torch.manual_seed(seeds[i % len(seeds)])
            seconds[which].append(bench.timed(steps[which]))
    anew = counters["stats"]["unique_graphs"]
    memory = {which: bench._saved(model) for which, model in models.items()}
    return [
        {"variant": which, "graphs": graphs[which], "anew": anew, "memory": memory[which] / memory["plain"]}
        | _ratio(seconds[which], seconds["plain"])
        | {"seconds": statistics.median(seconds[which]), "bound": shares.get(which.partition(",")[0], 1.0)}
        for which in steps
    ]


def _share(model: nn.Module, batch: int) -> float:
    """The share of the FLOPs that a compiled graph of unit ``"sample"`` runs, whose rows are rounded up."""
    gates = gates_of(model)
    return 1 - sum(gate.branch.flops_share * (1 - gate.most(batch) / batch) for gate in gates)


def _ratio(taken: list[float], plain: list[float]) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(taken, plain, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "low": low, "high": high, "fastest": min(taken) / min(plain)}


def table(found: list[dict[str, Any]]) -> str:
    """One line per network and variant."""
    lines = [
        (
            "| model | batch | variant | s per step | over compiled plain | quartiles | fastest | bound "
            "| fastest over bound | graphs | memory |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['batch']} | {r['variant']} | {r['seconds']:.3f} | {r['ratio']:.3f} "
        f"| {r['low']:.3f} to {r['high']:.3f} | {r['fastest']:.3f} | {r['bound']:.3f} "
        f"| {r['fastest'] / r['bound']:.3f} | {r['graphs'] or ''} | {r['memory']:.3f} |"
        for r in found
    ]
    return "\n".join(lines)
