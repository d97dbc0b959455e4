"""Runs the nodes of a block's graph on fake values while it is traced, and notes what each of them does."""

import functools
import operator
import types
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg

from surgeon._tracing.blame import asks_numbers
from surgeon._tracing.children import Below, StandIn
from surgeon._tracing.facts import Fact, numbers_asked
from surgeon._tracing.fake import storage
from surgeon._tracing.holders import Holder, holders
from surgeon._tracing.leaves import called, checkpointed
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import Op, OpLog
from surgeon._tracing.record import Call
from surgeon._tracing.state import PLAIN, draws, is_library
from surgeon._tracing.undisturbed import generators_kept, untouched
from surgeon.errors import TraceError

DRAWS = "its forward draws random numbers from Python's or NumPy's generator"


class Runner:
    """Runs nodes one by one.

    Args:
        block: The block.
        log: Notes the operators.
        replays: The recorded calls of its children, whose results need no second run.
        below: How the modules below it are treated.

    Attributes:
        facts: What is known of the nodes that have run.
        stood: What stood for the result of children, by name.
        unsteady: What children change themselves, by dotted name.
    """

    def __init__(
        self, block: nn.Module, log: OpLog, replays: Mapping[nn.Module, list[Call]], below: Below
    ) -> None:
        self.block, self.log, self._below = block, log, below
        self._replays = {module: list(calls) for module, calls in replays.items()}
        self.facts: dict[fx.Node, Fact] = {}
        self.stood: dict[str, StandIn] = {}
        self.unsteady: set[str] = set()

    def run(self, node: fx.Node) -> Any:
        """Runs one node on fake values and notes its facts."""
        args, kwargs = _mutable(map_arg((node.args, node.kwargs), lambda n: self.facts[n].value))
        read = tensors((args, kwargs))
        recorded = self._recorded(node, read)
        if recorded is not None:
            self.unsteady |= {f"{node.target}.{name}" for name in recorded.changed}
            self.facts[node] = Fact(
                recorded.output,
                frozenset(storage(t) for t in read),
                frozenset(),
                tuple(self.log.ops[recorded.first_op : recorded.last_op]),
                any(self.log.active(t) for t in tensors(recorded.output)),
            )
            return recorded.output
        versions = [t._version for t in read]
        held = self._held(node)
        start = len(self.log.ops)
        self.log.touched.clear()
        with torch.no_grad(), self.log.fake, self.log:
            try:
                value, ops = self._value_and_ops(node, args, kwargs, start)
            except Exception as error:
                if asks_numbers(error):
                    raise TraceError(numbers_asked(self.facts, node, self.log.ops[start:])) from error
                raise
        for given, holder in held:  # later readers of it would not be known to depend on this node
            if holder.changed():
                raise TraceError(f"its forward changes a {type(given).__name__} that it was given")
        written = (t for t, version in zip(read, versions, strict=True) if t._version != version)
        self.facts[node] = Fact(
            value,
            frozenset(storage(t) for t in read),
            frozenset(storage(t) for t in written),
            ops,
            any(self.log.active(t) for t in tensors(value)),
            frozenset({storage(t) for t in read} - {storage(t) for t in tensors(value)} - self.log.touched),
        )
        return value

    def _value_and_ops(self, node: fx.Node, args: Any, kwargs: Any, start: int) -> tuple[Any, tuple[Op, ...]]:
        """What a node gives, and what ran for it; or what stands for a child that only runs on numbers."""
        stands = self._below.stand_ins.get(str(node.target)) if node.op == "call_module" else None
        try:
            value = self._call(node, args, kwargs)
        except Exception:
            given = tensors((args, kwargs))
            drawn = any(op.random for op in self.log.ops[start:])
            if stands is None or stands.place >= len(given) or (drawn and not stands.draws):
                raise
            self.stood[str(node.target)] = stands
            return given[stands.place].clone(), stands.ops
        return value, tuple(self.log.ops[start:])

    def _recorded(self, node: fx.Node, read: list[Tensor]) -> Call | None:
        """The recorded call that this node repeats, if its result can be taken as it is."""
        module = self.block.get_submodule(str(node.target)) if node.op == "call_module" else None
        calls = self._replays.get(module) if module is not None else None
        if not calls:
            return None
        call = calls.pop(0)
        before = tensors((call.args, call.kwargs))
        same = [(t.shape, t.dtype) for t in before] == [(t.shape, t.dtype) for t in read]
        shared = {storage(t) for t in before} & {storage(t) for t in tensors(call.output)}
        return call if same and not shared and not call.wrote and tensors(call.output) else None

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target is checkpointed:
            return args[0](*args[2:], **kwargs)
        if node.op == "call_function":
            return called(getattr(node.target, "plain", node.target), args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self._call_child(self.block.get_submodule(str(node.target)), args, kwargs)
        value: Any = self.block
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return self.log.shadow(value) if isinstance(value, Tensor) else value

    def _call_child(self, child: nn.Module, args: Any, kwargs: Any) -> Any:
        """Runs a child, whose random numbers are its own affair unless it hands them to the forward."""
        drawn, changed = draws(), list[str]()
        # A hook on the child may change what the block holds; that is no doing of the forward's either.
        guard = (
            nullcontext() if _only_library(child) else untouched(self.block, changed, attributes_only=True)
        )
        with generators_kept(), guard:
            value = child(*args, **kwargs)
            if not tensors(value) and draws() != drawn:
                raise TraceError(DRAWS)
        self.unsteady |= set(changed)
        return value

    def _held(self, node: fx.Node) -> list[tuple[Any, Holder]]:
        """The nests and objects that a node gets and must not change, with what they hold; a child may."""
        if node.target in (getattr, operator.getitem, setattr):
            return []
        child = node.op == "call_module"
        kinds = (list, dict, set) if child else object
        given = (self.facts[n].value for n in node.all_input_nodes)
        nests = [v for v in given if isinstance(v, kinds) and not isinstance(v, (Tensor, *PLAIN))]
        if child:
            return [(nest, Holder.of("", nest)) for nest in nests]
        return [(nest, holder) for nest in nests for holder in holders({"": nest})]


def _only_library(child: nn.Module) -> bool:
    """Whether a child runs no code but PyTorch's own, which keeps what it changes to itself."""
    return all(
        is_library(type(module).__module__)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not any(isinstance(value, _CODE) for value in vars(module).values())
        for module in child.modules()
    )


_CODE = (types.FunctionType, types.MethodType, functools.partial)


def _mutable(tree: Any) -> Any:
    """Fx keeps arguments in immutable lists and dicts; what is called may want to write to them."""
    if isinstance(tree, immutable_list):
        return [_mutable(item) for item in tree]
    if isinstance(tree, immutable_dict):
        return {key: _mutable(item) for key, item in tree.items()}
    return tuple(_mutable(item) for item in tree) if type(tree) is tuple else tree
