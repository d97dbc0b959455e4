"""Puts gates into a block's traced forward and installs it on the block.

Two forms. *Masked*: the addition becomes ``masked_add(gate, shortcut, branch)`` and everything else stays
where it was. *Lifted*: the nodes that run for the branch alone move into a function of their own, which
``skipping_add`` calls only when the branch survives. In both, stochastic depth that was on the branch is
taken off, as the gate stands in for it.

The block keeps its identity: its ``__class__`` becomes a generated subclass of its class (as in
`torch.nn.utils.parametrize`), whose forward runs the generated code on the block's own children and
parameters, never on copies. `ungate` puts the class back.
"""

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from surgeon._example import no_inference_mode, tensors, untouched
from surgeon._flow import Flow
from surgeon._gate import Gate, evaluating_add, held_open, masked_add, skipping_add
from surgeon._record import OpLog, to_fake
from surgeon._residual import Addition, additions, row_mask, writes_to
from surgeon._trace import CONSTANTS, is_size, storage, trace
from surgeon.errors import TraceError, UnseenCallError

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Spliced:
    """A block's forward with gates in it.

    Attributes:
        run: ``run(block, gates, *arguments)``, the arguments as they were traced.
        exact: It holds for the traced shapes only.
        kept_whole: For each gate (by ordinal) whose branch could not be lifted out, why.
    """

    run: Run
    exact: bool
    kept_whole: Mapping[int, str]


def splice(flow: Flow, chosen: Sequence[Addition], *, training: bool, skip: bool, rewritten: bool) -> Spliced:
    """Generates a block's forward with a gate on each chosen addition.

    Args:
        flow: The traced forward.
        chosen: The additions, in order; the i-th one uses ``gates[i]``.
        training: Whether this is the training forward or the evaluating one.
        skip: Lift branches out where that is sound, so that a dropped one does not run.
        rewritten: Something outside the block writes to its output in place.
    """
    lifted = {a.ordinal: reason for a in chosen if (reason := unliftable(flow, a))} if skip else {}
    writer = _Writer(flow, rewritten)
    for index, addition in enumerate(chosen):
        if not training:
            writer.add(index, addition, evaluating_add)
        elif skip and addition.ordinal not in lifted:
            writer.lift(index, addition)
        else:
            writer.add(index, addition, masked_add)
    return Spliced(writer.write(), flow.trace.exact, lifted)


def unliftable(flow: Flow, addition: Addition) -> str:
    """Why the branch cannot move into a function of its own; ``""`` if it can."""
    if not addition.region:
        return "the branch result is also used elsewhere in the block"
    inside, end = set(addition.region), flow.position(addition.node)
    for node in addition.region:
        for other in flow.order[flow.position(node) : end]:
            if other not in inside and flow.fact(other).writes & flow.fact(node).reads:
                return f"{other.name} writes in place to what the branch reads"
    return ""


class _Writer:
    """Copies a traced graph node by node, with some additions replaced."""

    def __init__(self, flow: Flow, rewritten: bool) -> None:
        self.flow, self.rewritten = flow, rewritten
        self.graph = fx.Graph()
        self.block = _receiver(self.graph)
        self.gates = self.graph.placeholder("_gates")
        self.env: dict[fx.Node, fx.Node] = {}
        self.replaced: dict[fx.Node, Callable[[], fx.Node]] = {}
        self.left_out: set[fx.Node] = set()
        self.passed: dict[fx.Node, fx.Node] = {}

    def add(self, index: int, addition: Addition, form: Callable[..., Tensor]) -> None:
        """Replaces an addition by ``form(gate, shortcut, branch, onto)``."""
        self._take_off_drops(addition)

        def emit() -> fx.Node:
            sides = (self.env[addition.shortcut], self.env[addition.branch])
            return self.graph.call_function(form, (self._gate(index), *sides, _onto(addition)))

        self.replaced[addition.node] = emit

    def lift(self, index: int, addition: Addition) -> None:
        """Moves the branch of an addition into a function that runs only when the gate is open."""
        self._take_off_drops(addition)
        branch, reads = self._branch(addition)
        self.left_out |= set(addition.region)

        def emit() -> fx.Node:
            inputs = (self.env[node] for node in reads)
            head = (self._gate(index), self.env[addition.shortcut], _onto(addition), self._fresh(addition))
            return self.graph.call_function(_skipper(branch), (*head, self.block, *inputs))

        self.replaced[addition.node] = emit

    def write(self) -> Run:
        for node in self.flow.order:
            if node in self.left_out:
                continue
            if node in self.replaced:
                self.env[node] = self.replaced[node]()
                if writes_to(node) is not None:  # the name that was added to in place now means the sum
                    self.env[node.args[0]] = self.env[node]
            elif node in self.passed:
                self.env[node] = self.env[self.passed[node]]
            elif node.op == "placeholder":
                self.env[node] = _input(self.graph, node)
            else:
                self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
        return _compile(self.graph)

    def _gate(self, index: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (self.gates, index))

    def _take_off_drops(self, addition: Addition) -> None:
        for drop in addition.drops:
            mask = None if drop.op == "call_module" else row_mask(self.flow, drop)
            kept = [
                n
                for n in drop.all_input_nodes
                if n is not mask and isinstance(self.flow.fact(n).value, Tensor)
            ]
            self.passed[drop] = kept[0]
            if mask is not None:
                self.left_out |= set(self.flow.region(mask, drop))

    def _branch(self, addition: Addition) -> tuple[Run, list[fx.Node]]:
        """The branch as a function ``(block, *reads)``, and the nodes whose values it reads."""
        graph, env, reads = fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
        _receiver(graph)
        inside = [n for n in addition.region if n not in self.left_out]
        own = set(inside)
        for node in inside:
            self._gather(node, own, reads)
        for node in reads:
            env[node] = _input(graph, node)
        todo = sorted(own, key=self.flow.position)
        for node in todo:
            env[node] = (
                env[self.passed[node]] if node in self.passed else graph.node_copy(node, env.__getitem__)
            )
        graph.output(env[addition.branch])
        return _compile(graph), reads

    def _gather(self, node: fx.Node, own: set[fx.Node], reads: list[fx.Node]) -> None:
        """Sorts what ``node`` uses: sizes are read anew inside the branch, all else is handed in."""
        sources = [self.passed[node]] if node in self.passed else node.all_input_nodes
        for source in sources:
            if source in own or source in reads:
                continue
            if source.op != "placeholder" and is_size(source, self.flow.fact(source)):
                own.add(source)
                self._gather(source, own, reads)
            else:
                reads.append(source)

    def _fresh(self, addition: Addition) -> bool:
        """Whether something writes in place later on to the result, or to the shortcut it would share."""
        if _onto(addition) == "shortcut":
            return False  # there the result is the shortcut in the original too
        shared = {
            storage(self.flow.fact(n).value) for n in (addition.node, addition.shortcut) if n is not None
        }
        later = self.flow.order[self.flow.position(addition.node) + 1 : -1]
        return self.rewritten or any(shared & self.flow.fact(node).writes for node in later)


def _onto(addition: Addition) -> str:
    """The side that an addition writes to in place: ``"shortcut"``, ``"branch"``, or ``""`` for neither."""
    left = writes_to(addition.node)
    if left is None:
        return ""
    return "shortcut" if left is addition.shortcut else "branch"


@functools.cache
def _skipper(branch: Run) -> Run:
    """`skipping_add` with its branch filled in, under a name of its own for generated code."""

    def skip(gate: Gate, shortcut: Tensor, onto: str, fresh: bool, block: nn.Module, *inputs: Any) -> Tensor:
        return skipping_add(gate, shortcut, onto, fresh, branch, block, *inputs)

    return skip


def _receiver(graph: fx.Graph) -> fx.Node:
    """The block as a value in generated code; fx clears names after their last use, ``self`` must stay."""
    return graph.create_node("placeholder", "self", name="block")


def _input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A placeholder for ``node``; its target is private, so that no argument's name can clash."""
    return graph.create_node("placeholder", f"_{node.name}_", name=node.name)


_compiled: dict[tuple[Any, ...], Run] = {}


def _compile(graph: fx.Graph) -> Run:
    """Python source of a graph as a function; equal blocks share one, so that compilers see it once."""
    for node in graph.nodes:
        node.type = None
    code = graph.python_code("self")
    key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
    if key not in _compiled:
        graph.lint()
        scope = dict(code.globals)
        exec(compile(code.src, "<surgeon>", "exec"), scope)  # noqa: S102 - what fx wrote, as GraphModule does
        _compiled[key] = scope["forward"]
    return _compiled[key]


class Gating:
    """What a gated block carries: its gates, and its forward for each way of calling it seen so far.

    Args:
        name: Qualified name of the block.
        gates: The gates, in the order of their additions.
        rewritten: Something outside the block writes to its output in place.
    """

    def __init__(self, name: str, gates: Sequence[Gate], rewritten: bool) -> None:
        self.name = name
        self.gates = tuple(gates)
        self.rewritten = rewritten
        self.exact = False
        self.ambient = False
        self.attributes: tuple[str, ...] = ()
        self.runs: dict[Any, Run] = {}

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The gated forward of ``block``."""
        run = self.runs.get(self._key(block, args, kwargs))
        if run is None:
            run = self._extend(block, args, kwargs)
        return run(block, self.gates, *args, *kwargs.values())

    @property
    def evaluates_plainly(self) -> bool:
        """Whether evaluation is the block's own forward, untouched."""
        return all(gate.scale == 1.0 and gate.marked_as is None for gate in self.gates)

    def prepare(self, block: nn.Module, flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spliced:
        """Makes the forward for one way of calling the block, in the mode it is in, given its trace.

        Raises:
            UnseenCallError: The trace lacks one of the residual adds that carry a gate.
        """
        spliced = splice(
            flow,
            self._chosen(additions(flow)),
            training=block.training,
            skip=any(gate.skips for gate in self.gates),
            rewritten=self.rewritten,
        )
        found = flow.trace
        self.exact |= found.exact
        self.ambient |= found.ambient
        self.attributes = tuple(sorted({*self.attributes, *found.attributes}))
        self.runs[self._key(block, args, kwargs)] = spliced.run
        return spliced

    def _extend(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """Traces the block anew for a way of calling it that was not seen before."""
        log = OpLog(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            with no_inference_mode(), untouched(block), held_open():
                fake_args, fake_kwargs = to_fake(log.fake, (args, kwargs))
                for tensor in tensors((fake_args, fake_kwargs)):
                    if tensor.is_floating_point():
                        log.root(tensor)
                flow = Flow(trace(block, fake_args, fake_kwargs, log))
            self.prepare(block, flow, args, kwargs)
        except TraceError as error:
            raise UnseenCallError(
                f"{self._called(args, kwargs)}, and tracing it that way failed: {error}"
            ) from error
        return self.runs[self._key(block, args, kwargs)]

    def _chosen(self, found: Sequence[Addition]) -> list[Addition]:
        by_ordinal = {addition.ordinal: addition for addition in found if addition.kind}
        missing = [gate.name for gate in self.gates if gate.ordinal not in by_ordinal]
        if missing:
            raise UnseenCallError(
                f"{self.name or 'the model'} is called in a way in which it does not perform the gated "
                f"addition {missing[0]}; exclude it (exclude={missing[0]!r}) or call it as on the example"
            )
        return [by_ordinal[gate.ordinal] for gate in self.gates]

    def _key(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything that decides which code the block's forward runs."""
        return (
            block.training,
            tuple([_kind(value, self.exact) for value in args]),
            tuple([(name, _kind(value, self.exact)) for name, value in kwargs.items()]),
            tuple([getattr(block, name, None) for name in self.attributes]),
            (torch.is_grad_enabled(), torch.is_autocast_enabled()) if self.ambient else None,
        )

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        pattern = [str(_kind(a, True)) for a in args] + [f"{k}={_kind(v, True)}" for k, v in kwargs.items()]
        return (
            f"{self.name or 'the model'} is called in a way not seen on the example: ({', '.join(pattern)})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gating":
        twin = Gating(self.name, copy.deepcopy(self.gates, memo), self.rewritten)
        twin.exact, twin.ambient, twin.attributes = self.exact, self.ambient, self.attributes
        twin.runs = dict(self.runs)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Generated functions do not pickle; they are made again at the first call.
        return {**self.__dict__, "runs": {}}


# What the decorator torch.compiler.disable does, which would import the whole compiler with surgeon.
Gating._extend._torchdynamo_disable = True  # type: ignore[attr-defined]


def _kind(value: Any, exact: bool) -> Any:
    """What of an argument decides which code runs: for tensors the rank, or the whole shape if exact."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device.type) if exact else value.ndim
    if isinstance(value, CONSTANTS):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple([_kind(getattr(value, f.name), exact) for f in fields(value)])
    if isinstance(value, (list, tuple)):
        return type(value), tuple([_kind(item, exact) for item in value])
    if isinstance(value, dict):
        return dict, tuple([(name, _kind(item, exact)) for name, item in value.items()])
    return value if exact and isinstance(value, (int, float)) else type(value)


class GatedBlock(nn.Module):
    """Mixed into the class of a gated block, in front of it."""

    _ungated: type[nn.Module]
    _surgeon: Gating

    def extra_repr(self) -> str:
        gating, own = gating_of(self), super().extra_repr()
        if gating is None:
            return own
        gates = ", ".join(f"{g.name.rpartition('.')[2]} p={g.survival:.4g}" for g in gating.gates)
        return f"{own}, gates: {gates}" if own else f"gates: {gates}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        _, _, *rest = reduced
        return (_revive, (self._ungated,), *rest)


def _revive(ungated: type[nn.Module]) -> nn.Module:
    cls = gated_class(ungated)
    block: nn.Module = cls.__new__(cls)
    return block


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def gated_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward runs a block's gates; of the same name, in the same module."""
    if issubclass(cls, GatedBlock):  # a slice or a sibling of a gated block has its class and no gates
        return cls
    if cls not in _classes:
        _classes[cls] = _subclass(cls)
    return _classes[cls]


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A slice of a gated Sequential is of the gated class and has no gates.
        gating = getattr(self, "_surgeon", None)
        if gating is None or (not self.training and gating.evaluates_plainly):
            return original(self, *args, **kwargs)
        return gating.run(self, args, kwargs)

    body = {
        "forward": forward,
        "_ungated": cls,
        "_ungated_forward": original,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (GatedBlock, cls), body)


def gate_block(block: nn.Module, gating: Gating) -> None:
    """Installs ``gating`` on ``block``; the block's class becomes a subclass of what it was."""
    cls = gated_class(type(block))
    block.__dict__["_surgeon"] = gating
    block.__class__ = cls


def ungate_block(block: nn.Module) -> None:
    """Gives ``block`` its own class back and takes its gates away."""
    block.__class__ = type(block)._ungated  # type: ignore[attr-defined]
    del block.__dict__["_surgeon"]


def gating_of(module: nn.Module) -> Gating | None:
    """The gating of a gated block, else None."""
    return module.__dict__.get("_surgeon") if isinstance(module, GatedBlock) else None
