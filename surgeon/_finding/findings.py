"""What `surgeon.find` tells: the residual adds, and the reason why each other addition is none."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from surgeon._text import Listed, Part, count

Code = Literal[
    "aliased",
    "alone",
    "arithmetic",
    "bias",
    "broadcast",
    "concat",
    "detached",
    "excluded",
    "form",
    "fusion",
    "gating",
    "join",
    "linear",
    "long-skip",
    "nested",
    "no-shortcut",
    "position",
    "scores",
    "stochastic",
    "untraceable",
]
"""Why an addition takes no gate; `REASONS` has the sentences."""

REASONS: dict[Code, str] = {
    "alone": "its new features are also read by their number, without those that they stand beside",
    "aliased": "writes in place to a tensor that is read again under another name",
    "arithmetic": "adds two results of arithmetic; no layer to skip",
    "bias": "adds a weight, mask or table that depends on no input",
    "concat": "puts new features beside those that they were computed from; include=['concat'] gates such",
    "detached": "adds what no gradient flows through: it corrects a value and learns nothing",
    "broadcast": "its shortcut is spread over the branch, its branch over the samples, or a path over others",
    "excluded": "left out by include or exclude",
    "form": "is made inside one operator (lerp, index_add) or in a form that cannot take a gate: write a + b",
    "fusion": "merges two branches with activations of their own; neither side is a shortcut",
    "gating": "mixes or modulates activations with weights computed from the input",
    "join": "is a step of a join, which takes a gate as a whole",
    "linear": "sums linear paths (a reparametrisation branch); no activation to skip",
    "long-skip": "skips over several residual adds that follow on one another, and is no step itself",
    "nested": "lies inside the branch of another residual add",
    "no-shortcut": "the two sides come from different arguments, and neither of them is a shortcut",
    "position": "adds a position: one depthwise convolution of the input, or what one branch alone reads",
    "scores": "sums two scores that a softmax alone reads, as an attention does",
    "stochastic": "has stochastic depth of its own written out, which cannot be taken off whole",
    "untraceable": "the block could not be traced",
}


@dataclass(frozen=True, slots=True)
class Residual:
    """One addition ``shortcut + branch(x)`` that may carry a gate.

    Attributes:
        name: Qualified name of the add, the block's name and the add's place in it: ``"layer1.0.add"``,
            ``"blocks.3.add_1"``.
        block: Qualified name of the module whose own ``forward`` performs the add; ``""`` is the model.
        block_type: Class name of that module.
        kind: ``"identity"`` or ``"projection"`` (what the shortcut does to the block's input), ``"left"`` or
            ``"right"`` where ``include`` told which side is the shortcut, ``"mean"`` for a join of paths, or
            ``"concat"`` for new features.
        shortcut: What the shortcut runs: ``"identity"`` or its modules, ``"downsample"``.
        branch: What the branch runs, its modules in order: ``"conv1 bn1 act1 conv2 bn2"``.
        flops: FLOPs of one forward of the branch on the example.
        replaces: Names of the stochastic-depth modules already on this branch; the gate stands in for them.
        paths: Of a join, of how many paths it is the mean; 0 otherwise.
        depth: How many residual adds of its block follow on one another up to this one, itself included.
        shape: Of the sum, on the example.
        parameters: How many numbers the weights of the branch hold.
        activations: Bytes of the tensors that one forward of the branch makes on the example, all of which a
            backward may need.
    """

    name: str
    block: str
    block_type: str
    kind: str
    shortcut: str
    branch: str
    flops: int
    replaces: tuple[str, ...] = ()
    depth: int = 1
    paths: int = 0
    shape: tuple[int, ...] = ()
    parameters: int = 0
    activations: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """One addition that is left alone.

    Attributes:
        name, block, block_type: As in `Residual`.
        code: One of a fixed set, the keys of `REASONS`.
        reason: The same as a sentence.
    """

    name: str
    block: str
    block_type: str
    code: Code
    reason: str


@dataclass(frozen=True, slots=True)
class Findings(Listed[Residual]):
    """What `surgeon.find` found; iterating gives the residual adds.

    Attributes:
        residuals: The residual adds, in the order in which they first run.
        refused: Every other addition of two tensors, with its reason; a layer's own bias is not listed.
        flops: FLOPs of one forward of the whole model on the example.
    """

    residuals: tuple[Residual, ...]
    refused: tuple[Refusal, ...]
    flops: int

    def _entries(self) -> Sequence[Residual]:
        return self.residuals

    def parts(self, *, every: bool = False) -> Sequence[Part]:
        """A table of the residual adds, and the reasons why others are none; ``every`` lists them singly."""
        total, right = max(self.flops, 1), frozenset({"FLOPs", "count"})
        adds = tuple(
            (r.name, r.block_type, r.kind, r.shortcut, r.branch, f"{r.flops / total:.1%}") for r in self
        )
        joins = sum(r.kind in ("mean", "concat") for r in self)
        named = count(len(self) - joins, "residual add") + (f" and {count(joins, 'join')}" if joins else "")
        shown = [Part(named, _ADDS, adds, right)]
        title = f"{count(len(self.refused), 'addition')} left alone"
        if self.refused and every:
            others = tuple((r.name, r.block_type, r.code, r.reason) for r in self.refused)
            shown.append(Part(title, ("addition", "block", "code", "reason"), others))
        elif self.refused:
            reasons = Counter((r.code, r.reason) for r in self.refused).most_common()
            counted = tuple((str(n), *why) for why, n in reasons)
            shown.append(Part(title, ("count", "code", "reason"), counted, right))
        return shown


_ADDS = ("add", "block", "kind", "shortcut", "branch", "FLOPs")


FEATURES = 10_000
"""New features of a block that concatenates are numbered from here on, behind its additions."""


def gate_name(block: str, ordinal: int) -> str:
    """Qualified name of a residual add or of new features: the block's, and the place among such there."""
    add, place = ("cat", ordinal - FEATURES) if ordinal >= FEATURES else ("add", ordinal)
    add = f"{add}_{place}" if place else add
    return f"{block}.{add}" if block else add
