"""Whether running a branch on the surviving rows only is worth the handling of rows.

Skipping saves ``drop_rate * 3 f`` FLOPs per row, ``f`` being those of the branch's forward (the backward has
twice as many). Against masking it costs a fixed time per call (the draw, four row operators, two autograd
functions) and some time per byte of what is taken apart and put together again. Both are stated as the FLOPs
that could be done meanwhile, so the decision follows from recorded FLOPs and shapes alone and repeats itself
on every machine.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """What handling rows costs, against masking them.

    Attributes:
        per_call: In FLOPs, once per gate and step.
        per_byte: In FLOPs per byte that the branch reads per row and of the shortcut.
    """

    per_call: float
    per_byte: float


# Measured by `python -m benchmarks.rows` on one core at 50 to 60 GFLOP/s: 0.3 ms per call on a quiet machine
# and 0.6 ms on a busy one, 0.1 ns per byte. More cores make arithmetic cheaper than either.
CPU = Cost(per_call=30e6, per_byte=6.0)
# Reckoned, not measured: 80 microseconds of small kernels, 2 TB/s, 60 TFLOP/s.
ACCELERATOR = Cost(per_call=5e9, per_byte=30.0)


def pays(drop_rate: float, rows: float, flops: int, moved: int, device: str) -> bool:
    """Whether to skip.

    Args:
        drop_rate: In [0, 1).
        rows: How many rows the batch has; infinity leaves the cost per call out, and none pay nothing.
        flops: Of the branch's forward on one row.
        moved: Bytes of what it reads per row and of the shortcut, one row of each.
        device: Type of the device, as in ``torch.device.type``.
    """
    cost = CPU if device == "cpu" else ACCELERATOR
    return rows > 0 and drop_rate * 3 * flops > cost.per_byte * moved + cost.per_call / rows
