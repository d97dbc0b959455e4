"""Whether running a branch on the surviving rows only takes less time than running all and masking them.

Skipping saves ``drop_rate * 3 f`` FLOPs a row, ``f`` being those of the branch's forward (the backward has
twice as many). Where some rows run and others do not, they are drawn, gathered and put back: a fixed time per
call, and some per byte. Where the number of rows is such that all run or none does (one row, or two of which
statistics are taken), nothing is gathered and nothing can be lost.

The three times are measured on the device when the first decision falls there, in some 50 ms, and rounded to
powers of two, so that one machine decides alike in each run. ``SURGEON_COST`` overrides them, as
``cpu:6e-5,6e-11,1.5e-11`` (seconds per call, per byte, per FLOP; devices apart by ``;``).
"""

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgeon._gating.rowops import joined, parted
from surgeon.errors import UsageError


@dataclass(frozen=True, slots=True)
class Cost:
    """What handling rows costs against masking them, in seconds.

    Attributes:
        per_call: Once per gate and step.
        per_byte: Per byte of what the branch reads per row and of the shortcut.
        per_flop: What a FLOP of a branch takes.
    """

    per_call: float
    per_byte: float
    per_flop: float


# What a quiet core of 2024 takes, and a reckoning, not measured, of a GPU: for what nobody runs on yet.
CPU = Cost(per_call=6e-5, per_byte=6e-11, per_flop=1.5e-11)
ACCELERATOR = Cost(per_call=1.2e-4, per_byte=5e-13, per_flop=1.7e-14)

_known: dict[str, Cost] = {}
_VARIABLE = "SURGEON_COST"


def assumed(device: str) -> Cost:
    """The cost on a type of device without a look at it, the same on every machine."""
    return CPU if device == "cpu" else ACCELERATOR


def measured(device: str) -> Cost:
    """The cost on a type of device: as given, or measured at the first question.

    Raises:
        UsageError: ``SURGEON_COST`` cannot be read.
    """
    if device not in _known:
        _known[device] = _given().get(device) or _apart(device)
    return _known[device]


def pays(cost: Cost, drop_rate: float, rows: float, flops: int, moved: int, *, statistics: bool) -> bool:
    """Whether to skip.

    Args:
        cost: On the device.
        drop_rate: In [0, 1).
        rows: How many rows the batch has; infinity leaves the cost per call out, and none pay nothing.
        flops: Of the branch's forward on one row.
        moved: Bytes of what it reads per row and of the shortcut, one row of each.
        statistics: The branch takes statistics over its rows, and never runs on a single one of many.
    """
    if rows == 1 or (rows == 2 and statistics):
        return drop_rate > 0
    saved = drop_rate * 3 * flops * cost.per_flop
    return rows > 0 and saved > cost.per_byte * moved + cost.per_call / rows


def _given() -> dict[str, Cost]:
    text, found = os.environ.get(_VARIABLE, ""), dict[str, Cost]()
    for part in filter(None, text.split(";")):
        device, _, numbers = part.partition(":")
        try:
            found[device.strip()] = Cost(*map(float, numbers.split(",")))
        except (TypeError, ValueError):
            raise UsageError(
                f"{_VARIABLE} is {text!r}; give seconds per call, per byte and per FLOP behind a type of "
                "device, as in 'cpu:6e-5,6e-11,1.5e-11', several apart by ';'"
            ) from None
    return found


def _apart(device: str) -> Cost:
    """Measured on a thread of its own, where no mode, transform or autocast of the caller's is in force."""
    found = [assumed(device)]

    def look() -> None:
        if device in ("cpu", "cuda"):
            found.append(_measure(torch.device(device)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[-1]


def _measure(device: torch.device) -> Cost:
    generator = torch.Generator(device).manual_seed(0)

    def masking(x: torch.Tensor) -> None:
        mask = x.new_empty((len(x), 1)).bernoulli_(0.5, generator=generator).div_(0.5)
        (x + x * mask).backward(x)

    def gathering(x: torch.Tensor) -> None:
        rows = torch.randperm(len(x), device=device, generator=generator)[: len(x) // 2].sort().values
        whole, part = parted(x, rows)
        joined(whole, part, rows, 2.0).backward(x)

    def on(run: Callable[[torch.Tensor], None], width: int, times: int) -> float:
        x = torch.ones(8, width, device=device, dtype=torch.float32, requires_grad=True)
        return _seconds(lambda: run(x), device, times)

    small, large = 4, 1 << 15
    side = 256 if device.type == "cpu" else 4096
    square = torch.ones(side, side, device=device, dtype=torch.float32)
    per_flop = _seconds(lambda: torch.mm(square, square), device, 5) / (2 * side**3)
    per_call = on(gathering, small, 20) - on(masking, small, 20)
    per_byte = (on(gathering, large, 5) - on(masking, large, 5) - per_call) / (2 * 8 * large * 4)
    floor = assumed(device.type)
    return Cost(
        _rounded(max(per_call, floor.per_call / 16)),
        _rounded(max(per_byte, floor.per_byte / 16)),
        _rounded(per_flop),
    )


def _seconds(run: Callable[[], object], device: torch.device, times: int) -> float:
    """The least of several runs: what else a machine does only ever makes one slower."""
    taken = []
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _rounded(seconds: float) -> float:
    return float(2.0 ** round(math.log2(seconds)))
