"""The code of README and the site: what stands in a page, and how it is run."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"^(?:<!-- (?:run|not run): \w+ -->\n)?```(\w*)[^\n]*\n(.*?)^```|^<!-- before\n(.*?)^-->",
    re.MULTILINE | re.DOTALL,
)


def pages() -> list[Path]:
    """README and every page of the site, but for those that programs write."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def python_of(page: Path) -> str:
    """The Python of a page from top to bottom, each piece on the line where it stands in the page.

    What stands in ``<!-- before ... -->`` is run as well; a reader does not see it.
    """
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 2)
    for found in _BLOCK.finditer(text):
        code = found[2] if found[1] == "python" else found[3]
        if code is None or found[0].startswith(
            ("<!-- run:", "<!-- not run:")
        ):  # in tests/integrations, or nowhere
            continue
        start = text[: found.start(2 if found[1] == "python" else 3)].count("\n")
        for offset, line in enumerate(code.splitlines()):
            lines[start + offset] = line
    return "\n".join(lines)


def printed_in(page: Path) -> list[str]:
    """What a page says that its code prints."""
    return [m[2] for m in _BLOCK.finditer(page.read_text(encoding="utf-8")) if m[1] == "text"]


def commands_of(page: Path) -> list[list[str]]:
    """Every line of a page's blocks that calls surgeon, as words."""
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match[1] in ("", "sh", "bash", "console") and match[2]:
            lines = match[2].replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True) for line in lines if line.startswith("surgeon ")]
    return found
