"""One column of a fractal network as a plain network of its own."""

from collections.abc import Mapping

from torch import fx, nn

from surgeon._copy import copied
from surgeon._finding.analysis import Block, analyse
from surgeon._finding.flow import Flow
from surgeon._finding.joins import Join, joins
from surgeon._gating.gated import is_gated
from surgeon._gating.joins import needed, path_of
from surgeon._meant import says_the_call
from surgeon._removal import fold
from surgeon._tracing.example import Example, inputs
from surgeon._tracing.record import Recording
from surgeon._tracing.trace import trace
from surgeon._tracing.undisturbed import undisturbed
from surgeon.errors import UsageError


@says_the_call
def column(model: nn.Module, k: int | None = None, *, example: Example = None) -> nn.Module:
    """One column of a network with joins, as a plain network of its own; ``model`` is left as it is.

    The columns of FractalNet (Larsson et al. 2017) are its ways through all joins, from the shortest to the
    longest. A join of fewer paths than the widest joins the longest columns; a column that is shorter still
    takes its shortest path. Gates are folded. Each block with a join becomes an ``fx.GraphModule`` that holds
    what the column runs, as its forward in evaluation runs it on the example; the names of the weights stay.

    Args:
        model: A model with joins, gated or not.
        k: Which column, from 1, the shortest; the longest by default.
        example: As in `find`.

    Returns:
        The column, in evaluation mode, with weights of its own.

    Raises:
        UsageError: The model has no join, or no column of that number.
        RecordError: The model does not run on the example.

    Example:
        >>> import surgeon, torch
        >>> model = surgeon.load_model("recipes:fractalnet10", num_classes=10)
        >>> shortest = surgeon.column(model, 1, example=torch.zeros(2, 3, 32, 32))
        >>> sum(p.numel() for p in shortest.parameters()) < sum(p.numel() for p in model.parameters())
        True
    """
    plain = fold(model, example=example) if is_gated(model) else copied(model)
    analysis = analyse(plain.eval(), *inputs(plain, example))
    blocks = [block for block in analysis.blocks if any(a.kind == "mean" for a in block.found)]
    if not blocks:
        raise UsageError(
            f"{type(model).__name__} has one column: it has no join, which takes the mean of several paths"
        )
    found = [(block, *_evaluated(block, analysis.recording)) for block in blocks]
    count = max(len(join.paths) for _, _, means in found for join in means.values())
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= count):
        raise UsageError(f"k is {k!r}; {type(model).__name__} has the columns 1 (the shortest) to {count}")
    # From the inside out, so that a block takes up what has become of those below it.
    for block, flow, means in sorted(found, key=lambda one: -len(one[0].name)):
        taken = {
            join.node: join.paths[path_of((k or count) - 1, count, len(join.paths))]
            for join in means.values()
        }
        way = _way(block.module, flow, taken)
        if not block.name:
            return way.eval()
        plain.set_submodule(block.name, way.eval())
    return plain


def _evaluated(block: Block, recording: Recording) -> tuple[Flow, Mapping[fx.Node, Join]]:
    """A block's forward in evaluation, and the joins in it."""
    args, kwargs, log = recording.arguments(block.call)
    with undisturbed(block.module, training=False):
        flow = Flow(trace(block.module, args, kwargs, log, below=block.flow.trace.below))
    return flow, {last: join for last, join in joins(flow).items() if join.code is None}


def _way(block: nn.Module, flow: Flow, taken: Mapping[fx.Node, fx.Node]) -> fx.GraphModule:
    """A block that runs one path of each join."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    kept = needed(flow, {node: [path] for node, path in taken.items()})
    for node in flow.order:
        if node in taken and node in kept:
            env[node] = env[taken[node]]
        elif node in kept or node.op == "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(block, graph, type(block).__name__)
