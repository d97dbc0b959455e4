"""README's first screen: its numbers are those of the rows, and its picture can be drawn."""

from pathlib import Path

import pytest

from benchmarks import front

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_numbers_of_the_readme_are_those_of_the_rows() -> None:
    text = README.read_text(encoding="utf-8")
    assert front.BLOCK in text
    assert front.quoted(text) == text, "python -m benchmarks.front writes them anew"
    assert front.quoted("a page without the block") == "a page without the block"


def test_pairs_are_of_one_seed() -> None:
    def row(arm: str, seed: int, accuracy: float) -> dict[str, object]:
        return {"kind": "train", "part": "p", "arm": arm, "seed": seed, "test": {"accuracy": accuracy}}

    rows = [row("none", 0, 0.5), row("none", 1, 0.7), row("a", 0, 0.6), row("a", 1, 0.6), row("b", 0, 0.9)]
    found = front.differences([*rows, row("a", 2, 0.1), {"kind": "control"}])
    assert list(found) == ["p, a"]
    assert found["p, a"] == pytest.approx([10, -10])


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    front.draw(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert len(front.times(front.rows("performance.jsonl"))) == 4
