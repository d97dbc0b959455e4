"""Drop-path at joins: which of the k paths count, and the mean of those (Larsson et al. 2017, section 4).

*Local*: each path of a join is dropped by itself with the drop rate r; where a draw drops all of them, one of
the k, each as likely, is taken back. So a path survives with probability ``1 - r + r^k / k``. *Global*: one
column is drawn for the whole network, and of each join the path of that column alone counts. *Both*: one or
the other, by a fair coin in each step. The result is the mean over the survivors; by symmetry its expectation
is the mean of all paths, so evaluation needs no scale, whatever the scaling of other gates.

With unit ``"batch"`` what no surviving path needs is not computed. With unit ``"sample"``, in compiled graphs
and under ``vmap`` every path is, and a mask tells for each sample which count.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._finding.joins import joins
from surgeon._gating.gate import Gate
from surgeon._gating.idle import with_idle
from surgeon._gating.lifted import weights_of
from surgeon._torch import under_vmap
from surgeon._tracing.fake import coins
from surgeon._tracing.leaves import called
from surgeon._tracing.state import attribute

Surviving = tuple[tuple[int, ...], ...]
# What each join is the mean of, what runs, in order, and the children and weights that do not.
Plan = tuple[dict[fx.Node, list[fx.Node]], list[fx.Node], list[str]]
_KNOWN = 256  # choices of paths for which one block remembers what it runs


def survivors(numbers: Tensor, drop_rate: float | Tensor) -> Tensor:
    """Which paths survive where each is dropped by itself: never none.

    Args:
        numbers: In [0, 1), of shape ``(k + 1, n)``: for each of n samples one for each of k paths, and one to
            tell which path is taken back where all are dropped.
        drop_rate: The chance of each path to be dropped, in [0, 1).

    Returns:
        Of shape ``(k, n)``, true where a path survives.
    """
    count = len(numbers) - 1
    kept = numbers[:-1] >= drop_rate
    back = (numbers[-1] * count).long().clamp(max=count - 1)
    result: Tensor = kept | (~kept.any(0) & _is_path(back, count))
    return result


def survival(gate: Gate) -> float:
    """The survival probability of a branch; of a join that of a path, on average over them."""
    if gate.columns is None or gate.drop_rate == 0:
        return gate.survival
    paths = gate.branch.paths
    share = {"local": 0.0, "both": 0.5, "global": 1.0}[gate.columns.mode]
    return (1 - share) * (gate.survival + gate.drop_rate**paths / paths) + share / paths


def path_of(column: int, columns: int, paths: int) -> int:
    """The path of a join that a column takes: a join of fewer paths joins the longest columns."""
    return max(0, column - (columns - paths))


def _is_path(numbers: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=numbers.device)[:, None] == numbers


def _survivors(gate: Gate, paths: int, rows: int) -> Tensor:
    """Which of a join's paths count in this step, of shape ``(paths, rows)``, on the CPU."""
    columns = gate.columns
    assert columns is not None
    if coins.stopped or gate.settled:
        return torch.ones(paths, rows, dtype=torch.bool, device="cpu")
    drawn = columns.draw(gate, rows)
    # A compiled graph must not depend on the rate's value: it would be compiled anew with each change.
    rate = 1 - gate.keep.to("cpu") if torch.compiler.is_compiling() else gate.drop_rate
    local = survivors(gate.numbers((paths + 1) * rows).view(paths + 1, rows), rate)
    alone = _is_path((drawn - (columns.count - paths)).clamp(min=0), paths)
    return torch.where((drawn < 0) | (rate == 0), local, alone)  # a rate of 0 never drops


def masked_mean(gate: Gate, *paths: Tensor) -> Tensor:
    """Training, every path computed: for each sample, or for all, the mean of those that survive."""
    first, dim = paths[0], gate.branch.dim
    rows = first.shape[dim] if gate.decided.unit == "sample" else 1
    kept = _survivors(gate, len(paths), rows).to(first.device)
    shape = [rows if d == dim else 1 for d in range(first.ndim)]
    shares = (kept / kept.sum(0)).to(first.dtype)
    terms = [path * share.view(shape) for path, share in zip(paths, shares, strict=True)]
    total: Tensor = functools.reduce(torch.add, terms)
    return total


class PathRun:
    """A block's forward that runs what the surviving paths of its joins need, in the order of its trace.

    Args:
        flow: The trace.
        chosen: Its joins, by the place of their gate.
        masked: The same forward with every path computed.
        rewritten: Something outside the block writes to its output in place.
    """

    def __init__(self, flow: Flow, chosen: Mapping[int, Addition], masked: Any, rewritten: bool) -> None:
        self.flow, self.masked, self.rewritten = flow, masked, rewritten
        self.joins = {place: joins(flow)[addition.node] for place, addition in chosen.items()}
        self.given = [node for node in flow.order if node.op == "placeholder"]
        self.plans: dict[Surviving, Plan] = {}

    def __call__(self, block: nn.Module, gates: Sequence[Gate], *args: Any) -> Any:
        if torch.compiler.is_compiling() or under_vmap():
            return self.masked(block, gates, *args)
        kept = tuple(self._kept(gates[place], len(join.paths)) for place, join in self.joins.items())
        means, order, idle = self._plan(kept)
        env: dict[fx.Node, Any] = dict(zip(self.given, args, strict=True))
        last = next((node for node in reversed(order) if node in means), None)
        for node in order:
            if node in means:
                env[node] = self._mean(node, [env[path] for path in means[node]])
                if node is last and idle:
                    env[node] = _with_unused(gates[-1], env[node], block, idle)
            elif node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            elif node.op != "placeholder":
                env[node] = _run(block, node, env)
        raise AssertionError("a trace ends with its output")

    def _kept(self, gate: Gate, paths: int) -> tuple[int, ...]:
        return tuple(_survivors(gate, paths, 1)[:, 0].nonzero()[:, 0].tolist())

    def _mean(self, node: fx.Node, values: Sequence[Tensor]) -> Tensor:
        if len(values) > 1:
            total: Tensor = functools.reduce(torch.add, values)
            return total / len(values)
        later = self.flow.order[self.flow.position(node) + 1 : -1]
        written = any(self.flow.storages(node) & self.flow.fact(n).writes for n in later)
        return values[0].clone() if written or self.rewritten else values[0]

    def _plan(self, kept: Surviving) -> Plan:
        if kept not in self.plans:
            joined = zip(self.joins.values(), kept, strict=True)
            ways = {join.node: [join.paths[i] for i in k] for join, k in joined}
            order = needed(self.flow, ways)
            used, every = _held(order), _held(self.flow.order)
            if len(self.plans) >= _KNOWN:
                self.plans.pop(next(iter(self.plans)))
            self.plans[kept] = ways, order, [name for name in every if name not in used]
        return self.plans[kept]


def needed(flow: Flow, ways: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """What a block has to run where some nodes are made of others than its code says, in order."""
    before: dict[fx.Node, list[fx.Node]] = {node: [] for node in flow.order}
    for node in flow.order:
        for user in flow.users(node):
            before[user].append(node)
    inner = {step for join in joins(flow).values() if join.node in ways for step in join.steps}
    # What has no reader was not dropped from the trace because it has an effect.
    todo = [node for node in flow.order if not flow.users(node) and node not in inner]
    found = set(todo)
    while todo:
        node = todo.pop()
        for source in ways.get(node, before[node]):
            if source not in found:
                found.add(source)
                todo.append(source)
    return [node for node in flow.order if node in found]


def _held(nodes: Sequence[fx.Node]) -> dict[str, None]:
    return {str(node.target): None for node in nodes if node.op in ("call_module", "get_attr")}


def _with_unused(gate: Gate, value: Tensor, block: nn.Module, names: Sequence[str]) -> Tensor:
    """A value as it is, with a backward that reaches the weights which did not run, where it has to."""
    if not torch.is_grad_enabled() or (value.requires_grad and not gate.zeroes):
        return value
    unused = [weight for weight in weights_of(block, names) if weight.requires_grad]
    return with_idle(gate, value, unused) if unused else value


def _run(block: nn.Module, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return attribute(block, str(node.target))
    args = fx.map_arg(node.args, env.__getitem__)
    kwargs = fx.map_arg(node.kwargs, env.__getitem__)
    child = node.op == "call_module"
    return called(attribute(block, str(node.target)) if child else node.target, args, kwargs)
