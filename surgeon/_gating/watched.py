"""Gated models looked at as they evaluate: marks in place of scales, notes of calls, blocks without gates."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgeon._gating.block import settle_class, without_gates
from surgeon._gating.call_forms import Arguments, forms
from surgeon._gating.forwards import Gating
from surgeon._gating.gated import Placed, gated_blocks
from surgeon.errors import UnseenCallError

Seen = dict[int, dict[Any, Arguments | None]]
"""By the id of a gating, the ways in which one run of the model called its block, with their arguments."""


@contextmanager
def marking(model: nn.Module, gates: Sequence[Placed]) -> Iterator[None]:
    """Inside, the evaluation of each gate puts a mark with its name in place of its factor."""
    blocks = [block for _, block, _ in gated_blocks(model)]
    try:
        for one in gates:
            one.gate.marked_as = one.name
        for block in blocks:
            settle_class(block)
        yield
    finally:
        for one in gates:
            one.gate.marked_as = None
        for block in blocks:
            settle_class(block)


@contextmanager
def watching(model: nn.Module, *, strict: bool) -> Iterator[Seen]:
    """Inside, it is noted how gated blocks are called; ``strict`` refuses ways without a forward."""
    gatings = [gating for _, _, gating in gated_blocks(model)]
    seen: Seen = {id(gating): {} for gating in gatings}

    def noting(gating: Gating) -> Any:
        def run(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if strict and not gating.knows(block, args, kwargs):
                raise UnseenCallError(f"{gating.name or 'the model'} has no forward for this call")
            seen[id(gating)].setdefault(gating.way(args, kwargs), forms(args, kwargs))
            return Gating.run(gating, block, args, kwargs)

        return run

    try:
        for gating in gatings:
            gating.__dict__["run"] = noting(gating)
        yield seen
    finally:
        for gating in gatings:
            gating.__dict__.pop("run", None)


@contextmanager
def ungated(model: nn.Module) -> Iterator[None]:
    """Inside, every block runs its own forward, or the one that was put on it since."""
    gated = [(block, type(block)) for _, block, _ in gated_blocks(model)]
    try:
        for block, _ in gated:
            without_gates(block)
        yield
    finally:
        for block, cls in gated:
            block.__dict__.pop("forward", None)
            block.__class__ = cls
