"""The page of ``surgeon inspect --html``: one file, complete, and the numbers of the plan in it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from blocks import BasicBlock
from click.testing import CliRunner
from torch import Tensor, nn

import surgeon
from surgeon.cli._page import page
from surgeon.cli.main import main


class Net(nn.Module):
    """Two blocks, and an addition that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(BasicBlock(), BasicBlock(project=True))
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x + self.bias)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_holds_the_plan_and_asks_for_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "net.html"
    words = ["inspect", f"{__name__}:Net", "--input-size", "4x6x6", "--html", str(file), "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    text = file.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert {**json.loads(done.stdout), "unit": "sample", "scaling": "inverted"} == data
    tags = Tags()
    tags.feed(text)
    assert not [a for _, a in tags.seen if "src" in a or "href" in a]
    assert not re.search(r"https?://(?!www\.w3\.org)", text) and "@import" not in text
    labelled = [a for tag, a in tags.seen if tag in ("svg", "form")]
    assert all(a.get("aria-label") for a in labelled) and len(labelled) == 4
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 2 and "exists" in again.stderr


def test_what_the_page_tells_of_each_gate_is_right() -> None:
    plan = surgeon.plan(Net(), example=torch.zeros(2, 4, 6, 6))
    first, second = plan.to_dict()["gates"]
    assert (first["place"], second["place"]) == (1, 2)
    assert first["shape"] == (2, 4, 6, 6) and first["parameters"] == 2 * (4 * 4 * 9 + 8)
    assert second["parameters"] == first["parameters"]  # the projection is the shortcut's
    # conv, norm (its result; statistics are small), conv, norm: at least these four tensors of 2x4x6x6 floats
    assert 4 * 1152 <= first["activations"] <= 4 * 1152 + 512
    assert plan.activations >= first["activations"] + second["activations"]


def test_no_text_ends_the_script() -> None:
    assert "</script><b>" not in page({"model": "</script><b>x"})
    assert json.loads(re.search(r'id="data">(.*?)</script>', page({"model": "</script>"}), re.DOTALL)[1]) == {
        "model": "</script>"
    }


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser")
@pytest.mark.parametrize(
    ("setting", "depth", "p"),
    [
        ("planned,0", "1.3 of 2", "0.750"),
        ("uniform,0.25", "1.5 of 2", "0.750"),
        ("linear-from-zero,0.8", "1.2 of 2", "1.000"),
    ],
)
def test_a_browser_draws_what_the_formulas_say(tmp_path: Path, setting: str, depth: str, p: str) -> None:
    plan = surgeon.plan(Net(), drop_rate=0.5, example=torch.zeros(2, 4, 6, 6))
    file = tmp_path / "net.html"
    file.write_text(page({"model": "net", **plan.to_dict(), "unit": "sample", "scaling": "inverted"}))
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    )
    command = [
        "chromium",
        *flags.split(),
        f"--user-data-dir={tmp_path}",
        "--dump-dom",
        f"file://{file}#{setting}",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert re.search(rf'<dd id="depth">{depth}</dd>', shown), shown[-3000:]
    assert f'id="p0"><span>{p}</span>' in shown


@pytest.mark.parametrize("word", ["prefers-color-scheme: dark", "aria-live", 'type="range"', "viewport"])
def test_the_page_is_for_everybody(word: str) -> None:
    assert word in page({})
