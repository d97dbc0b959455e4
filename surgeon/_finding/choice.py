"""What the user wants gated: patterns of ``include`` and ``exclude``, and what they ask of refused additions.

A refused addition comes in when an ``include`` pattern is its full name or its reason code, or matches it and
tells with ``:left`` or ``:right`` which side of the sum carries the input. It must be possible to leave the
other side out; where it is not, the error says what would make it so.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import fx

from surgeon._finding.addition import Addition
from surgeon._finding.findings import REASONS, Code
from surgeon._finding.flow import Flow
from surgeon._finding.residual import told
from surgeon._meant import meant
from surgeon.errors import UsageError

_SIDES = ("left", "right")

# Where leaving one side out is no meaningful sum, and what to change in the model.
_NEVER = {
    "aliased": "write the sum out of place (x = x + y) in the block's forward",
    "alone": "let what reads them read their shortcut, too",
    "broadcast": "expand the smaller side to the shape of the other in the block's forward",
    "stochastic": "switch the stochastic depth that is there off, or move it into a module of its own",
    "form": "write the sum as a + b in the block's forward",
    "untraceable": "what the reason names must leave the block's forward first",
}


class Choice:
    """What the user wants gated, and which of the patterns were of use.

    Args:
        include: Patterns of what to gate; all residual adds if there is none.
        exclude: Patterns of what to leave out.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.include, self.exclude = _listed(include), _listed(exclude)
        self._used: set[str] = set()
        self._problems: dict[str, str] = {}
        self._seen: set[str] = set()

    def asks_for(self, code: Code) -> bool:
        """Whether some pattern may mean an addition that is refused with ``code``."""
        entries = [_parsed(pattern) for pattern in self.include]
        last = "cat" if code == "concat" else "add"
        return any(
            p == code or (side and last == "add") or p.rpartition(".")[2].startswith(last)
            for p, side in entries
        )

    def takes(
        self, flow: Flow, addition: Addition, code: Code | None, name: str, block: str, block_type: str
    ) -> Addition | None:
        """The addition as it is to be gated; ``None`` if it is not.

        Args:
            flow: The graph it is in.
            addition: The addition.
            code: Why it is refused; ``None`` if it is a residual add.
            name: Its qualified name.
            block: The name of its block.
            block_type: The class of its block.

        Raises:
            UsageError: It is asked for by name and cannot take a gate.
        """
        if self._match("exclude", name, block, block_type):
            return None
        if code is None and (not self.include or self._match("include", name, block, block_type)):
            return addition
        code = code or addition.was
        for pattern in self._asking(name, code, block, block_type):
            found = self._meant(flow, addition, code, pattern)
            if isinstance(found, Addition):
                self._used.add(pattern)
                return found
            self._cannot(pattern, name, found)
        return None

    def refuses(self, name: str, code: Code, reason: str, block: str, block_type: str) -> None:
        """Notes an addition that is in no graph.

        Raises:
            UsageError: It is asked for by name.
        """
        for pattern in self._asking(name, code, block, block_type):
            self._cannot(
                pattern, name, f"but {reason}; {_NEVER[code]}" if code in _NEVER else f"but {reason}"
            )

    def _asking(self, name: str, code: Code | None, block: str, block_type: str) -> list[str]:
        """The patterns that ask for an addition although it is refused."""
        found = []
        for pattern in self.include:
            plain, side = _parsed(pattern)
            if plain in (name, code) or (
                side and any(fnmatchcase(text, plain) for text in (name, block, block_type))
            ):
                found.append(pattern)
        return found

    def _meant(self, flow: Flow, addition: Addition, code: Code | None, pattern: str) -> Addition | str:
        """The addition with its sides told, or why it cannot take a gate."""
        side = _parsed(pattern)[1]
        if code in _NEVER:
            return f"{REASONS[code]}; {_NEVER[code]}"
        if not side and addition.kind:
            return addition
        if not side and code == "bias":
            side = _active_side(flow, addition)
        if side:
            return told(flow, addition, side)
        return (
            "either side of the sum may be the shortcut; say which one carries the input on: "
            f"{pattern + ':left'!r} or {pattern + ':right'!r}"
        )

    def _cannot(self, pattern: str, name: str, why: str) -> None:
        message = f"include: {pattern!r} asks for {name}: {why}"
        if _parsed(pattern)[0] == name:
            raise UsageError(message)
        self._problems.setdefault(pattern, message)

    def _match(self, which: str, *texts: str) -> bool:
        self._seen.update(texts)
        patterns = self.include if which == "include" else self.exclude
        hits = [p for p in patterns if any(fnmatchcase(text, p) for text in texts)]
        self._used.update(hits)
        return bool(hits)

    def check(self) -> None:
        """Sees to it that every pattern was of use.

        Raises:
            UsageError: One was not.
        """
        for kind, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if pattern in self._used or (kind == "exclude" and pattern in REASONS):
                    continue
                if pattern in self._problems:
                    raise UsageError(self._problems[pattern])
                raise UsageError(
                    f"{kind}: {pattern!r} matches no residual add, block or block class. "
                    f"{meant(pattern, self._seen)}surgeon.find(model) lists them (`surgeon inspect MODEL` on "
                    "the command line)"
                )


def _listed(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _parsed(pattern: str) -> tuple[str, str]:
    """A pattern and the side it tells, ``""`` if none."""
    plain, _, side = pattern.rpartition(":")
    return (plain, side) if side in _SIDES else (pattern, "")


def _active_side(flow: Flow, addition: Addition) -> str:
    operands = [a for a in addition.node.args if isinstance(a, fx.Node)]
    return _SIDES[[flow.fact(a).active for a in operands].index(True)]
