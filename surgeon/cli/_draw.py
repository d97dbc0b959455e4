"""Draws the parts of a result for a terminal: in colour, and folded to its width."""

from collections.abc import Sequence
from typing import IO

from surgeon._text import Part


def draw(parts: Sequence[Part], stream: IO[str]) -> str:
    """The parts as text for the terminal behind ``stream``; cells are folded, so that nothing is lost."""
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    text = ""
    for part in parts:
        shown: list[Text | Table] = [Text(part.title, style="bold")] if part.title else []
        if part.rows:
            table = Table(box=None, pad_edge=False, header_style="dim")
            for name in part.head:
                right = name in part.right
                table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
            for row in part.rows:
                table.add_row(*map(Text, row))
            shown.append(table)
        shown += map(Text, part.lines)
        with console.capture() as captured:
            console.print(Group(*shown))
        # rich fills lines up with spaces.
        text += "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()) + "\n"
    return text.rstrip("\n")
