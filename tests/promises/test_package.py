"""The package as it is installed: light to import, one version, recipes inside, nothing beside it."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import surgeon
from surgeon._version import __version__

ROOT = Path(__file__).resolve().parents[2]
HEAVY = [
    "onnx",
    "onnxruntime",
    "onnxscript",
    "matplotlib",
    "rich",
    "click",
    "pydantic",
    "timm",
    "torchvision",
]


def fresh_python(code: str, *paths: Path) -> str:
    """What a new interpreter prints that sees those folders first."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    code = "import json, sys, surgeon; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(fresh_python(code, ROOT)))
    assert "surgeon" in loaded
    assert not loaded & set(HEAVY)


def test_import_changes_nothing_global() -> None:
    code = (
        "import os, random, logging, warnings, torch\n"
        "def state():\n"
        "    threads = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()\n"
        "    return dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), threads, "
        "logging.getLogger().handlers[:], logging.getLogger().level, warnings.filters[:]\n"
        "before = state()\n"
        "import surgeon\n"
        "print([a == b for a, b in zip(before, state())])\n"
    )
    assert fresh_python(code, ROOT).strip() == str([True] * 7)


def test_version_has_one_home() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "surgeon/_version.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", __version__)
    assert surgeon.__version__ == __version__
    holders = [
        path
        for path in (ROOT / "surgeon").rglob("*.py")
        if re.search(r"__version__ *= *[\"']", path.read_text())
    ]
    assert [path.name for path in holders] == ["_version.py"]


def test_public_names_exist() -> None:
    assert all(isinstance(name, str) and hasattr(surgeon, name) for name in surgeon.__all__)
    assert {"find", "apply", "status", "set_drop_rate", "remove", "fold", "export", "verify"} <= set(
        surgeon.__all__
    )
    assert "SurgeonError" in surgeon.__all__


def test_extras_hold_what_the_documents_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"recipes", "test", "docs", "dev", "test-zoo"}
    assert project["requires-python"] == ">=3.10"
    documents = (
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/training.md", "docs/export.md")
    )
    asked = {
        extra for path in documents for extra in re.findall(r"depth-surgeon\[([a-z,-]+)\]", path.read_text())
    }
    assert {one for extra in asked for one in extra.split(",")} <= set(extras)


def test_every_message_and_page_has_the_name_of_the_distribution() -> None:
    """`surgeon` is another package on the index."""
    wrong = re.compile(r"pip install[^\n\"`]* '?surgeon\b(?!/)|(?<![\w-])surgeon\[")
    pages = [path for folder in ("surgeon", "recipes", "docs") for path in (ROOT / folder).rglob("*.*")]
    pages = [path for path in pages if path.suffix in (".py", ".md", ".yaml")]
    found = [path.name for path in (*pages, *ROOT.glob("*.md")) if wrong.search(path.read_text())]
    assert found == []
    assert wrong.search("pip install 'surgeon[recipes]'") and wrong.search("pip install -U surgeon")


def test_the_citation_tells_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, flags=re.MULTILINE)[1] == __version__


def test_everything_that_the_library_imports_is_declared() -> None:
    """Of the packages that are no extra; what one of them brings along is declared none the less."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", one)[0].replace("-", "_") for one in project["dependencies"]}
    imported = set()
    for path in (ROOT / "surgeon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    # The libraries that a file of `integrations` is for, which whoever imports it has.
    trainers = {"accelerate", "lightning", "pytorch_lightning", "transformers"}
    pictures = {"matplotlib"}  # of the recipes' extra; named with its install line where a picture is drawn
    loaded_by_name = {"timm", "onnxscript"}
    ours = imported - set(sys.stdlib_module_names) - {"surgeon"} - pictures - trainers
    assert ours == declared - loaded_by_name


def test_every_make_target_of_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"^\s*(?:`)?make ([a-z-]+)", (ROOT / name).read_text(), flags=re.MULTILINE))
        assert named <= targets, name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that this checkout builds."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return folder / done.stdout.split()[-1]


def test_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"depth_surgeon-{__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {"surgeon", f"depth_surgeon-{__version__}.dist-info"}
    assert "surgeon/py.typed" in names
    recipes = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "recipes").rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert {f"surgeon/{name}" for name in recipes} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "tests" in name]


def test_wheel_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from surgeon import _recipes\n"
        "print(_recipes.locate())\n"
        "config = _recipes.load('finetune_config')\n"
        "print(*sorted(config.load_config(p.stem, []).model.name for p in config.CONFIGS.glob('*.yaml')))\n"
    )
    place, models = fresh_python(code, tmp_path).splitlines()
    assert Path(place) == tmp_path.resolve() / "surgeon" / "recipes"
    assert "timm:resnet50" in models.split()
