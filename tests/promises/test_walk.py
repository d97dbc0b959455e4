"""docs/walk.md leads through the house: what it shows is what the steps print."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "walk.md"


def walk(page: str) -> list[tuple[str, str]]:
    """What each block of code printed that has an expected output, and that output."""
    scope, pairs = {"__name__": "walk"}, []
    for kind, text in re.findall(r"```(python|text)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(text, "walk.md", "exec"), scope)  # noqa: S102 - our own page
        else:
            pairs.append((said.getvalue().strip(), text.strip()))
    return pairs


def test_the_walk_shows_what_the_steps_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = walk(PAGE.read_text(encoding="utf-8"))
    assert len(pairs) == 5
    for printed, shown in pairs:
        assert printed == shown
