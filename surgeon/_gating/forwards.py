"""The gated forwards of a block: one for each way of calling it, and another when a new way comes."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from surgeon._finding.addition import Addition
from surgeon._finding.concats import concats
from surgeon._finding.findings import gate_name
from surgeon._finding.flow import Flow
from surgeon._finding.residual import meant
from surgeon._gating.around import method_behind
from surgeon._gating.call_forms import Arguments, forms, leaves, spoken
from surgeon._gating.gate import Gate
from surgeon._gating.lifted import weights_of
from surgeon._gating.matching import Traits, again, located
from surgeon._gating.splice import Spliced, splice
from surgeon._gating.writer import Run
from surgeon._torch import FakeTensorMode, global_forward_hooks, pytree
from surgeon._tracing.children import Below
from surgeon._tracing.facts import Trace
from surgeon._tracing.fake import coins, to_fake
from surgeon._tracing.key import Key
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.trace import ONE_AT_A_TIME, plain_forward, trace
from surgeon._tracing.undisturbed import no_inference_mode
from surgeon.errors import TraceError, UnseenCallError

_MANY = 64  # ways of calling one block, each traced and kept


class Gating:
    """What a gated block carries: its gates, and its forward for each way of calling it seen so far.

    Args:
        name: Qualified name of the block at `surgeon.apply`, for messages.
        gates: The gates, in the order of their additions.
        rewritten: Something outside the block may write to its output in place, or reads on what it took.
        saved: Places of the arguments that autograd saves anyway, for the backward of what made them.
    """

    def __init__(
        self, name: str, gates: Sequence[Gate], rewritten: bool, saved: frozenset[int] = frozenset()
    ) -> None:
        self.name = name
        self.gates = tuple(gates)
        self.rewritten, self.saved = rewritten, saved
        self.all_gated = False  # whether each residual add of the block carries a gate
        self.traits: tuple[Traits, ...] = ()  # what the gates' additions are known by
        self.features = 0  # how many new features the block concatenates, where gates are on those
        self.optional: set[int] = set()  # gates, by ordinal, whose sum the example's calls do not all perform
        self.sides: dict[int, str] = {}  # for each gate, by ordinal, which operand was its shortcut
        self.below = Below()
        self.replaced: Any = None  # a forward that was put on the block since
        self.key = Key()
        self.active: dict[str, bool] = {}
        self.runs: dict[Any, Run] = {}
        self.compiled: dict[Any, Run] = {}  # the same, by what a compiler sees
        self.ways: dict[Any, Arguments | None] = {}  # arguments of each way that came later
        self.weights: dict[Any, set[frozenset[str]]] = {}  # which weights ran in each, attributes aside

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The gated forward of ``block``."""
        key = self._key(block, args, kwargs)
        run = self.runs.get(key) or self.compiled.get(key)
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
        *,
        shown: bool = False,
    ) -> Spliced:
        """Makes the forward for one way of calling the block, in the mode it is in, given its trace.

        Args:
            block: The block.
            flow: The trace.
            args: Positional arguments.
            kwargs: Keyword arguments.
            batch: How many samples the example has, if this is its trace.
            shown: The example itself calls the block so, after another way; it may lack some of the sums.

        Raises:
            UnseenCallError: The trace lacks one of the residual adds that carry a gate.
        """
        spliced = self._spliced(block, flow, batch, shown)
        self.below |= flow.trace.below
        self.key |= flow.trace.key
        key = self._key(block, args, kwargs)
        self.runs[key] = self.compiled[Key.compiled(key)] = spliced.run
        self.weights.setdefault((*key[:2], key[3]), set()).add(_weights(block, flow.trace))
        return spliced

    def _spliced(self, block: nn.Module, flow: Flow, batch: int | None, shown: bool) -> Spliced:
        """The forward with gates in it; equal blocks, which share their trace, share it."""
        chosen = self._chosen(flow, shown)
        for one in chosen.values():
            self.sides.setdefault(one.ordinal, "left" if one.node.args[0] is one.shortcut else "right")
        skip = frozenset(gate.branch.ordinal for gate in self.gates if gate.branch.skips)
        by_rows = self.gates[0].decided.unit == "sample"
        places = tuple((place, a.node, a.ordinal, a.shortcut) for place, a in chosen.items())
        written, saved = self.rewritten or _hooked(block), self.saved
        key = (block.training, places, skip, by_rows, written, saved, batch)
        if key not in flow.shared:
            flow.shared[key] = splice(
                block, flow, chosen, skip=skip, by_rows=by_rows, rewritten=written, saved=saved, batch=batch
            )
        spliced: Spliced = flow.shared[key]
        return spliced

    @property
    def attributes_choose(self) -> bool:
        """Whether calls alike but for attributes of the block have run different weights."""
        return any(len(chosen) > 1 for chosen in self.weights.values())

    def note_active(self, args: tuple[Any, ...], kwargs: dict[str, Any], log: OpLog) -> None:
        """Remembers which tensors among the block's arguments depend on a model input."""
        self.active = {path: log.active(tensor) for path, tensor in leaves(args, kwargs)}

    def _extend(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """Traces the block anew for a way of calling it that was not seen before."""
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise UnseenCallError(
                "torch.fx cannot trace a gated model: what is dropped is decided anew in each step. Give it "
                "surgeon.fold(model), or the model before surgeon.apply"
            )
        with ONE_AT_A_TIME:
            return self.runs.get(self._key(block, args, kwargs)) or self._traced(block, args, kwargs)

    def _traced(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        log = OpLog(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            with no_inference_mode():
                fake_args, fake_kwargs = to_fake(log.fake, (args, kwargs))
                for path, tensor in leaves(fake_args, fake_kwargs):
                    if self.active.get(path, tensor.is_floating_point()):
                        log.root(tensor)
                for real, fake in zip(
                    tensors((args, kwargs)), tensors((fake_args, fake_kwargs)), strict=True
                ):
                    fake.requires_grad_(real.requires_grad)
                forward = self.forward(block)
                flow = Flow(trace(block, fake_args, fake_kwargs, log, below=self.below, forward=forward))
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
            f"({spoken(args, kwargs)}). Its forward looks at numbers, sizes or attributes that keep "
            "changing, and each new one costs a trace, which stays in memory: pass numbers as tensors, bring "
            f"sizes to a few values, or leave the block out (exclude={self.name or cls.__name__!r})",
            stacklevel=2,
        )

    def _chosen(self, flow: Flow, shown: bool) -> dict[int, Addition]:
        """The additions that the gates belong to, by the gate's place.

        Called in another way a block may perform others.
        """
        if self.gates[0].branch.kind == "concat":
            return self._features(flow)
        if not self.traits:
            adds, known = located(flow)
            by_ordinal = {traits.ordinal: traits for traits in known}
            self.traits = tuple([by_ordinal[gate.branch.ordinal] for gate in self.gates])
            residual = [add.ordinal for add in adds if add.code is None]
            self.all_gated = residual == [gate.branch.ordinal for gate in self.gates]
        chosen: dict[int, Addition] = {}
        located_again = again(flow, self.traits, all_gated=self.all_gated)
        for place, (gate, addition) in enumerate(zip(self.gates, located_again, strict=True)):
            ordinal, kind = gate.branch.ordinal, gate.branch.kind
            own = meant(flow, addition, kind, self.sides.get(ordinal))
            if own is not None and (own.kind == "mean") != (kind == "mean"):
                own = None
            if own is None and shown:
                self.optional.add(ordinal)
            if own is None and ordinal not in self.optional and self._runs(flow, place):
                name = gate_name(self.name, ordinal)
                raise UnseenCallError(
                    f"{self.name or 'the model'} is called in a way in which it does not perform the gated "
                    f"addition {name}; exclude it (exclude={name!r}) or call it as on the example"
                )
            if own is not None:
                chosen[place] = replace(own, ordinal=ordinal)
        return chosen

    def _runs(self, flow: Flow, place: int) -> bool:
        """Whether the branch of a gate runs in a trace, as far as its layers and weights tell."""
        gate, sides = self.gates[place], self.traits[place].sides
        own = sides[self.sides.get(gate.branch.ordinal) == "left"]
        return not own or not own.isdisjoint(str(node.target) for node in flow.order)

    def _features(self, flow: Flow) -> dict[int, Addition]:
        """The same where the gates are on new features, of which a block makes as many in each way."""
        features = {feature.ordinal: feature for feature in concats(flow)}
        self.features = self.features or len(features)
        if len(features) != self.features:
            raise UnseenCallError(
                f"{self.name or 'the model'} is called in a way in which it concatenates {len(features)} new "
                f"features instead of {self.features}; exclude it (exclude={self.name!r}) or call it as on "
                "the example"
            )
        return {place: features[gate.branch.ordinal] for place, gate in enumerate(self.gates)}

    def way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What of the arguments decides which code the block's forward runs."""
        return self.key.way(args, kwargs)

    def _key(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything that decides which code the block's forward runs."""
        return *self.key.of(block, self.forward(block), args, kwargs), _hooked(block)

    def forward(self, block: nn.Module) -> Any:
        """The function that the block runs: of its class as it is now, or one put on the block since."""
        return (self.replaced is not None and method_behind(block, self.replaced)) or plain_forward(block)

    def wrapped(self, block: nn.Module) -> bool:
        """Whether what was put on the block is no method of it, but something around its forward."""
        return self.replaced is not None and method_behind(block, self.replaced) is None

    def forget(self) -> None:
        """Forgets every trace, so that the next call of each kind makes it anew."""
        self.runs, self.compiled, self.weights = {}, {}, {}

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        called = spoken(args, kwargs)
        return f"{self.name or 'the model'} is called in a way not seen on the example: ({called})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gating":
        twin = object.__new__(Gating)
        own = self.__dict__.items()
        twin.__dict__.update({k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in own})
        twin.weights = {key: set(chosen) for key, chosen in self.weights.items()}
        twin.gates, twin.replaced = copy.deepcopy((self.gates, self.replaced), memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Generated functions do not pickle; they are made again at the first call.
        fresh: dict[str, Any] = {"runs": {}, "compiled": {}, "ways": {}, "weights": {}}
        return {**self.__dict__, **fresh, "below": self.below.portable(), "key": self.key.portable()}


def _hooked(block: nn.Module) -> bool:
    """Whether hooks get the result of a block that may drop, which must not be the shortcut itself then."""
    hooked = block.training and bool(block._forward_hooks or global_forward_hooks)
    return hooked and not coins.stopped  # a recording's own hooks look on while nothing drops


def _weights(block: nn.Module, traced: Trace) -> frozenset[str]:
    """The children with weights, and the weights, that a trace has to do with."""
    targets = {str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")}
    return frozenset(name for name in targets if weights_of(block, [name]))


# What the decorator torch.compiler.disable does, which would import the whole compiler with surgeon.
Gating._extend._torchdynamo_disable = True  # type: ignore[attr-defined]
