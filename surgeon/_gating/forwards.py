"""Installs gated forwards on a block, and makes another one for each new way of calling it.

The block keeps its identity: its ``__class__`` becomes a generated subclass of its class (as in
`torch.nn.utils.parametrize`) with the same name, whose forward runs the generated code. Gates are no
submodules: they have no weights, and ``children()`` of a block must stay what it was. `ungate_block` puts the
class back.
"""

import copy
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._finding.residual import meant
from surgeon._gating.gate import NOTE, Gate
from surgeon._gating.places import Mark, again, located
from surgeon._gating.splice import Run, Spliced, splice
from surgeon._gating.ways import Arguments, forms
from surgeon._tracing.below import Below
from surgeon._tracing.example import no_inference_mode, tensors, untouched
from surgeon._tracing.facts import Path, Trace
from surgeon._tracing.fake import held_open, to_fake
from surgeon._tracing.given import kinds
from surgeon._tracing.mentions import Place
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.reads import attribute
from surgeon._tracing.state import ambient, kind, state
from surgeon._tracing.trace import Unannounced, trace
from surgeon.errors import CheckpointError, TraceError, UnseenCallError, WrappedModelError

_MANY = 64  # ways of calling one block, each traced and kept


class Gating:
    """What a gated block carries: its gates, and its forward for each way of calling it seen so far.

    Args:
        name: Qualified name of the block.
        gates: The gates, in the order of their additions.
        rewritten: Something outside the block writes to its output in place.
        kept: Places of the arguments that autograd keeps anyway, for the backward of what made them.
    """

    def __init__(
        self, name: str, gates: Sequence[Gate], rewritten: bool, kept: frozenset[int] = frozenset()
    ) -> None:
        self.name = name
        self.gates = tuple(gates)
        self.rewritten, self.kept = rewritten, kept
        self.complete = False  # whether each residual add of the block carries a gate
        self.marks: tuple[Mark, ...] = ()  # what the gates' additions are known by
        self.exact = False
        self.ambient = False
        self.below = Below()
        self.sides: dict[int, str] = {}  # for each gate, by ordinal, which operand was its shortcut
        self.attributes: tuple[str, ...] = ()
        self.places: tuple[Place, ...] = ()
        self.around: tuple[Any, ...] = ()  # what lay there at the last look
        self.given: dict[Path, bool] = {}
        self.active: dict[str, bool] = {}
        self.runs: dict[Any, Run] = {}
        self.ways: dict[Any, Arguments | None] = {}  # arguments of each way that came later
        self.weights: dict[Any, set[frozenset[str]]] = {}  # which weights ran in each, attributes aside

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The gated forward of ``block``."""
        run = self.runs.get(self._key(block, args, kwargs))
        if run is None:
            run = self._extend(block, args, kwargs)
        return run(block, self.gates, *args, *kwargs.values())

    def knows(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there is a forward for this way of calling the block, in the mode it is in."""
        return self._key(block, args, kwargs) in self.runs

    def learn(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the forward for one way of calling the block, where there is none."""
        if not self.knows(block, args, kwargs):
            self._extend(block, args, kwargs)

    @property
    def evaluates_plainly(self) -> bool:
        """Whether evaluation is the block's own forward, untouched."""
        return all(gate.scale == 1.0 and gate.marked_as is None for gate in self.gates)

    def prepare(
        self,
        block: nn.Module,
        flow: Flow,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: int | None = None,
    ) -> Spliced:
        """Makes the forward for one way of calling the block, in the mode it is in, given its trace.

        Raises:
            UnseenCallError: The trace lacks one of the residual adds that carry a gate.
        """
        spliced = self._spliced(block, flow, batch)
        found = flow.trace
        self.exact |= found.exact
        self.ambient |= found.ambient
        self.below |= found.below
        self.attributes = tuple(sorted({*self.attributes, *found.attributes}))
        places = {(id(one.holder), one.names): one for one in (*self.places, *found.places)}
        self.places = tuple(places.values())
        self.given |= {path: whole or self.given.get(path, False) for path, whole in found.given.items()}
        key = self._key(block, args, kwargs)
        self.runs[key] = spliced.run
        self.weights.setdefault((*key[:2], key[3]), set()).add(_weights(block, found))
        return spliced

    def _spliced(self, block: nn.Module, flow: Flow, batch: int | None) -> Spliced:
        """The forward with gates in it; equal blocks, which share their trace, share it."""
        chosen = self._chosen(flow)
        for one in chosen:
            self.sides.setdefault(one.ordinal, "left" if one.node.args[0] is one.shortcut else "right")
        skip = frozenset(gate.ordinal for gate in self.gates if gate.skips)
        by_rows = self.gates[0].unit == "sample"
        places = tuple((a.node, a.ordinal, a.shortcut) for a in chosen)
        key = (block.training, places, skip, by_rows, self.rewritten, self.kept, batch)
        if key not in flow.shared:
            written, kept = self.rewritten, self.kept
            flow.shared[key] = splice(
                block, flow, chosen, skip=skip, by_rows=by_rows, rewritten=written, kept=kept, batch=batch
            )
        spliced: Spliced = flow.shared[key]
        return spliced

    @property
    def attributes_choose(self) -> bool:
        """Whether calls alike but for attributes of the block have run different weights."""
        return any(len(chosen) > 1 for chosen in self.weights.values())

    def note_active(self, args: tuple[Any, ...], kwargs: dict[str, Any], log: OpLog) -> None:
        """Remembers which tensors among the block's arguments depend on a model input."""
        self.active = {path: log.active(tensor) for path, tensor in _leaves(args, kwargs)}

    def _extend(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """Traces the block anew for a way of calling it that was not seen before."""
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise UnseenCallError(
                "torch.fx cannot trace a gated model: what is dropped is decided anew in each step. Give it "
                "surgeon.fold(model), or the model before surgeon.apply"
            )
        log = OpLog(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            with no_inference_mode(), untouched(block), held_open():
                fake_args, fake_kwargs = to_fake(log.fake, (args, kwargs))
                for path, tensor in _leaves(fake_args, fake_kwargs):
                    if self.active.get(path, tensor.is_floating_point()):
                        log.root(tensor)
                for real, fake in zip(
                    tensors((args, kwargs)), tensors((fake_args, fake_kwargs)), strict=True
                ):
                    fake.requires_grad_(real.requires_grad)
                flow = Flow(trace(block, fake_args, fake_kwargs, log, below=self.below))
            spliced = self.prepare(block, flow, args, kwargs)
            self.ways.setdefault(self.way(args, kwargs), forms(args, kwargs))
        except TraceError as error:
            raise UnseenCallError(
                f"{self._called(args, kwargs)}, and tracing it that way failed: {error}. Leave the block out "
                f"(exclude={self.name or type(block).__name__!r}) or call it as on the example"
            ) from error
        if len(self.runs) == _MANY:
            self._warn_of_many(type(block), args, kwargs)
        return spliced.run

    def _warn_of_many(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        warnings.warn(
            f"{self.name or 'the model'} has been traced for {_MANY} ways of calling it, the last one "
            f"({_pattern(args, kwargs)}). Its forward looks at numbers, sizes or attributes that keep "
            "changing, and each new one costs a trace, which stays in memory: pass numbers as tensors, bring "
            f"sizes to a few values, or leave the block out (exclude={self.name or cls.__name__!r})",
            stacklevel=2,
        )

    def _chosen(self, flow: Flow) -> list[Addition]:
        """The additions that the gates belong to; called in another way a block may perform others."""
        if not self.marks:
            found, marks = located(flow)
            self.marks = tuple([marks[gate.ordinal] for gate in self.gates])
            plain = [a.ordinal for a in found if a.code is None]
            self.complete = plain == [gate.ordinal for gate in self.gates]
        chosen = []
        located_again = again(flow, self.marks, complete=self.complete)
        for gate, addition in zip(self.gates, located_again, strict=True):
            one = meant(flow, addition, gate.kind, self.sides.get(gate.ordinal))
            if one is None:
                raise UnseenCallError(
                    f"{self.name or 'the model'} is called in a way in which it does not perform the gated "
                    f"addition {gate.name}; exclude it (exclude={gate.name!r}) or call it as on the example"
                )
            chosen.append(replace(one, ordinal=gate.ordinal))
        return chosen

    def way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What of the arguments decides which code the block's forward runs."""
        return (
            tuple([kind(value, self.exact) for value in args]),
            tuple([(name, kind(value, self.exact)) for name, value in kwargs.items()]),
            kinds(self.given, args, kwargs, self.exact) if self.given else (),
        )

    def _key(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything that decides which code the block's forward runs."""
        return (
            block.training,
            self.way(args, kwargs),
            tuple([state(attribute(block, name)) for name in self.attributes]),
            ambient() if self.ambient else None,
            self._around() if self.places else (),
        )

    def _around(self) -> tuple[Any, ...]:
        if not torch.compiler.is_compiling():  # which would guard on whole files
            self.around = tuple([state(one.value()) for one in self.places])
        return self.around

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        called = _pattern(args, kwargs)
        return f"{self.name or 'the model'} is called in a way not seen on the example: ({called})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gating":
        twin = Gating(self.name, copy.deepcopy(self.gates, memo), self.rewritten, self.kept)
        twin.complete, twin.marks = self.complete, self.marks
        twin.exact, twin.ambient, twin.attributes = self.exact, self.ambient, self.attributes
        twin.places, twin.around = self.places, self.around
        twin.given, twin.below, twin.sides = dict(self.given), self.below, dict(self.sides)
        twin.active, twin.runs = dict(self.active), dict(self.runs)
        twin.ways, twin.weights = dict(self.ways), copy.deepcopy(self.weights)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Generated functions do not pickle; they are made again at the first call.
        fresh: dict[str, Any] = {"runs": {}, "ways": {}, "weights": {}, "places": (), "around": ()}
        return {**self.__dict__, **fresh, "below": self.below.portable()}


def _weights(block: nn.Module, found: Trace) -> frozenset[str]:
    """The children with weights, and the weights, that a trace has to do with."""
    targets = {str(node.target) for node in found.graph.nodes if node.op in ("call_module", "get_attr")}
    held = ((name, attribute(block, name)) for name in targets)
    return frozenset(
        name
        for name, value in held
        if isinstance(value, Tensor)
        or (isinstance(value, nn.Module) and any(True for _ in value.parameters()))
    )


def _pattern(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The arguments of a call in words, tensors by shape, type and device."""
    return ", ".join([str(kind(a, True)) for a in args] + [f"{k}={kind(v, True)}" for k, v in kwargs.items()])


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the arguments of a call, with its place in words."""
    found, _ = pytree.tree_flatten_with_path((args, kwargs))
    return ((pytree.keystr(path), leaf) for path, leaf in found if isinstance(leaf, Tensor))


# What the decorator torch.compiler.disable does, which would import the whole compiler with surgeon.
Gating._extend._torchdynamo_disable = True  # type: ignore[attr-defined]


class GatedBlock(Unannounced, nn.Module):
    """Mixed into the class of a gated block, in front of it."""

    _ungated: type[nn.Module]
    _surgeon: Gating

    def extra_repr(self) -> str:
        gating, own = gating_of(self), super().extra_repr()
        if gating is None:
            return own
        gates = ", ".join(f"{g.name.rpartition('.')[2]} p={g.survival:.4g}" for g in gating.gates)
        return f"{own}, gates: {gates}" if own else f"gates: {gates}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Beside the keys, which stay stock: torch.save keeps this, and `surgeon.load` reads it.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        noted = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if noted is not None and any(scale != 1.0 for _, scale in _table(self)):
            noted[NOTE] = _table(self)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        noted = local_metadata.get(NOTE)
        own = _table(self)
        if noted is not None and own and [tuple(row) for row in noted] != own:
            raise CheckpointError(
                f"{_block_name(self)}: the checkpoint was trained with the evaluation scales "
                f"{_spoken(noted)}, the model's are {_spoken(own)}; {_LOAD}"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        _, _, *rest = reduced
        return (_revive, (self._ungated, isinstance(self, KeepingBlock)), *rest)


class KeepingBlock(GatedBlock):
    """A gated block whose weights were divided by its gates' scales: `surgeon.apply(..., keep_eval=True)`.

    Such weights mean something else than those of the stock model under the same names. So the ``state_dict``
    carries the scales along, as the extra state that PyTorch provides for, and no strict load can confuse the
    two.
    """

    def get_extra_state(self) -> Tensor:
        """Place among the block's additions and scale of each gate, one row per gate, in float64."""
        return torch.tensor(_table(self), dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Checks that weights which come in were divided by the scales of these gates.

        Raises:
            CheckpointError: They were not.
        """
        own = self.get_extra_state()
        if not (isinstance(state, Tensor) and state.shape == own.shape and _close(state, own)):
            noted = state.tolist() if isinstance(state, Tensor) and state.ndim == 2 else ()
            raise CheckpointError(
                f"{_block_name(self)}: the checkpoint's weights were divided by the scales {_spoken(noted)}, "
                f"the model's are {_spoken(own.tolist())}; {_LOAD}"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Also where a load is not strict; a part of the state that leaves the block out may come in.
        if gating_of(self) and prefix + "_extra_state" not in state_dict and state_dict:
            raise CheckpointError(
                f"{_block_name(self)}: these weights are not from a model gated with keep_eval=True, so its "
                f"gates would scale a branch that was never divided by their scales; {_LOAD}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


_LOAD = "surgeon.load(model, file) converts them"


def _table(block: GatedBlock) -> list[tuple[int, float]]:
    """Place and scale of each gate that still acts; empty for a slice of a gated block."""
    gating = gating_of(block)
    return [(gate.ordinal, gate.scale) for gate in gating.gates if not gate.folded] if gating else []


def _close(state: Tensor, own: Tensor) -> bool:
    return torch.allclose(state.to(own), own, rtol=max(1e-6, 4 * torch.finfo(state.dtype).eps), atol=0)


def _block_name(block: nn.Module) -> str:
    gating = gating_of(block)
    return (gating.name if gating else "") or type(block).__name__


def _spoken(table: Sequence[Any]) -> str:
    return ", ".join(f"{scale:.4g}" for _, scale in table) or "(none)"


def _revive(ungated: type[nn.Module], keeping: bool = False) -> nn.Module:
    cls = gated_class(ungated, keeping=keeping)
    block: nn.Module = cls.__new__(cls)
    return block


_classes: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def gated_class(cls: type[nn.Module], *, keeping: bool = False) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward runs a block's gates; of the same name, in the same module.

    Args:
        cls: The block's class.
        keeping: For a `KeepingBlock`.
    """
    if issubclass(cls, GatedBlock):  # a slice or a sibling of a gated block has its class and no gates
        cls = cls._ungated
    if (cls, keeping) not in _classes:
        _classes[cls, keeping] = _subclass(cls, KeepingBlock if keeping else GatedBlock)
    return _classes[cls, keeping]


def _subclass(cls: type[nn.Module], kind: type[GatedBlock]) -> type[nn.Module]:
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
    return type(cls.__name__, (kind, cls), body)


def gate_block(block: nn.Module, gating: Gating) -> None:
    """Installs ``gating`` on ``block``; the block's class becomes a subclass of what it was.

    Where it is interrupted, `ungate_block` undoes what it did.
    """
    cls = gated_class(type(block), keeping=any(gate.keep_eval for gate in gating.gates))
    block.__dict__["_surgeon"] = gating
    block.__class__ = cls


def check_class(name: str, block: nn.Module) -> None:
    """Checks that a gated block has the class that `gate_block` gave it, so that `ungate_block` undoes it.

    Raises:
        WrappedModelError: Something else has changed the block's class since, and would be undone with it.
    """
    if "_ungated" not in vars(type(block)):
        raise WrappedModelError(
            f"{name or 'the model'} has become a {type(block).__name__} since surgeon.apply, by fully_shard, "
            "parametrize or the like, which would be lost with its gates. Take that off first, or call "
            "surgeon.load with the weights on a model without it, gated or not"
        )


def ungate_block(block: nn.Module) -> None:
    """Gives ``block`` its own class back and takes its gates away, as far as it has them."""
    if isinstance(block, GatedBlock):
        block.__class__ = type(block)._ungated  # type: ignore[assignment]
    block.__dict__.pop("_surgeon", None)


def gating_of(module: nn.Module) -> Gating | None:
    """The gating of a gated block, else None."""
    return module.__dict__.get("_surgeon") if isinstance(module, GatedBlock) else None
