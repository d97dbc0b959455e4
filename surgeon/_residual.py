"""Finds the residual adds in the traced graph of one block, and says why every other addition is none."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Residual:
    """One addition ``shortcut + branch(x)`` that may carry a gate.

    Attributes:
        name: Qualified name of the add, ``<block>.<fx node name>``: ``"layer1.0.add"``.
        block: Qualified name of the module whose own ``forward`` performs the add; ``""`` is the model.
        block_type: Class name of that module.
        kind: ``"identity"`` or ``"projection"`` (what the shortcut does to the block's input).
        shortcut: What the shortcut runs, in words: ``"x"``, ``"downsample(x)"``.
        branch: What the branch runs, its modules in order: ``"conv1 bn1 ... bn3"``.
        flops: Multiply-adds times two of one forward of the branch on the example.
        replaces: Names of the stochastic-depth modules already on this branch, which the gate stands in for.
    """

    name: str
    block: str
    block_type: str
    kind: str
    shortcut: str
    branch: str
    flops: int
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """One addition that is left alone, with the reason.

    Attributes:
        name, block, block_type: As in `Residual`.
        code: Short reason code, e.g. ``"nested"``, ``"bias"``, ``"linear"``, ``"no-shortcut"``, ``"untraceable"``.
        reason: The same as a sentence.
    """

    name: str
    block: str
    block_type: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What `surgeon.find` found: residual adds in execution order, and the additions left alone.

    Attributes:
        residuals: The residual adds, in the order in which they first run.
        refused: Every other addition of two tensors, with its reason.
        flops: FLOPs of one forward of the whole model on the example (batch of two).
    """

    residuals: tuple[Residual, ...]
    refused: tuple[Refusal, ...]
    flops: int
