"""README and the site: what they show is run."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import click
import pytest
import timm
import torch
from pages import ROOT, commands_of, pages, printed_in, python_of

from surgeon.cli.main import main

SLOW = ("howto.md", "joins.md", "pruning.md")
RUN = [
    page for page in pages() if python_of(page).strip() and page.name != "walk.md"
]  # test_walk.py runs that


def train(model: torch.nn.Module) -> None:
    """The loop that a reader has."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        optimizer.step()


def _run(page: Path) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(python_of(page), str(page), "exec"), {"__name__": "page", "train": train})  # noqa: S102 - our own page
    return said.getvalue()


def _marked(page: Path) -> object:
    return pytest.param(
        page, marks=[pytest.mark.slow, pytest.mark.timeout(900)] if page.name in SLOW else [], id=page.name
    )


@pytest.mark.parametrize("page", [_marked(page) for page in RUN])
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; pretrained weights are not fetched."""
    monkeypatch.chdir(tmp_path)
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: make(name, **more))
    torch.manual_seed(0)
    said = _run(page)
    for shown in printed_in(page):
        assert shown.strip() in said, f"{page.name} shows what its code does not print:\n{said}"


def test_what_is_wrong_in_a_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n<!-- before\nx = 1\n-->\n\n```python\nprint(x)\n```\n\n```python\nraise KeyError(x)\n```\n"
    )
    with pytest.raises(KeyError) as told:
        _run(page)
    assert told.traceback[-1].lineno + 1 == 12  # where it stands in the page


def _made(words: list[str]) -> click.Context:
    """Parses a command line as the shell would, and runs nothing."""
    context = main.make_context("surgeon", list(words), resilient_parsing=False)
    name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    return command.make_context(name, rest, parent=context)


COMMANDS = [(page, words) for page in pages() for words in commands_of(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda one: one.name if isinstance(one, Path) else one[1]
)
def test_every_command_line_of_a_page_is_one(page: Path, words: list[str]) -> None:
    if words[-1] in ("--help", "-h"):
        return
    if words[1] == "finetune":
        from surgeon import _recipes

        config = _recipes.load("finetune_config")
        names = [
            path.relative_to(config.CONFIGS).with_suffix("").as_posix()
            for path in config.CONFIGS.rglob("*.yaml")
        ]
        if words[2] in names:
            config.load_config(words[2], [word for word in words[3:] if "=" in word])
    assert _made(words[1:]).params


def test_a_command_line_that_is_none_is_refused() -> None:
    with pytest.raises(click.ClickException, match="No such option"):
        _made(["inspect", "timm:resnet50", "--no-such-thing"])


def test_pages_have_code_to_run() -> None:
    assert len(RUN) >= 6 and len(COMMANDS) >= 20


def test_links_of_pages_lead_somewhere() -> None:
    wrong = []
    for page in pages():
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
        name = os.path.relpath(page, ROOT)
        wrong += [f"{name}: {link}" for link in links if not (page.parent / link).exists()]
    assert wrong == []


def test_the_site_asks_no_server() -> None:
    """Its search from a folder, too: the plugin for that would name a script of others."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (script,) = re.findall(r"polyfills: \[(.*iframe-worker.*)\]", settings)
    assert (ROOT / "docs" / script).is_file() and "http" not in settings


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    cells = json.loads((ROOT / "docs" / "demo.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    scope: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(code):
        exec(compile(source, f"demo.ipynb[{number}]", "exec"), scope)  # noqa: S102 - our own page
    assert float(scope["right"]) > 0.9  # type: ignore[arg-type]
