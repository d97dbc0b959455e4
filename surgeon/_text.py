"""What results look like, drawn once: parts of titles, tables and lines, as plain text and as HTML.

The command prints the same parts; it adds colour and fits them into the terminal (`surgeon.cli._draw`).
"""

import html
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a drawn result: a title, a table, and lines behind it; each may be missing.

    Attributes:
        title: One line.
        head: The names of the table's columns.
        rows: The table's cells, row by row.
        right: The columns that hold numbers, by name.
        lines: Lines of text.
    """

    title: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    right: frozenset[str] = frozenset()
    lines: tuple[str, ...] = ()


class Drawn(ABC):
    """A result that draws itself, as text, as HTML in a notebook, and as plain values for JSON."""

    __slots__ = ()

    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """What there is to show."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def __str__(self) -> str:
        return as_text(self.parts())

    def _repr_html_(self) -> str:
        return as_html(self.parts())


class Listed(Drawn, Generic[Entry]):
    """A result that is a sequence of its main entries, too."""

    __slots__ = ()

    @abstractmethod
    def _entries(self) -> Sequence[Entry]: ...

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())

    def __getitem__(self, place: int) -> Entry:
        return self._entries()[place]


def as_text(parts: Sequence[Part]) -> str:
    """The parts one below the other, an empty line between them; columns are two spaces apart."""
    return "\n\n".join("\n".join(_lines(part)) for part in parts)


def as_html(parts: Sequence[Part]) -> str:
    """The parts as a fragment of HTML."""
    return "\n".join(_markup(part) for part in parts)


def count(number: int, noun: str, several: str = "") -> str:
    """``1 gate``, ``2 gates``; ``several`` where an s does not do."""
    return f"{number} {noun if number == 1 else several or noun + 's'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def some(items: Iterable[str], shown: int = 4) -> str:
    """The first few items with commas between, and how many more there are."""
    listed = list(items)
    more = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {more} more" if more > 0 else "")


def _lines(part: Part) -> list[str]:
    return [*filter(None, [part.title]), *_table(part), *part.lines]


def _table(part: Part) -> list[str]:
    if not part.rows:
        return []
    cells = (part.head, *part.rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(part.head))]
    return [
        "  ".join(
            cell.rjust(width) if name in part.right else cell.ljust(width)
            for cell, width, name in zip(row, widths, part.head, strict=True)
        ).rstrip()
        for row in cells
    ]


def _markup(part: Part) -> str:
    rows = [("th", part.head), *(("td", row) for row in part.rows)] if part.rows else []
    title = [f"<b>{html.escape(part.title)}</b>"] if part.title else []
    table = ["<table>", *(f"<tr>{_cells(tag, row, part)}</tr>" for tag, row in rows), "</table>"]
    lines = ["<br>".join(html.escape(line) for line in part.lines)] if part.lines else []
    return "\n".join([*title, *(table if rows else []), *(f"<p>{line}</p>" for line in lines)])


def _cells(tag: str, row: Sequence[str], part: Part) -> str:
    sides = ("right" if name in part.right else "left" for name in part.head)
    return "".join(
        f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
        for cell, side in zip(row, sides, strict=True)
    )
