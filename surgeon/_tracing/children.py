"""How a trace treats the modules below its block: calls of them are leaves, but for those named here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from surgeon._tracing.oplog import Op


@dataclass(frozen=True, slots=True)
class StandIn:
    """What stands for a child in which values decide shapes, so that it runs on no fake tensors.

    Attributes:
        place: Among the tensors it gets, the one whose shape and type its result has.
        ops: The operators that ran in it where it did run.
        draws: Whether it stands for one that draws random numbers, too; else that is a coin of its own.
    """

    place: int
    ops: tuple[Op, ...] = field(compare=False)
    draws: bool


@dataclass(frozen=True, slots=True)
class Below:
    """The modules below a block that a trace does not just call, by name.

    Attributes:
        opened: Those that are traced through.
        stand_ins: For those that may fail on fake tensors, what stands for their result then.
    """

    opened: frozenset[str] = frozenset()
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)

    def portable(self) -> "Below":
        """The same without the operators, which do not pickle."""
        bare = {name: replace(one, ops=()) for name, one in self.stand_ins.items()}
        return replace(self, stand_ins=bare)

    def __or__(self, other: "Below") -> "Below":
        return Below(self.opened | other.opened, {**self.stand_ins, **other.stand_ins})
