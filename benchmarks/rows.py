"""What handling rows costs against masking them: the measurement behind `surgeon/_gating/cost.py`.

    python -m benchmarks.rows

A chain of four blocks ``x + relu(linear(x))``, whose arithmetic is known, is trained masked and skipping at
several shapes and drop rates, in turns. With ``d`` the time of skipping less that of masking, per gate,
``d = call + byte * bytes moved - rate * (FLOPs / speed)``; the two unknowns come from least squares, with the
speed measured on the plain chain of the same shape.
"""

import random
import statistics
import time

import click
import torch
from torch import Tensor, nn

import surgeon

SHAPES = ((16, 16, 16), (16, 64, 64), (64, 64, 64), (16, 197, 96), (32, 197, 96), (16, 197, 192))
RATES = (0.1, 0.2, 0.5)
BLOCKS = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def chain(shape: tuple[int, ...], rate: float, skip: bool | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(shape[-1]) for _ in range(BLOCKS)))
    if skip is None:
        return model
    return surgeon.apply(model, "uniform", drop_rate=rate, skip=skip, example=torch.zeros(2, *shape[1:]))


def seconds(model: nn.Module, x: Tensor, steps: int) -> float:
    """Processor time per block and step, forward and backward."""
    start = time.process_time()
    for _ in range(steps):
        model(x).sum().backward()
    return (time.process_time() - start) / (steps * BLOCKS)


def measure(shape: tuple[int, ...], rounds: int) -> list[tuple[float, float, float, float]]:
    """For each rate: bytes moved, seconds that the arithmetic dropped would take, masking, skipping."""
    x = torch.randn(shape, requires_grad=True)
    models = {(rate, skip): chain(shape, rate, skip) for rate in RATES for skip in (False, True)}
    models[0.0, None] = chain(shape, 0.0, None)
    steps = max(1, int(0.02 / (BLOCKS * seconds(models[0.0, None], x, 2))))
    taken: dict[tuple[float, bool | None], list[float]] = {key: [] for key in models}
    for _ in range(rounds):
        for key in random.sample(list(models), len(models)):
            taken[key].append(seconds(models[key], x, steps))
    middle = {key: statistics.median(times) for key, times in taken.items()}
    moved = 2.0 * x.numel() * x.element_size()
    return [(moved, rate * middle[0.0, None], middle[rate, False], middle[rate, True]) for rate in RATES]


@click.command()
@click.option("--rounds", default=9, show_default=True)
def main(rounds: int) -> None:
    """Prints every setting, and the two costs."""
    torch.set_num_threads(1)
    sides, results, speeds = [], [], []
    for shape in SHAPES:
        for rate, (moved, saved, masking, skipping) in zip(RATES, measure(shape, rounds), strict=True):
            speeds.append(rate * 6 * shape[-1] * torch.Size(shape).numel() / saved)
            sides.append((1.0, moved))
            results.append(skipping - masking + saved)
            click.echo(
                f"{shape!s:15} r={rate}  masking {masking * 1e6:7.0f} us  skipping {skipping * 1e6:7.0f} us  "
                f"{moved / 1e6:6.2f} MB  {speeds[-1] / 1e9:5.1f} GFLOP/s"
            )
    solution = torch.linalg.lstsq(torch.tensor(sides).double(), torch.tensor(results).double()[:, None])
    call, byte = solution.solution[:, 0].tolist()
    speed = max(speeds)
    click.echo(
        f"per call {call * 1e6:.0f} us, {call * speed:.2g} FLOPs; per byte {byte * 1e9:.3f} ns, "
        f"{byte * speed:.2g} FLOPs (at {speed / 1e9:.0f} GFLOP/s)"
    )


if __name__ == "__main__":
    main()
