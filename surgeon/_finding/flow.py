"""Who depends on whom in a traced block, in-place writes and shared storage included.

An fx graph shows which node uses which value. It does not show that ``out.mul_(gain)`` changes what the
next reader of ``out`` sees, or that an in-place ReLU at the head of a branch changes the shortcut. `Flow`
adds these edges: a node that reads a storage depends on the last node that wrote to it.

Nor does it show whether a node needs the numbers of a value or only its shape (``y.view(x.shape)``). Either
must run first, but only the numbers are what something is computed from: `Flow.feeds`, `Flow.sources`.
"""

from collections.abc import Hashable, Iterable
from typing import Any

from torch import fx

from surgeon._tracing.facts import Fact, Trace
from surgeon._tracing.fake import storage
from surgeon._tracing.nests import tensors


class Flow:
    """The dependencies between the nodes of one trace.

    Attributes:
        trace: The trace.
        order: Its nodes, the output last.
        shared: What later steps have derived from it, so that blocks with the same trace share that too.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.order = list(trace.graph.nodes)
        self.shared: dict[Hashable, Any] = {}
        self._index = {node: i for i, node in enumerate(self.order)}
        self._ancestors: list[int] = []
        self._sources: list[int] = []
        self._read_by: dict[fx.Node, list[fx.Node]] = {}
        self._users: dict[fx.Node, set[fx.Node]] = {node: set() for node in self.order}
        writer: dict[int, fx.Node] = {}
        for node in self.order:
            sources = set(node.all_input_nodes)
            sources |= {writer[s] for s in self._read(node) if s in writer}
            before = numbers = 0
            self._read_by[node] = [source for source in sources if self._hands_on(source, node)]
            for source in sources:
                self._users[source].add(node)
                place = self._index[source]
                before |= self._ancestors[place] | 1 << place
                numbers |= (self._sources[place] | 1 << place) if source in self._read_by[node] else 0
            self._ancestors.append(before)
            self._sources.append(numbers)
            if node.op != "output":
                writer.update(dict.fromkeys(self.fact(node).writes, node))

    def _read(self, node: fx.Node) -> Iterable[int]:
        if node.op == "output":
            return [s for source in node.all_input_nodes for s in self.storages(source)]
        return self.fact(node).reads

    def _hands_on(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether ``node`` reads numbers that ``source`` made or wrote, and not a shape alone."""
        if node.op == "output":
            return True
        given = self.fact(source)
        only_shapes = self.fact(node).shapes
        if not only_shapes:
            return bool(given.writes or tensors(given.value))
        return bool((given.writes & self.fact(node).reads | self.storages(source)) - only_shapes)

    def fact(self, node: fx.Node) -> Fact:
        """What is known of ``node``; the output node has no fact."""
        return self.trace.facts[node]

    def storages(self, node: fx.Node) -> set[int]:
        """The storages behind the tensors in the node's value."""
        return {storage(t) for t in tensors(self.fact(node).value)}

    def users(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that need ``node`` to have run: those that use its value or read what it wrote."""
        return self._users[node]

    def read_by(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose numbers ``node`` reads itself."""
        return self._read_by[node]

    def precedes(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether ``second`` depends on ``first``, directly or through others."""
        return bool(self._ancestors[self._index[second]] >> self._index[first] & 1)

    def feeds(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether ``second`` is computed from the numbers of ``first``, directly or through others."""
        return bool(self._sources[self._index[second]] >> self._index[first] & 1)

    def ancestors(self, node: fx.Node, *, itself: bool = False) -> set[fx.Node]:
        """Every node that ``node`` depends on."""
        return self._set(self._ancestors, node, itself)

    def sources(self, node: fx.Node, *, itself: bool = False) -> set[fx.Node]:
        """Every node whose numbers ``node`` is computed from; one that only gives a shape is none."""
        return self._set(self._sources, node, itself)

    def _set(self, bits_of: list[int], node: fx.Node, itself: bool) -> set[fx.Node]:
        bits = bits_of[self._index[node]] | (1 << self._index[node] if itself else 0)
        return {other for i, other in enumerate(self.order) if bits >> i & 1}

    def position(self, node: fx.Node) -> int:
        """The node's place in the graph."""
        return self._index[node]

    def region(self, end: fx.Node, reader: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that run only for ``reader`` to get ``end``, in order; none if ``end`` has other readers.

        A node that writes to a storage made outside the region stays outside, as its effect must not
        depend on whether the region runs.
        """
        barred: set[fx.Node] = set()
        while True:
            inside = self._region(end, reader, barred)
            made = {s for node in inside for s in self.storages(node)}
            made -= {
                s
                for node in self.order[:-1]
                if node not in inside
                for s in self.storages(node)
                if self.position(node) < self.position(reader)
            }
            outward = {node for node in inside if self.fact(node).writes - made}
            if not outward:
                return tuple(node for node in self.order if node in inside)
            barred |= outward

    def _region(self, end: fx.Node, reader: fx.Node, barred: set[fx.Node]) -> set[fx.Node]:
        inside: set[fx.Node] = set()
        others = {s for node in reader.all_input_nodes if node is not end for s in self.storages(node)}
        memory = self.storages(end) - others
        for node in reversed(self.order[: self.position(reader)]):
            if node.op in ("placeholder", "output") or node in barred:
                continue
            writes = self.fact(node).writes
            # The reader needs ``end``, and what changes ``end`` in place before it is read.
            final = node is end or (bool(writes) and writes <= memory)
            users = self.users(node) - ({reader} if final else set())
            if users <= inside and (final or users):
                inside.add(node)
        return inside if end in inside else set()
