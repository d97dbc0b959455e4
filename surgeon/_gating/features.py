"""Gates on new features that a block concatenates: where one drops, zeros of their size take their place.

With survival probability ``p`` and evaluation scale ``c`` the new features ``f`` become ``g * f``. In
evaluation ``g`` is ``c``; in training it is ``c / p`` or 0, for the batch or for each sample, with the mean
``c``. What reads them, norms included, sees on average what it sees in evaluation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._gating.adds import masked_value
from surgeon._gating.gate import Gate
from surgeon._gating.idle import with_idle
from surgeon._gating.lifted import Lifted, autocast
from surgeon._gating.skip import factor_of, masks
from surgeon._torch import under_vmap
from surgeon._tracing.nests import tensors


def batch_value(
    lifted: Lifted, gate: Gate, shortcut: Tensor, _onto: str, _fresh: bool, block: nn.Module, *inputs: Any
) -> Tensor:
    """Training, unit ``"batch"``: the features, or zeros; the arguments are those of `skip.batch_add`."""
    if torch.compiler.is_compiling() or under_vmap() or lifted.asks_ranks(gate, block):
        return masked_value(gate, lifted.run(block, *inputs))
    if gate.drop_rate > 0 and not gate.survives():
        return _zeros(lifted, gate, shortcut, block, inputs)
    return _whole(lifted, block, inputs, gate.correction())


def rows_value(
    lifted: Lifted, gate: Gate, shortcut: Tensor, _onto: str, _fresh: bool, block: nn.Module, *inputs: Any
) -> Tensor:
    """Training, unit ``"sample"``: the features of the samples that survive, and zeros for the others."""
    compiling = torch.compiler.is_compiling()
    if compiling or masks(lifted, gate, shortcut, inputs) or lifted.asks_ranks(gate, block):
        return masked_value(gate, lifted.run(block, *inputs))
    count = shortcut.shape[0]
    kept = count if gate.drop_rate == 0 else gate.survivors(count)
    factor = factor_of(gate, count, kept, block)
    if kept == count:
        return _whole(lifted, block, inputs, factor)
    if kept == 0:
        return _zeros(lifted, gate, shortcut, block, inputs)
    rows = gate.rows(count, kept, shortcut.device)
    _, taken = lifted.gathered(shortcut, "shortcut", rows, inputs)
    result = lifted.on_rows(block, inputs, taken, rows)
    zeros = result.new_zeros((count, *result.shape[1:]))
    return zeros.index_add(0, rows, result, alpha=factor)


def _whole(lifted: Lifted, block: nn.Module, inputs: Sequence[Any], factor: float) -> Tensor:
    result = lifted.run(block, *inputs)
    return result if factor == 1.0 else result * factor


def _zeros(lifted: Lifted, gate: Gate, shortcut: Tensor, block: nn.Module, inputs: Sequence[Any]) -> Tensor:
    """Zeros in place of the features; for each new size these run once, on fake tensors."""
    key = (
        autocast(shortcut.device),
        tuple([(t.shape, t.dtype, t.stride()) for value in inputs for t in tensors(value)]),
    )
    if key not in gate.types:
        made = None if lifted.hooked(block) else lifted.on_fake(block, inputs)
        gate.types[key] = made if made is None else (made.shape, made.stride(), made.dtype)
    form = gate.types[key]
    if form is None:
        return lifted.run(block, *inputs) * 0.0
    shape, stride, dtype = form
    zeros = torch.empty_strided(shape, stride, dtype=dtype, device=shortcut.device).zero_()
    idle = lifted.idle(block, inputs) if torch.is_grad_enabled() else []
    needed = gate.zeroes or not shortcut.requires_grad
    return with_idle(gate, zeros, idle) if idle and needed else zeros
