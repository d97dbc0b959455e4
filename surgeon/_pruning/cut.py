"""A block's traced forward without some of its branches, as Python code.

The graph is copied node by node. An addition whose branch is deleted becomes its shortcut, or a copy of it
where something writes to either later on. Left out is what ran for such a branch alone (`Flow.region`), and
then whatever had readers before and has none now, unless it writes to what is still read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._finding.paths import writes_to
from surgeon._gating.writer import fresh


@dataclass(frozen=True, slots=True)
class Code:
    """The source of a forward ``forward(self, *arguments)``, and the names that it uses."""

    source: str
    names: dict[str, Any]


class Cut:
    """One trace of a block without some branches.

    Attributes:
        flow: The trace.
        left: Its nodes that still run, in order.
        deleted: Those that do not.
    """

    def __init__(self, flow: Flow, additions: Sequence[Addition], *, rewritten: bool) -> None:
        self.flow = flow
        self.shortcut = {a.node: a.shortcut for a in additions}
        self.copied = {a.node for a in additions if fresh(flow, a, rewritten=rewritten)}
        dead = {node for a in additions for node in a.region}
        self.deleted = self._unread(dead)
        self.left = [node for node in flow.order if node not in self.deleted]

    def paths(self, nodes: Sequence[fx.Node] | set[fx.Node]) -> set[str]:
        """The children and weights that some nodes name."""
        return {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}

    @property
    def hands_on(self) -> bool:
        """Whether the block gives its first argument, untouched, and does nothing else."""
        given, result = self.flow.order[0], self.flow.order[-1].args[0]
        while result in self.shortcut and result not in self.copied:
            result = self.shortcut[result]
        work = [n for n in self.left if n.op not in ("placeholder", "output") and n not in self.shortcut]
        return result is given and not work

    def code(self) -> Code:
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.create_node("placeholder", "self", name="block")
        for node in self.left:
            if node in self.shortcut:
                env[node] = env[self.shortcut[node]]
                if node in self.copied:
                    env[node] = graph.call_function(torch.clone, (env[node],))
                if writes_to(node) is not None:  # the name that was added to in place now means the result
                    env[node.args[0]] = env[node]
            elif node.op == "placeholder":
                env[node] = graph.create_node("placeholder", f"_{node.name}_", name=node.name)
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
        for node in graph.nodes:
            node.type = None
        graph.lint()
        made = graph.python_code("self")
        return Code(made.src, dict(made.globals))

    def _unread(self, dead: set[fx.Node]) -> set[fx.Node]:
        """These nodes and those that only they have read; what has no reader of old runs for its effect."""
        dead = set(dead)
        for node in reversed(self.flow.order):
            if node.op in ("placeholder", "output") or node in self.shortcut:
                continue
            readers = {
                reader for reader in node.users if reader not in dead and not self._skips(reader, node)
            }
            if node not in dead and not readers and node.users and not self.flow.fact(node).writes:
                dead.add(node)
        return dead

    def _skips(self, reader: fx.Node, node: fx.Node) -> bool:
        """Whether ``reader`` is an addition that no longer reads ``node``."""
        return reader in self.shortcut and self.shortcut[reader] is not node
