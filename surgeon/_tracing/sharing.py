"""Tells which calls of which blocks run the same code, so that one trace can stand for all of them.

A network repeats its blocks. Two calls are alike if the blocks and everything below them have the same
classes and tensors of the same make (size, strides, dtype, device, which of them are one and the same), if
their arguments are alike in the same way, and if their children ran the same operators. Whatever else a block
holds (a function, an object) must be the very same one: what cannot be compared differs. Attributes that are
floats (the rates of drop paths grow from block to block) are not compared here but by
`surgeon._tracing.reads.Reads.agree`, as most of them are never read.
"""

import types
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._tracing.fake import storage
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.record import Call
from surgeon._tracing.state import PLAIN


def likeness(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], log: OpLog, children: Sequence[Call]
) -> Hashable:
    """What two calls have in common if their traces are the same, unless a float tells them apart.

    Good for as long as the blocks and the arguments live, as it holds identities of objects.

    Args:
        block: The block that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        log: Knows which tensors depend on an input of the model.
        children: The recorded calls of its children.
    """
    looks = _Print(log)
    return looks.of(block), looks.of(args), looks.of(kwargs), tuple([looks.of_call(c) for c in children])


class _Print:
    """The print of objects that refer to one another: each is numbered where it is met first."""

    def __init__(self, log: OpLog) -> None:
        self.log = log
        self._numbers: dict[int, int] = {}
        self._memory: dict[int, int] = {}

    def of(self, value: Any) -> Hashable:
        """The print of anything."""
        if isinstance(value, (Tensor, nn.Module)):
            return self._numbered(value)
        if isinstance(value, PLAIN):
            return type(value), value
        return self._of_nest(value)

    def of_call(self, call: Call) -> Hashable:
        """The print of a recorded call: what it took, ran and gave."""
        taken = [self.of(t) for t in tensors((call.args, call.kwargs))]
        ran = tuple(self.log.ops[call.first_op : call.last_op])
        return self.of(call.module), tuple(taken), ran, self.of(call.output), call.wrote

    def _of_nest(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in (tuple, list, torch.Size):
            return kind, tuple([self.of(item) for item in value])
        if isinstance(value, dict):  # mostly empty: a module holds a dozen kinds of hooks
            return kind, tuple([(self.of(name), self.of(item)) for name, item in value.items()])
        if isinstance(value, types.MethodType):
            return id(value.__func__), self.of(value.__self__)
        if kind is set and all(isinstance(item, PLAIN) for item in value):
            return kind, frozenset(value)
        return "is", id(value)

    def _numbered(self, value: Tensor | nn.Module) -> Hashable:
        if id(value) in self._numbers:
            return "again", self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        return self._of_tensor(value) if isinstance(value, Tensor) else self._of_module(value)

    def _of_module(self, module: nn.Module) -> Hashable:
        held = [(k, None if isinstance(v, float) else self.of(v)) for k, v in module.__dict__.items()]
        return type(module), tuple(held)

    def _of_tensor(self, tensor: Tensor) -> Hashable:
        if tensor.layout != torch.strided or nn.parameter.is_lazy(tensor):
            return "is", id(tensor)
        memory = self._memory.setdefault(storage(tensor), len(self._memory))
        make = (type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, memory)
        return *make, tensor.storage_offset(), tensor.shape, tensor.stride(), self.log.active(tensor)
