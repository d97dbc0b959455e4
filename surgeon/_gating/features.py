"""Gates on new features that a block concatenates: where one drops, zeros of their size take their place.

With survival probability ``p`` and evaluation scale ``c`` the new features ``f`` become ``g * f``. In
evaluation ``g`` is ``c``; in training it is ``c / p`` or 0, for the batch or for each sample, with the mean
``c``. What reads them, norms included, sees on average what it sees in evaluation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._gating.gate import Gate
from surgeon._gating.skip import (
    Lifted,
    _asks_ranks,
    _factor,
    _gathered,
    _idle,
    _masks,
    _modules,
    _run,
    branch_result,
    with_idle,
)
from surgeon._mark import mark
from surgeon._torch import under_vmap
from surgeon._tracing.nests import tensors


def masked_value(gate: Gate, value: Tensor) -> Tensor:
    """Training, the features computed: ``mask * value``."""
    # A compiled graph must not depend on the rate's value: it would be compiled anew with each change.
    if torch.compiler.is_compiling() or gate.drop_rate > 0:
        return value * gate.mask(value)
    return value if gate.scale == 1.0 else value * gate.scale


def evaluating_value(gate: Gate, value: Tensor) -> Tensor:
    """Evaluation: ``c * value``; while a fold looks on, a mark instead of the factor."""
    if gate.marked_as is not None:
        marked: Tensor = mark(value, gate.marked_as)
        return marked
    return value if gate.scale == 1.0 else value * gate.scale


def batch_value(
    lifted: Lifted, gate: Gate, shortcut: Tensor, _onto: str, _fresh: bool, block: nn.Module, *inputs: Any
) -> Tensor:
    """Training, unit ``"batch"``: the features, or zeros; the arguments are those of `skip.batch_add`."""
    if torch.compiler.is_compiling() or under_vmap() or _asks_ranks(lifted, gate, block):
        return masked_value(gate, lifted.run(block, *inputs))
    if gate.drop_rate > 0 and not gate.survives():
        return _zeros(lifted, gate, shortcut, block, inputs)
    return _whole(lifted, block, inputs, gate.correction())


def rows_value(
    lifted: Lifted, gate: Gate, shortcut: Tensor, _onto: str, _fresh: bool, block: nn.Module, *inputs: Any
) -> Tensor:
    """Training, unit ``"sample"``: the features of the samples that survive, and zeros for the others."""
    compiling = torch.compiler.is_compiling()
    if compiling or _masks(lifted, gate, shortcut, inputs) or _asks_ranks(lifted, gate, block):
        return masked_value(gate, lifted.run(block, *inputs))
    count = shortcut.shape[0]
    kept = count if gate.drop_rate == 0 else gate.survivors(count)
    factor = _factor(gate, count, kept, block)
    if kept == count:
        return _whole(lifted, block, inputs, factor)
    if kept == 0:
        return _zeros(lifted, gate, shortcut, block, inputs)
    rows = gate.rows(count, kept, shortcut.device)
    _, taken = _gathered(lifted, shortcut, "shortcut", rows, inputs)
    result = _run(lifted, block, inputs, taken, rows)
    zeros = result.new_zeros((count, *result.shape[1:]))
    return zeros.index_add(0, rows, result, alpha=factor)


def _whole(lifted: Lifted, block: nn.Module, inputs: Sequence[Any], factor: float) -> Tensor:
    result = lifted.run(block, *inputs)
    return result if factor == 1.0 else result * factor


def _zeros(lifted: Lifted, gate: Gate, shortcut: Tensor, block: nn.Module, inputs: Sequence[Any]) -> Tensor:
    """Zeros in place of the features; for each new size these run once, on fake tensors."""
    kind = shortcut.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    autocast = torch.get_autocast_dtype(kind) if casts else None
    key = autocast, tuple([(t.shape, t.dtype, t.stride()) for value in inputs for t in tensors(value)])
    if key not in gate.types:
        hooked = any(m._forward_pre_hooks or m._forward_hooks for m in _modules(lifted, block))
        made = None if hooked else branch_result(lifted, block, inputs)  # hooks would see fake tensors
        gate.types[key] = made if made is None else (made.shape, made.stride(), made.dtype)
    form = gate.types[key]
    if form is None:
        return lifted.run(block, *inputs) * 0.0
    shape, stride, dtype = form
    zeros = torch.empty_strided(shape, stride, dtype=dtype, device=shortcut.device).zero_()
    idle = list(_idle(lifted, block, inputs)) if torch.is_grad_enabled() else []
    needed = gate.zeroes or not shortcut.requires_grad
    return with_idle(gate, zeros, idle) if idle and needed else zeros
