"""Gradients of what took no part in a step: zeros, or none."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._gating.gate import Gate
from surgeon._torch import transformed


def with_idle(gate: Gate, value: Tensor, idle: Sequence[Tensor], sharing: str = "view") -> Tensor:
    """A value as it is; idle tensors, which took no part in it, get gradients of zeros from it, or none."""
    function = _IdleTransformed if transformed() else _Idle
    return function.apply(value, sharing, gate.zeroes, *idle)  # type: ignore[no-any-return]


class _Idle(torch.autograd.Function):
    """Passes its first argument through and gives the others a gradient of zeros, or none."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, sharing: str, zeroes: bool, *idle: Tensor) -> Tensor:
        _note(ctx, value, sharing, zeroes, idle)
        return _passed(value, sharing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _zeros(ctx, grad)


class _IdleTransformed(torch.autograd.Function):
    """The same in the style that `torch.func` and forward mode ask for, which takes several times as long."""

    @staticmethod
    def forward(value: Tensor, sharing: str, _zeroes: bool, *_idle: Tensor) -> Tensor:
        return _passed(value, sharing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        value, sharing, zeroes, *idle = inputs
        _note(ctx, value, sharing, zeroes, idle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _zeros(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        """Of a shortcut that is not differentiated there is none."""
        return None if tangent is None else _passed(tangent, ctx.sharing)


def _note(ctx: Any, value: Tensor, sharing: str, zeroes: bool, idle: Sequence[Tensor]) -> None:
    ctx.sharing, ctx.zeroes = sharing, zeroes
    ctx.like = [(t.shape, t.dtype, t.device) for t in idle]
    ctx.idle = idle if any(type(t) not in (Tensor, nn.Parameter) for t in idle) else None
    if sharing == "same":
        ctx.mark_dirty(value)


def _zeros(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    own = grad if ctx.needs_input_grad[0] else None
    idle: list[Tensor | None] = [None] * len(ctx.like)
    if ctx.zeroes and ctx.idle is not None:  # sharded tensors and the like know how to make their own zeros
        idle = [torch.zeros_like(t) for t in ctx.idle]
    elif ctx.zeroes:
        idle = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
    return own, None, None, *idle


def _passed(value: Tensor, sharing: str) -> Tensor:
    if sharing == "same":
        return value
    return value.clone() if sharing == "copy" else value.view_as(value)
