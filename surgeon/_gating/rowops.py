"""Taking rows out of a batch and adding them back, forward and backward, in few passes over memory.

With ``S`` the operator that takes the rows, `Part` hands out ``(x, S x)`` and `Join` gives
``x + factor * S^T y``. Where the branch reads the shortcut itself, as in every identity block, the two
gradients that meet at the shortcut are joined in one pass: that of `Part` is ``dx + S^T dy``, a `Join`.

PyTorch's row operators are slow by a multiple on tensors whose channels lie last in memory, and lose that
layout. Here they always work on the view in which memory is in order. In small tensors, where a pass over
memory is nothing, its own operators are quicker than any function in Python.
"""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from surgeon._torch import transformed


def take(value: Tensor, rows: Tensor) -> Tensor:
    """``value[rows]``, laid out in memory as ``value`` is; a compiler sees to that itself."""
    order = None if is_compiling() else _in_memory(value)
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
    def forward(ctx: Any, value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return value.view_as(value), take(value, rows)

    @staticmethod
    def backward(ctx: Any, whole: Tensor, part: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return joined(whole, part.to(whole.dtype), rows, 1.0), None


class Join(torch.autograd.Function):
    """``(whole, part, rows, factor) -> whole + factor * part``, the sum being over ``rows`` only."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, part: Tensor, rows: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.factor = factor
        return put(whole, part, rows, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        part = take(grad, rows)
        if ctx.factor != 1.0:  # in place unless a second derivative looks on
            part = part * ctx.factor if torch.is_grad_enabled() else part.mul_(ctx.factor)
        return grad, part, None, None


SMALL = 1 << 14
"""With fewer numbers an operator takes as long whatever it does, and a Python function several times that."""


def by_operators(value: Tensor) -> bool:
    """Whether PyTorch's own operators take the rows of ``value``, and put them back, in less time.

    Their backwards make passes over memory that those above save, which counts in large tensors only. A
    compiler and the transforms of `torch.func` see through them, and through nothing else.
    """
    return is_compiling() or transformed() or (value.numel() < SMALL and value.is_contiguous())


def parted(value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor, and some of its rows."""
    if by_operators(value):
        return value, take(value, rows)
    pair: tuple[Tensor, Tensor] = Part.apply(value, rows)
    return pair


def joined(whole: Tensor, part: Tensor, rows: Tensor, factor: float) -> Tensor:
    """``whole`` with ``factor * part`` added to its ``rows``."""
    if by_operators(whole):
        return whole.index_add(0, rows, part, alpha=factor)
    made: Tensor = Join.apply(whole, part, rows, factor)
    return made


# --- in one graph -----------------------------------------------------------------------------------


class Taken(torch.autograd.Function):
    """Some rows of a tensor in a compiled graph: ``(value, rows, places) -> value[rows]``.

    ``places`` has for each row of ``value`` its place in ``rows``, or a number beyond. With it the backward
    is a gather, too, which a compiler fuses with its neighbours; adding rows up at places it cannot.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places)
        return value.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, places = ctx.saved_tensors
        return _laid_out(grad, places), None, None


class Spread(torch.autograd.Function):
    """Rows at their places in a compiled graph, zeros elsewhere; the arguments are those of `Taken`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places)
        return _laid_out(part, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, _ = ctx.saved_tensors
        return grad.index_select(0, rows), None, None


def _laid_out(part: Tensor, places: Tensor) -> Tensor:
    last = part.shape[0] - 1
    there = (places <= last).view(-1, *[1] * (part.ndim - 1))
    return torch.where(there, part.index_select(0, places.clamp(max=last)), 0)
