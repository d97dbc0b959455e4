"""The page of ``surgeon inspect --html``: one file, complete, and the numbers of the plan in it."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from blocks import BasicBlock
from browser import Page, browser
from click.testing import CliRunner
from torch import Tensor, nn

import surgeon
from surgeon._depth import depth_law, path_lengths
from surgeon._report import Plan
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
    assert {**json.loads(done.stdout), "unit": "sample", "scaling": "inverted", "joins": "both"} == data
    tags = Tags()
    tags.feed(text)
    assert not [a for _, a in tags.seen if "src" in a or "href" in a]
    assert not re.search(r"https?://(?!www\.w3\.org)", text) and "@import" not in text
    labelled = [a for tag, a in tags.seen if tag in ("svg", "form")]
    assert all(a.get("aria-label") for a in labelled) and len(labelled) == 5
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


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if not shutil.which("chromium"):
        pytest.skip("no browser")
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def page_of(plan: Plan, file: Path) -> str:
    told = {"unit": "sample", "scaling": "inverted", "joins": plan.settings.paths}
    file.write_text(page({"model": "net", **plan.to_dict(), **told}))
    return f"file://{file}"


def text(window: Page, of: str) -> str:
    return str(window.run(f"document.getElementById({of!r}).textContent"))


def shows(window: Page, plan: Plan) -> None:
    """The page shows what Python says of a plan: numbers, bars, table."""
    depth, _, gates = text(window, "depth").partition(" of ")
    assert float(depth) == pytest.approx(plan.expected_depth, abs=0.051) and int(gates) == len(plan)
    flops = float(text(window, "flops").removesuffix(" %"))
    assert flops == pytest.approx(100 * plan.expected_flops, abs=0.051)
    for place, gate in enumerate(plan):
        assert float(text(window, f"p{place}")) == pytest.approx(gate.survival, abs=5.1e-4)
        outer, inner = (
            window.run(f"document.querySelector('#p{place} {what}').getBoundingClientRect().width")
            for what in (".bar", ".bar i")
        )
        assert inner / outer == pytest.approx(gate.survival, abs=0.02)
        height = f"document.querySelectorAll('#survival rect')[{place}].getAttribute('height')"
        assert float(window.run(height)) == pytest.approx(gate.survival)


X = torch.zeros(2, 4, 6, 6)


@pytest.mark.parametrize("schedule", ["linear", "linear-from-zero", "uniform"])
def test_the_slider_redraws_what_python_says(tmp_path: Path, window: Page, schedule: str) -> None:
    """Moved by keys, as by somebody without a mouse; the page complains of nothing and loads nothing else."""
    net = Net()
    address = page_of(surgeon.plan(net, drop_rate=0.5, example=X), tmp_path / "net.html")
    window.open(address)
    shows(window, surgeon.plan(net, drop_rate=0.5, example=X))
    window.run(f"document.getElementById('schedule').value = {schedule!r}")
    window.run("document.getElementById('schedule').dispatchEvent(new Event('change'))")
    window.run("document.getElementById('rate').focus()")
    window.press("ArrowRight", 7)
    assert window.run("document.getElementById('rate').value") == "0.57"
    shows(window, surgeon.plan(net, schedule, drop_rate=0.57, example=X))
    window.open(f"{address}#{schedule},0.25")  # a link to one setting
    shows(window, surgeon.plan(net, schedule, drop_rate=0.25, example=X))
    assert not window.complaints
    assert {one.partition("#")[0] for one in window.asked} == {address}


def test_the_distributions_are_those_of_the_laws(tmp_path: Path, window: Page) -> None:
    plan = surgeon.plan(Net(), "uniform", drop_rate=0.4, example=X)
    window.open(page_of(plan, tmp_path / "net.html"))
    survival = [gate.survival for gate in plan]
    for name, law in (("depths", depth_law(survival)), ("paths", path_lengths(survival))):
        drawn = window.run(
            f"[...document.querySelectorAll('#{name} rect')].map(r => +r.getAttribute('height'))"
        )
        assert drawn == pytest.approx([p / max(law) for p in law])


def test_joins_show_the_survival_of_a_path_and_the_columns(tmp_path: Path, window: Page) -> None:
    model, x = surgeon.load_model("recipes:fractalnet20"), torch.zeros(2, 3, 32, 32)
    for paths in ("both", "local", "global"):
        plan = surgeon.plan(model, drop_rate=0.5, example=x, paths=paths)
        window.open(page_of(plan, tmp_path / f"{paths}.html"))
        shows(window, plan)
        drawn = window.run("[...document.querySelectorAll('#columns title')].map(t => t.textContent)")
        share = {"local": 0.0, "both": 0.5, "global": 1.0}[paths]
        assert drawn == [f"each path by itself: {100 * (1 - share):.1f} %"] + [
            f"column {n}: {100 * share / 3:.1f} %" for n in (1, 2, 3)
        ]
        assert window.run("document.getElementById('depths').parentElement.hidden")


def test_it_fits_a_phone_in_the_dark(tmp_path: Path, window: Page) -> None:
    window.open(page_of(surgeon.plan(Net(), example=X), tmp_path / "net.html"))
    colours = []
    for scheme in ("light", "dark"):
        window.look(390, scheme)
        assert window.run("document.documentElement.scrollWidth <= innerWidth")
        colours.append(window.run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(18, 23, 30)"]
    window.look(1280)


def test_a_mistake_in_a_page_is_seen(tmp_path: Path, window: Page) -> None:
    """The control: the tests above would see a script that fails, and a file that is asked for."""
    (tmp_path / "bad.html").write_text("<img src='no.png'><script>console.error('oh'); gone()</script>")
    window.open(f"file://{tmp_path}/bad.html")
    assert len(window.complaints) >= 2 and any(one.endswith("no.png") for one in window.asked)


@pytest.mark.parametrize("word", ["prefers-color-scheme: dark", "aria-live", 'type="range"', "viewport"])
def test_the_page_is_for_everybody(word: str) -> None:
    assert word in page({})
