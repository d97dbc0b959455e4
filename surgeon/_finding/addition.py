"""One addition of a block, as the finding describes it from step to step."""

from dataclasses import dataclass

from torch import fx

from surgeon._finding.findings import Code


@dataclass(frozen=True, slots=True)
class Addition:
    """One addition in one block's graph, as far as the graph alone can tell.

    Attributes:
        node: The addition.
        ordinal: Its place among the additions of the block: 0, 1, ...
        code: Why it is no residual add; ``None`` if it is one.
        kind: ``"identity"`` or ``"projection"``, ``""`` if neither could be told, ``"left"`` or ``"right"``
            if the user told that this side is the shortcut.
        shortcut, branch: Its two sides; left and right as written with an empty kind.
        drops: The nodes of stochastic depth already on the branch: calls of parameter-free modules, or
            multiplications, that scale whole rows at random.
        was: The code that the graph alone would give it, where the recording told more.
        region: The nodes that run for the branch alone; empty if its result is also used elsewhere.
    """

    node: fx.Node
    ordinal: int
    code: Code | None
    kind: str
    shortcut: fx.Node
    branch: fx.Node
    drops: tuple[fx.Node, ...] = ()
    region: tuple[fx.Node, ...] = ()
    flops: int = 0
    was: Code | None = None
