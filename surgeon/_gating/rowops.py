"""Taking rows out of a batch and adding them back, forward and backward, in few passes over memory.

With ``S`` the operator that takes the rows, `Part` hands out ``(x, S x)`` and `Join` gives
``x + factor * S^T y``. Where the branch reads the shortcut itself, as in every identity block, the two
gradients that meet at the shortcut are joined in one pass: that of `Part` is ``dx + S^T dy``, a `Join`.

PyTorch's row operators are slow by a multiple on tensors whose channels lie last in memory, and lose that
layout. Here they always work on the view in which memory is in order.
"""

from typing import Any

import torch
from torch import Tensor


def take(value: Tensor, rows: Tensor) -> Tensor:
    """``value[rows]``, laid out in memory as ``value`` is."""
    order = _in_memory(value)
    if order is None:
        return value.index_select(0, rows)
    back = sorted(range(value.ndim), key=order.__getitem__)
    return value.permute(order).index_select(0, rows).permute(back)


def put(whole: Tensor, part: Tensor, rows: Tensor, factor: float) -> Tensor:
    """A new tensor: ``whole`` with ``factor * part`` added to its ``rows``."""
    out = whole.clone()
    order = _in_memory(out)
    if order is None:
        return out.index_add_(0, rows, part, alpha=factor)
    out.permute(order).index_add_(0, rows, part.permute(order), alpha=factor)
    return out


def _in_memory(value: Tensor) -> list[int] | None:
    """The dimensions in the order in which memory runs through them, where it is another; the first leads."""
    if value.is_contiguous():
        return None
    strides = value.stride()
    order = [0, *sorted(range(1, value.ndim), key=lambda d: -strides[d])]
    return order if value.permute(order).is_contiguous() else None


class Part(torch.autograd.Function):
    """A tensor, and some of its rows: ``(value, rows) -> (value, value[rows])``."""

    @staticmethod
    def forward(value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return value.view_as(value), take(value, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, whole: Tensor, part: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return joined(whole, part.to(whole.dtype), rows, 1.0), None


class Join(torch.autograd.Function):
    """``(whole, part, rows, factor) -> whole + factor * part``, the sum being over ``rows`` only."""

    @staticmethod
    def forward(whole: Tensor, part: Tensor, rows: Tensor, factor: float) -> Tensor:
        return put(whole, part, rows, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[2])
        ctx.factor = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        part = take(grad, rows)
        if ctx.factor != 1.0:  # in place unless a second derivative looks on
            part = part * ctx.factor if torch.is_grad_enabled() else part.mul_(ctx.factor)
        return grad, part, None, None


# --- forward mode, which a compiler does not want to see ------------------------------------------


class _Part(Part):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        Part.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _rows: None) -> tuple[Tensor, Tensor]:
        (rows,) = ctx.saved_tensors
        return tangent.view_as(tangent), take(tangent, rows)


class _Join(Join):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        Join.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def jvp(ctx: Any, whole: Tensor, part: Tensor, *_: None) -> Tensor:
        (rows,) = ctx.saved_tensors
        return put(whole, part, rows, ctx.factor)


def parted(value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor, and some of its rows, by `Part`."""
    pair: tuple[Tensor, Tensor] = (Part if torch.compiler.is_compiling() else _Part).apply(value, rows)
    return pair


def joined(whole: Tensor, part: Tensor, rows: Tensor, factor: float) -> Tensor:
    """``whole`` with ``factor * part`` added to its ``rows``, by `Join`."""
    made: Tensor = (Join if torch.compiler.is_compiling() else _Join).apply(whole, part, rows, factor)
    return made
