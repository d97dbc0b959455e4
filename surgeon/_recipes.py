"""Finds the recipes, in a checkout as well as in an installed wheel, and loads one of them.

Recipes are scripts that a user copies and edits, so the library never imports them as a package: a wheel
carries them as plain files under `surgeon/recipes` and puts no `recipes` package into site-packages.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from surgeon.errors import SurgeonError, UsageError

_HERE = Path(__file__).resolve().parent


def locate() -> Path:
    """The folder that holds the recipes: `surgeon/recipes` in a wheel, `recipes` in a checkout.

    Raises:
        SurgeonError: If neither is there, because the package was installed without its recipes.
    """
    places = (_HERE / "recipes", _HERE.parent / "recipes")
    for place in places:
        if (place / "finetune.py").is_file():
            return place
    raise SurgeonError(
        f"cannot find the recipes: no finetune.py in {' or '.join(map(str, places))}. "
        "Install surgeon again (pip install --force-reinstall depth-surgeon) or work in a checkout."
    )


def load(name: str = "finetune") -> ModuleType:
    """The recipe `name` as a module; changes nothing but `sys.path`, as running the script would.

    A recipe's parts (`finetune_config.py` and so on) lie beside it and are imported by their plain names,
    which is what lets a user copy the folder anywhere and run it there.

    Raises:
        UsageError: If there is no such recipe; the message lists those there are.
        SurgeonError: If a package that the recipe needs is not installed, or too old.
    """
    folder = locate()
    if not (folder / f"{name}.py").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.py") if "_" not in path.stem))
        raise UsageError(f"there is no recipe named {name!r}. Recipes: {known}.")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except SurgeonError:  # an unsupported PyTorch, say, which is an ImportError as well
        raise
    except ImportError as error:
        raise SurgeonError(
            f"the recipe {name} cannot start ({error}): pip install 'depth-surgeon[recipes]'"
        ) from error


def models() -> dict[str, Callable[..., Any]]:
    """What makes each network of the papers, by name: the ``MODELS`` of every file in the folder `models`."""
    found: dict[str, Callable[..., Any]] = {}
    for path in sorted((locate() / "models").glob("*.py")):
        found |= _file(path).MODELS
    return found


def _file(path: Path) -> ModuleType:
    """One file as a module of a name that no package of the user's has, so that `sys.path` stays as it is."""
    name = f"surgeon_recipes_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def contents() -> dict[str, str]:
    """What there is to copy: recipes and configs by name, each with the first line of its head."""
    folder = locate()
    found = {}
    for path in (*sorted(folder.glob("*.py")), *sorted((folder / "models").glob("*.py"))):
        name = path.relative_to(folder).as_posix()
        found["finetune" if name == "finetune.py" else name] = _first_line(path)
    configs = folder / "configs"
    for path in sorted(configs.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        found[path.relative_to(configs).with_suffix("").as_posix()] = _first_line(path)
    return found


def _first_line(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip('"').strip()
