"""The gated forwards of every block of a model, made before any block is touched."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from surgeon._finding.addition import Addition
from surgeon._finding.analysis import Analysis, Block
from surgeon._finding.findings import Residual
from surgeon._finding.flow import Flow
from surgeon._gating.block import gated_class
from surgeon._gating.forwards import Gating
from surgeon._gating.gate import Gate
from surgeon._gating.samples import Batch, Samples, Sum, batch_of, dimensions, doubtful
from surgeon._gating.saved_tensors import keeps_result
from surgeon._gating.splice import Spliced
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.record import Recording
from surgeon._tracing.trace import trace
from surgeon._tracing.undisturbed import mode, no_inference_mode
from surgeon.errors import UsageError


def prepare(analysis: Analysis, gates: Mapping[str, Gate]) -> list[tuple[Block, Gating]]:
    """Each block with its gating; no block is changed.

    Args:
        analysis: Of the model, which is as it was then.
        gates: By the name of their residual add. What comes out about a branch is noted on its gate.

    Raises:
        UsageError: The class of a block cannot be subclassed.
    """
    samples: dict[str, Samples] = {}
    recording = analysis.recording
    sums = {r.name: _sum(block, a) for block in analysis.blocks for r, a in _paired(block)}
    by_rows = any(gate.decided.unit == "sample" for gate in gates.values())
    batch = batch_of(recording, list(sums.values()) if by_rows else [])
    for name, gate in gates.items():
        if gate.columns is not None:
            _note(gate, dim=batch.along.get(sums[name], 0))
    prepared = [(block, _prepare_block(block, recording, gates, batch, samples)) for block in analysis.blocks]
    along = [batch.along.get(sums[name]) for name in samples]
    places = dimensions(list(samples.values()), batch.size, along) if batch.size else []
    turned = {name: dim for name, dim in zip(samples, places, strict=False) if dim}
    for name, dim in turned.items():
        where = f"its samples lie along dimension {dim} of {list(samples[name].shape)}"
        _note(gates[name], dim=dim, skips=False, note=f"computed also when dropped: {where}")
    for name in samples.keys() - turned.keys():
        if sums[name] not in batch.along and doubtful(sums[name][1], batch.size):
            assumed = f"its samples are taken to lie along the first dimension of {list(sums[name][1])}"
            known = gates[name].branch.note
            _note(gates[name], note=f"{known}; {assumed}" if known else assumed)
    return [
        (block, _prepare_block(block, recording, gates, batch, {}) if turned.keys() & names else gating)
        for block, gating in prepared
        for names in [{r.name for r in block.residuals}]
    ]


def _paired(block: Block) -> Iterator[tuple[Residual, Addition]]:
    return zip(block.residuals, block.found, strict=True)


def _sum(block: Block, addition: Addition) -> Sum:
    return block.call.place, tuple(block.flow.fact(addition.shortcut).value.shape)


def _prepare_block(
    block: Block,
    recording: Recording,
    gates: Mapping[str, Gate],
    batch: Batch,
    samples: dict[str, Samples],
) -> Gating:
    """The gating of one block with its training forward made, and its evaluating one where that differs."""
    chosen = [gates[r.name] for r in block.residuals]
    shared = block.call.rewritten or block.call.reread
    gating = Gating(block.name, chosen, shared, _saved(block, recording))
    for gate, addition in zip(chosen, block.found, strict=True):
        gating.sides[gate.branch.ordinal] = "left" if addition.node.args[0] is addition.shortcut else "right"
        if gate.branch.skips and (kept := _kept_by_layers(block, addition, recording)):
            _note(gate, skips=False, note=f"computed also when dropped: it keeps a value in {kept}")
    args, kwargs, log = recording.arguments(block.call)
    with mode(block.module, True):
        spliced = gating.prepare(block.module, block.flow, args, kwargs, batch.size)
        for call, flow in block.others:
            gating.prepare(block.module, flow, *recording.arguments(call)[:2], shown=True)
    gating.note_active(args, kwargs, log)
    for residual, gate in zip(block.residuals, chosen, strict=True):
        _settle_form(gate, spliced)
        if gate.branch.ordinal in spliced.subsets:
            samples[residual.name] = spliced.subsets[gate.branch.ordinal].samples
    if not gating.evaluates_plainly:
        with mode(block.module, False):
            gating.prepare(block.module, _evaluating(block, args, kwargs, log), args, kwargs)
            for call, _ in block.others:
                given = recording.arguments(call)
                gating.prepare(block.module, _traced(block, *given), *given[:2], shown=True)
    _check_class(block, keeping=any(gate.keeps_eval for gate in chosen))
    return gating


def _kept_by_layers(block: Block, addition: Addition, recording: Recording) -> str:
    """Where a layer of the branch keeps a tensor of each step, such as a loss; one that drops does not."""
    called = (str(node.target) for node in addition.region if node.op == "call_module")
    for path in called:
        for name, module in block.module.get_submodule(path).named_modules():
            if module in recording.keeping:
                return ".".join(filter(None, (path, name, recording.keeping[module])))
    return ""


def _evaluating(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], log: OpLog) -> Flow:
    """The trace of a block in evaluation; blocks that share theirs in training share this if they agree.

    The rates of stochastic depth that gates stand in for differ from block to block and decide nothing.
    """
    alike: list[Flow] = block.flow.shared.setdefault("evaluating", [])
    start = len(block.name) + 1 if block.name else 0
    drops = tuple(f"{name[start:]}." for residual in block.residuals for name in residual.replaces)
    shared = next((flow for flow in alike if flow.trace.reads.agree(block.module, beside=drops)), None)
    if shared is not None:
        return shared
    alike.append(_traced(block, args, kwargs, log))
    return alike[-1]


def _traced(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], log: OpLog) -> Flow:
    with no_inference_mode():
        return Flow(trace(block.module, args, kwargs, log, below=block.flow.trace.below))


def _saved(block: Block, recording: Recording) -> frozenset[int]:
    """Places of the block's arguments that autograd saves for the backward of what made them."""
    call, places, steps = block.call, set(), iter(block.call.made_at)
    for place, value in enumerate((*call.args, *call.kwargs.values())):
        made_at = [next(steps) for _ in tensors(value)]
        if isinstance(value, Tensor) and keeps_result(recording.log, made_at[0]):
            places.add(place)
    return frozenset(places)


def _settle_form(gate: Gate, spliced: Spliced) -> None:
    """Notes on ``gate`` what came out about its branch."""
    ordinal = gate.branch.ordinal
    subset = spliced.subsets.get(ordinal)
    if subset is not None:
        _note(gate, statistics=subset.statistics, flops=subset.flops, moved=subset.moved)
    if ordinal in spliced.masked:
        # Where it would not pay anyway there is nothing to note.
        note = f"computed also when dropped: {spliced.masked[ordinal]}" if gate.skipping() else ""
        _note(gate, skips=False, note=note or gate.branch.note)


def _note(gate: Gate, **facts: Any) -> None:
    gate.branch = replace(gate.branch, **facts)


def _check_class(block: Block, *, keeping: bool) -> None:
    """Makes the class that the block is about to get, so that nothing can fail half-way."""
    try:
        gated_class(type(block.module), keeping=keeping)
    except Exception as error:
        kind = type(block.module).__name__
        raise UsageError(
            f"{block.name or 'the model'}: its class {kind} cannot be subclassed ({error}), so it cannot "
            f"carry a gate; leave it out with exclude={block.name or kind!r}"
        ) from error
