"""The house of docs/design.md: which room imports which, and that each is tested beside its folder."""

import ast
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from click import Context

import surgeon
from surgeon.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ROOT / "surgeon"
ORDER = ["_tracing", "_finding", "_gating", "_folding", "", "_pruning", "_onnx", "integrations", "cli"]
"""The folders as design.md has them; "" is what lies flat in the package."""
FOR_ALL = {
    f"surgeon.{room}"
    for room in ("errors", "_version", "_mark", "_meant", "_files", "_needs", "_plain", "_text", "_torch")
}
TESTED_IN = {
    **{folder: {folder.removeprefix("_")} for folder in ORDER},
    "": {"promises", "gating", "folding", "pruning", "recipes", "cli", "integrations"},
}


def name_of(path: Path) -> str:
    """The module that a file of the house is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ROOMS = {name_of(path): path for path in sorted(HOUSE.rglob("*.py")) if path.name != "__main__.py"}


def folder_of(room: str) -> str:
    """The folder that a room is in."""
    return ROOMS[room].relative_to(HOUSE).parent.name


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """The rooms that a file imports, inside functions and for types alone too, by homes of public names."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports from a folder that only its own place tells"
            named |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "surgeon":
            named.add(f"surgeon.{node.attr}")
        elif isinstance(node, ast.Constant) and str(node.value).endswith(".py"):  # a program to start
            named |= {room for room, other in ROOMS.items() if other == path.parent / str(node.value)}
    public = {f"surgeon.{name}": f"surgeon.{home}" for name, home in surgeon._HOMES.items()}
    return frozenset({public.get(name, name) for name in named} & ROOMS.keys())


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Rooms that import each other in a round, each the next one; empty if there is no such round."""
    done: set[str] = set()

    def walk(room: str, way: list[str]) -> list[str]:
        if room in way:
            return way[way.index(room) :]
        if room not in done:
            for other in sorted(graph[room]):
                if round_ := walk(other, [*way, room]):
                    return round_
            done.add(room)
        return []

    return next((found for room in graph if (found := walk(room, []))), [])


def test_no_circle_of_imports() -> None:
    """Of the rooms; only the command imports the package as a whole, which names its public rooms."""
    graph = {room: imports(path) - {"surgeon"} for room, path in ROOMS.items()}
    assert circle(graph) == []
    whole = {folder_of(room) for room, path in ROOMS.items() if "surgeon" in imports(path)}
    assert whole <= {"cli"}


def test_a_circle_would_be_seen() -> None:
    graph = {room: imports(path) - {"surgeon"} for room, path in ROOMS.items()}
    assert "surgeon.errors" in graph["surgeon._torch"]
    closed = graph | {"surgeon.errors": frozenset({"surgeon._gating.gate"})}
    found = circle(closed)
    assert {"surgeon.errors", "surgeon._gating.gate"} <= set(found)
    assert all(other in closed[room] for room, other in zip(found, [*found[1:], found[0]], strict=True))


def test_no_folder_imports_one_further_on() -> None:
    pairs = {(room, other) for room, path in ROOMS.items() if room != "surgeon" for other in imports(path)}
    folders = {
        (folder_of(room), folder_of(other)): (room, other)
        for room, other in pairs
        if other not in FOR_ALL | {"surgeon"}
    }
    assert [pair for (a, b), pair in folders.items() if ORDER.index(b) > ORDER.index(a)] == []
    assert ("_onnx", "") in folders and ("_gating", "_tracing") in folders


def test_the_map_has_every_room_and_no_other() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"`(\w+)(?:\.py)?`", design))
    rooms = {path.stem for room, path in ROOMS.items() if folder_of(room) not in ("cli", "integrations")}
    assert rooms - named == {"__init__", "_version"}
    assert set(re.findall(r"`(\w+)\.py`", design)) <= {path.stem for path in ROOMS.values()}


@pytest.mark.parametrize("folder", ["_tracing", "_gating"])
def test_files_have_one_subject(folder: str) -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (HOUSE / folder).glob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_gates_and_folds_know_only_the_mark_of_each_other() -> None:
    for one, other in (("_gating", "_folding"), ("_folding", "_gating")):
        between = {o for room, path in ROOMS.items() if folder_of(room) == one for o in imports(path)}
        assert not {room for room in between if folder_of(room) == other}, one
        assert "surgeon._mark" in between


def test_what_every_folder_may_use_uses_nothing_else() -> None:
    rest = {room: imports(ROOMS[room]) - FOR_ALL for room in FOR_ALL}
    assert {room: others for room, others in rest.items() if others} == {}


@pytest.mark.parametrize("folder", ORDER)
def test_every_room_is_imported_by_a_test(folder: str) -> None:
    """By one of the tests that mirror its folder: itself, by a public name, or through rooms beside it."""
    tests = [path for there in TESTED_IN[folder] for path in (ROOT / "tests" / there).rglob("*.py")]
    rooms = {room for room in ROOMS if folder_of(room) == folder and ROOMS[room].name != "__init__.py"}
    direct = {room for path in tests for room in imports(path)}
    direct |= {room for public in direct if not folder_of(public) for room in imports(ROOMS[public])}
    reached = direct & rooms
    assert reached, "no test of the room imports its folder"
    todo = list(reached)
    while todo:
        beside = imports(ROOMS[todo.pop()]) & rooms - reached
        if "surgeon.cli.main" in reached:  # it imports a command when it is called
            beside |= {f"surgeon.cli.{name}" for name in main.list_commands(Context(main))} - reached
        reached |= beside
        todo += beside
    assert rooms - reached == set()
