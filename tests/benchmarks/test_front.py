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
    def row(arm: str, seed: int, bits: str) -> dict[str, object]:
        test = {"accuracy": bits.count("1") / 8, "nll": 0.5, "right": f"{int(bits, 2):02x}", "of": 8}
        return {"kind": "train", "part": "fashion", "arm": arm, "seed": seed, "test": test}

    none = [row("none", 0, "11110000"), row("none", 1, "11111100")]
    arms = [row("linear 0.1", 0, "11111000"), row("linear 0.1", 1, "11110000"), row("linear 0.2", 0, "1")]
    found = front.differences([*none, *arms, row("linear 0.1", 2, "1")])
    (part,) = found
    assert "300 images" in part
    assert list(found[part]) == ["linear 0.1"]  # one pair is no mean
    assert found[part]["linear 0.1"].differences == (1 / 8, -2 / 8)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    front.draw(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert len(front.times(front.rows("performance.jsonl"))) == 4
