"""Stochastic depth that is already there: the nodes that multiply whole rows by coins."""

from collections.abc import Iterable, Iterator

from torch import Tensor, fx

from surgeon._finding.flow import Flow
from surgeon._finding.paths import PRODUCTS
from surgeon._tracing.operators import drops_rows, is_coin


def drops(flow: Flow, work: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The nodes that multiply whole rows by coins: stochastic depth that is already there."""
    for node in work:
        value = flow.fact(node).value
        if not isinstance(value, Tensor) or not value.ndim or value.numel() <= value.shape[0]:
            continue
        if node.op == "call_module":
            if drops_rows(flow.fact(node).ops, value.shape[0]):
                yield node
        elif node.target in PRODUCTS and row_mask(flow, node) is not None:
            yield node


def mixes(flow: Flow, work: Iterable[fx.Node]) -> bool:
    """Whether rows, or all of them, are weighed by random numbers that are no coins, as in Shake-Shake."""
    for node in work:
        value, ops = flow.fact(node).value, flow.fact(node).ops
        rows = value.shape[0] if isinstance(value, Tensor) and value.ndim else 1
        if not is_coin(ops) and any(op.random in (1, rows) for op in ops):
            return True
    return False


def row_mask(flow: Flow, product: fx.Node) -> fx.Node | None:
    """The operand of a multiplication that is a coin per row or batch; ``None`` if there is none."""
    for operand in product.all_input_nodes:
        fact = flow.fact(operand)
        if fact.active or not isinstance(fact.value, Tensor):
            continue
        made_by = [op for n in _makers(flow, operand, product) for op in flow.fact(n).ops]
        if is_coin(made_by) and fact.value.numel() in (1, flow.fact(product).value.shape[0]):
            return operand
    return None


def _makers(flow: Flow, operand: fx.Node, reader: fx.Node) -> set[fx.Node]:
    """The nodes that made what ``reader`` finds in ``operand``, later writes in place included."""
    memory = flow.storages(operand)
    before = flow.order[: flow.position(reader)]
    last = {operand, *(n for n in before if flow.feeds(operand, n) and flow.fact(n).writes & memory)}
    return {maker for n in last for maker in flow.sources(n, itself=True)}


def mask_nodes(flow: Flow, drop: fx.Node) -> set[fx.Node]:
    """A node of `Addition.drops` and the nodes that make its coins."""
    mask = None if drop.op == "call_module" else row_mask(flow, drop)
    return {drop} if mask is None else {drop, *flow.region(mask, drop)}
