"""docs/errors.md against the messages in the source: each is there by its words, and none that is no more."""

import ast
import re
from pathlib import Path

import pytest
import torch
from messages import ROOT, VALUE, Source, _raised, messages
from torch import nn

import surgeon
from surgeon import errors

FOUND = [message for message in messages("surgeon", "recipes") if message.text != VALUE]
ENTRY = re.compile(r"^- (`{1,2})(.+?)\1 \((\w+(?:, \w+)*)\)$", re.MULTILINE)


def page() -> str:
    return (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def entries() -> dict[str, set[str]]:
    """What the page has: the words of a message, and which errors say it."""
    return {m[2]: set(m[3].split(", ")) for m in ENTRY.finditer(page())}


def _line(text: str, kinds: set[str]) -> str:
    ticks = "``" if "`" in text else "`"
    return f"- {ticks}{text}{ticks} ({', '.join(sorted(kinds))})"


def test_every_message_is_on_the_page() -> None:
    told: dict[str, set[str]] = {}
    for message in FOUND:
        told.setdefault(message.text, set()).add(message.error)
    listed = entries()
    missing = [_line(text, kinds) for text, kinds in told.items() if not kinds <= listed.get(text, set())]
    assert not missing, "docs/errors.md lacks, with their cures:\n" + "\n".join(missing)


def test_the_page_has_no_message_that_is_no_more() -> None:
    texts = {message.text for message in FOUND}
    stale = [text for text in entries() if text not in texts]
    assert not stale, "docs/errors.md has what nothing raises:\n" + "\n".join(stale)


def test_messages_are_found() -> None:
    assert len(FOUND) > 250
    composed = [message for message in messages("surgeon", "recipes") if message.text == VALUE]
    assert len(composed) <= 6, composed  # made elsewhere, and handed on


def test_every_kind_of_error_is_raised_and_has_an_exit_code() -> None:
    kinds = {name for name, one in vars(errors).items() if isinstance(one, type)} - {"Any", "SurgeonError"}
    assert kinds <= {message.error for message in FOUND} | {"ParityError"}
    for name in ("UsageError", "NoResidualsError", "ParityError"):
        assert f"| `{name}`" in page()


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ('raise UsageError(f"k is {k!r}; give {a}{b}")', ["k is …; give …"]),
        ('raise UsageError(say(1))\ndef say(n):\n    return f"no {n}" if n else "none"', ["no …", "none"]),
        ('WHY = "so"\nraise UsageError(WHY)', ["so"]),
        (
            'def f(x):\n    why = x and "one" or f"two {x}"\n    raise UsageError("is " + why)',
            ["is …", "is one", "is two …"],
        ),
        ("raise KeyError('other')", []),
    ],
)
def test_how_messages_are_read(code: str, texts: list[str]) -> None:
    found = _raised(ROOT / "some.py", ast.parse(code), Source(errors={"UsageError"}))
    assert sorted(message.text for message in found) == sorted(texts)


def _patterns() -> list[re.Pattern[str]]:
    fixed = (".*".join(map(re.escape, text.split(VALUE))) for text in entries())
    return [re.compile(pattern, re.DOTALL) for pattern in fixed if len(pattern) > 24]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: surgeon.apply(m, drop_rate=2.0, example=x),
        lambda m, x: surgeon.apply(m, "cosine", example=x),
        lambda m, x: surgeon.apply(m, exclude="nothing", example=x),
        lambda m, x: surgeon.apply(m, unit="row", example=x),
        lambda m, x: surgeon.apply(m, "linear", 0.2),
        lambda m, x: surgeon.apply(m, example=torch.zeros(2, 3)),
        lambda m, x: surgeon.apply(nn.Linear(4, 4), example=x),
        lambda m, x: surgeon.apply(nn.DataParallel(m), example=x),
        lambda m, x: surgeon.fold(m),
        lambda m, x: surgeon.status(m),
        lambda m, x: surgeon.load(m, "nothing.safetensors"),
        lambda m, x: surgeon.export(m, "nowhere/at/all.onnx", example=x),
        lambda m, x: surgeon.load_model("timm:resnt18"),
    ],
)
def test_what_a_user_reads_is_found_by_its_words(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc(x).relu()

    with pytest.raises(surgeon.SurgeonError) as told:
        call(nn.Sequential(Block()), torch.zeros(2, 4))
    assert any(pattern.fullmatch(str(told.value)) for pattern in _patterns()), str(told.value)
