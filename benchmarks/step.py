"""CPU seconds per training step with and without stochastic depth, taken in turns.

    python -m benchmarks.step --models resnet50,vit_small --rates 0.5 --batch 8 --threads 1

Every variant of a model runs one step per round, in an order drawn anew each round, so that what else the
machine does falls on all of them alike. Each ratio is the median over the rounds of a variant's step over the
plain model's step *of the same round*; the spread is between the quartiles. Beside it stands the bound that
the arithmetic sets (`surgeon.status(model).expected_flops`).

The clock is the processor time of the process: on one thread it is what the step costs, and waiting for a
busy machine is not counted (a shared cache and memory still are).
"""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn

import surgeon


class Basic(nn.Module):
    """The block of the 110-layer CIFAR network: a shortcut without weights, as in the paper."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.extra = stride, out - width

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.extra:
            shortcut = nn.functional.avg_pool2d(x, self.stride)
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.extra))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + shortcut)


def cifar_resnet(depth: int = 110) -> nn.Sequential:
    blocks, width = [], 16
    for out, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range((depth - 2) // 6):
            blocks.append(Basic(width, out, stride if i == 0 else 1))
            width = out
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


MODELS: dict[str, tuple[Callable[..., nn.Module], int, bool]] = {
    "resnet50": (lambda **o: timm.create_model("resnet50", **o), 224, True),
    "vit_small": (lambda **o: timm.create_model("vit_small_patch16_224", **o), 224, True),
    "convnext_tiny": (lambda **o: timm.create_model("convnext_tiny", **o), 224, True),
    "cifar_resnet110": (cifar_resnet, 32, False),
}
VARIANTS = ("plain", "library", "mask", "auto", "sample", "batch")


def variants(name: str, rate: float, only: tuple[str, ...]) -> dict[str, nn.Module]:
    make, size, own = MODELS[name]
    example, built = torch.zeros(2, 3, size, size), {}
    options: dict[str, dict[str, Any]] = {
        "mask": {"skip": False},
        "auto": {"skip": "auto"},
        "sample": {"skip": True},
        "batch": {"unit": "batch", "skip": True},
    }
    for variant in only:
        if variant == "plain":
            built[variant] = make()
        elif variant == "library":
            if own:
                built[variant] = make(drop_path_rate=rate)
        else:
            built[variant] = surgeon.apply(make(), drop_rate=rate, example=example, **options[variant])
    return built


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    start = time.process_time()
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return time.process_time() - start


def measure(name: str, rate: float, batch: int, repeats: int, only: tuple[str, ...]) -> list[dict[str, Any]]:
    models = variants(name, rate, only)
    optimizers = {v: torch.optim.SGD(m.parameters(), 1e-4, momentum=0.9) for v, m in models.items()}
    size = MODELS[name][1]
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    taken: dict[str, list[float]] = {v: [] for v in models}
    for variant, model in models.items():
        seconds(model.train(), optimizers[variant], x, y)
    for _ in range(repeats):
        for variant in random.sample(list(models), len(models)):
            taken[variant].append(seconds(models[variant], optimizers[variant], x, y))
    rows = []
    for variant, times in taken.items():
        ratios = [a / b for a, b in zip(times, taken["plain"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        gated = variant not in ("plain", "library")
        rows.append(
            {
                "model": name,
                "rate": rate,
                "batch": batch,
                "variant": variant,
                "repeats": repeats,
                "threads": torch.get_num_threads(),
                "seconds": statistics.median(times),
                "ratio": statistics.median(ratios),
                "mean_ratio": sum(times) / sum(taken["plain"]),
                "low": low,
                "high": high,
                "bound": surgeon.status(models[variant]).expected_flops if gated else 1.0,
                "torch": torch.__version__,
                "cpu": _cpu(),
                "load": os.getloadavg()[0],
            }
        )
    return rows


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | r | batch | variant | CPU s per step | over plain | quartiles | by means | bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['rate']} | {r['batch']} | {r['variant']} | {r['seconds']:.3f} "
        f"| {r['ratio']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['mean_ratio']:.3f} | {r['bound']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> str:
    last = rows[-1]
    loads = [r["load"] for r in rows]
    counts = sorted({r["repeats"] for r in rows})
    return f"""# CPU seconds per training step

Written by `python -m benchmarks.step`. {last["cpu"]}, {last["threads"]} thread, torch {last["torch"]};
{" or ".join(map(str, counts))} rounds per model after one to warm up, every variant once per round, in an
order drawn anew.

The machine was busy with other work meanwhile (load average {min(loads):.1f} to {max(loads):.1f} on
{os.cpu_count()} cores). The clock counts processor time only, but caches and memory are shared, and rounds
are few: read the quartiles before the medians. *Over plain* is the median of ratios within one round, *by
means* the ratio of total times; unit `batch` has steps of very different length by nature, for which the
second is the fairer figure. *Bound* is the share of the FLOPs that is left,
`surgeon.status(model).expected_flops`.

`library` is the model's own drop path, `mask` is `skip=False`, `auto` the default, `sample` is
`unit="sample", skip=True`, `batch` is `unit="batch"`. Schedule linear to the final drop rate r.

{table(rows)}
"""


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--variants", "only", default=",".join(VARIANTS), show_default=True)
@click.option("--rates", default="0.5", show_default=True, help="Final drop rates, by comma.")
@click.option("--batch", default=8, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--rows", "log", default="runs/step.jsonl", show_default=True, type=click.Path(path_type=Path))
@click.option("--page", "out", default=None, type=click.Path(path_type=Path), help="docs/performance.md")
def main(
    models: str, only: str, rates: str, batch: int, threads: int, repeats: int, log: Path, out: Path | None
) -> None:
    """Measures, appends one line per variant to --rows, and writes --page from all lines there are."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    wanted = tuple(v for v in VARIANTS if v == "plain" or v in only.split(","))
    for name in models.split(","):
        if name not in MODELS:
            raise click.UsageError(f"{name!r} is not among {', '.join(MODELS)}")
        for rate in map(float, rates.split(",")):
            rows = measure(name, rate, batch, repeats, wanted)
            click.echo(table(rows))
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    if out is not None:
        temporary = out.with_suffix(".tmp")
        temporary.write_text(page([json.loads(line) for line in log.read_text().splitlines()]))
        temporary.replace(out)


if __name__ == "__main__":
    main()
