"""Puts gates into a block's traced forward, as generated Python.

Two forms. *Masked*: the addition becomes ``masked_add(gate, shortcut, branch)`` and everything else stays
where it was. *Lifted*: the nodes that run for the branch alone move into a function of their own, which
`_gating.skip` calls when the branch survives, or on the rows that survive. In both, stochastic depth that
was on the branch is taken off, as the gate stands in for it. A sum with a gate that lies inside a lifted
branch moves along, gate and all. The generated code names the block's own children and parameters, never
copies; `surgeon._gating.block` installs it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._finding.joins import joins
from surgeon._finding.paths import side
from surgeon._gating.adds import evaluating_add, evaluating_value, masked_add, masked_value
from surgeon._gating.features import batch_value, rows_value
from surgeon._gating.joins import PathRun
from surgeon._gating.skip import Adding, batch_add, rows_add
from surgeon._gating.subsets import Subset, look
from surgeon._gating.writer import Run, Writer


@dataclass(frozen=True, slots=True)
class Spliced:
    """A block's forward with gates in it.

    Attributes:
        run: ``run(block, gates, *arguments)``, the arguments as they were traced.
        exact: It holds for the traced shapes only.
        masked: For each gate (by ordinal) that cannot skip, why.
        subsets: For each gate (by ordinal) whose branch was to run on some rows only, what that involves.
    """

    run: Run
    exact: bool
    masked: Mapping[int, str]
    subsets: Mapping[int, Subset]


def splice(
    block: nn.Module,
    flow: Flow,
    chosen: Mapping[int, Addition],
    *,
    skip: Collection[int],
    by_rows: bool,
    rewritten: bool,
    saved: Collection[int] = (),
    batch: int | None = None,
) -> Spliced:
    """Generates a block's forward with a gate on each chosen addition, for the mode the block is in.

    Args:
        block: The block; it is only read.
        flow: Its traced forward.
        chosen: The additions, in order, by the place of their gate among the block's.
        skip: Ordinals of those whose branch is lifted out where that is sound, so that it need not run.
        by_rows: What a coin decides is one row of the batch.
        rewritten: Something outside the block writes to its output in place.
        saved: Places of the arguments that autograd saves whole anyway.
        batch: How many samples the example has, if this is its trace.
    """
    writer, whole, subsets = Writer(flow, rewritten, saved), dict[int, str](), dict[int, Subset]()
    for index, addition in chosen.items():
        if addition.kind == "mean":
            if block.training:
                writer.join(index, joins(flow)[addition.node])
                if addition.ordinal in skip and by_rows:
                    whole[addition.ordinal] = "each sample has paths of its own"
            continue
        add = writer.value if addition.kind == "concat" else writer.add
        evaluating, masked, lifting = _forms(addition, by_rows)
        if not block.training:
            add(index, addition, evaluating)
            continue
        wanted, reason = addition.ordinal in skip, unliftable(flow, addition)
        looked_at = by_rows and (wanted or batch is not None)
        part = writer.lifted(addition) if not reason and (wanted or looked_at) else None
        if looked_at:
            subsets[addition.ordinal] = subset = look(flow, addition, block, batch, part)
            reason = reason or subset.reason
            part = (subset.lifted, part[1]) if part and subset.lifted else part
        if part is None or reason or not wanted:
            add(index, addition, masked)
        else:
            writer.lift(index, addition, lifting, *part)
        if reason and wanted:
            whole[addition.ordinal] = reason
    run = writer.write()
    if block.training and not by_rows and _only_joins(chosen, skip):
        run = PathRun(flow, chosen, run, rewritten)
    return Spliced(run, flow.trace.key.exact, whole, subsets)


def _only_joins(chosen: Mapping[int, Addition], skip: Collection[int]) -> bool:
    return all(a.kind == "mean" and a.ordinal in skip for a in chosen.values())


def _forms(addition: Addition, by_rows: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Adding]:
    """What stands for an addition in evaluation, where its branch is masked, and where it is lifted."""
    if addition.kind == "concat":
        return evaluating_value, masked_value, rows_value if by_rows else batch_value
    return evaluating_add, masked_add, rows_add if by_rows else batch_add


def unliftable(flow: Flow, addition: Addition) -> str:
    """Why the branch cannot move into a function of its own; ``""`` if it can."""
    work = side(flow, addition.branch, addition.shortcut)
    if addition.branch.op == "placeholder" or (
        addition.region and not any(flow.fact(node).ops for node in (*addition.region, *work))
    ):
        return "its branch runs in the block before, which gives the stream as well"
    if not addition.region:
        return "the branch result is also used elsewhere in the block"
    inside, end = set(addition.region), flow.position(addition.node)
    for node in addition.region:
        for other in flow.order[flow.position(node) : end]:
            if other not in inside and flow.fact(other).writes & flow.fact(node).reads:
                return f"{other.name} writes in place to what the branch reads"
    if any(flow.fact(node).flops for node in work) and not any(flow.fact(node).flops for node in inside):
        return "what the layers of the branch give is also used elsewhere in the block"
    return ""
