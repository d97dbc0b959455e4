"""The messages of the errors that surgeon raises on purpose, read from its source.

A message is what is fixed of its words, with ``…`` for each value. Where a function or a constant of
surgeon, or a variable, holds the message, that is followed.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VALUE = "…"
_DEEPEST = 12


@dataclass(frozen=True)
class Message:
    """One message as the source has it: where, which error, and what is fixed of its words."""

    place: str
    error: str
    text: str


@dataclass
class Source:
    """What the files define: by name, the functions, the constants, and the errors of surgeon."""

    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)
    errors: set[str] = field(default_factory=set)

    def read(self, tree: ast.Module) -> None:
        """Notes what a file defines."""
        self.functions |= {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value


def messages(*folders: str) -> list[Message]:
    """All messages of the errors raised in these folders of the repository, by file and line."""
    source = Source(errors=_errors())
    trees = {}
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        trees[path] = ast.parse(path.read_text(encoding="utf-8"))
        source.read(trees[path])
    return [found for path, tree in trees.items() for found in _raised(path, tree, source)]


def squeezed(text: str) -> str:
    """Neighbouring values as one, runs of spaces as one."""
    return re.sub(r"\s+", " ", re.sub(rf"{VALUE}(\s*{VALUE})*", VALUE, text)).strip()


def _errors() -> set[str]:
    tree = ast.parse((ROOT / "surgeon" / "errors.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _raised(path: Path, tree: ast.Module, source: Source) -> Iterator[Message]:
    own = Source()
    own.read(tree)
    mine = Source(source.functions | own.functions, source.constants | own.constants, source.errors)
    seen: set[int] = set()
    for scope in (*(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)), tree):
        for node in ast.walk(scope):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name in source.errors and node.args and id(node) not in seen:
                seen.add(id(node))
                for text in dict.fromkeys(_Texts(mine, scope).of(node.args[0])):
                    yield Message(f"{path.relative_to(ROOT)}:{node.lineno}", name, squeezed(text))


@dataclass(frozen=True)
class _Texts:
    """What an expression may say, with `VALUE` for what is not fixed."""

    source: Source
    scope: ast.AST
    depth: int = 0

    def of(self, node: ast.expr) -> list[str]:
        if self.depth > _DEEPEST:
            return [VALUE]
        answer = getattr(self, f"_of_{type(node).__name__}", None)
        return [VALUE] if answer is None else answer(node) or [VALUE]

    def _deeper(self, scope: ast.AST | None = None) -> "_Texts":
        return _Texts(self.source, scope or self.scope, self.depth + 1)

    def _all(self, nodes: list[ast.expr], scope: ast.AST | None = None) -> list[str]:
        return [text for node in nodes for text in self._deeper(scope).of(node)]

    def _of_Constant(self, node: ast.Constant) -> list[str]:
        return [str(node.value)]

    def _of_JoinedStr(self, node: ast.JoinedStr) -> list[str]:
        return ["".join(str(p.value) if isinstance(p, ast.Constant) else VALUE for p in node.values)]

    def _of_BinOp(self, node: ast.BinOp) -> list[str]:
        return [left + right for left in self._all([node.left]) for right in self._all([node.right])]

    def _of_IfExp(self, node: ast.IfExp) -> list[str]:
        return self._all([node.body, node.orelse])

    def _of_BoolOp(self, node: ast.BoolOp) -> list[str]:
        return self._all(node.values)

    def _of_Name(self, node: ast.Name) -> list[str]:
        given = [
            n.value
            for n in ast.walk(self.scope)
            if isinstance(n, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == node.id for t in n.targets)
        ]
        if not given and node.id in self.source.constants:
            given = [self.source.constants[node.id]]
        return self._all(given)

    def _of_Call(self, node: ast.Call) -> list[str]:
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called in ("rstrip", "strip") and isinstance(node.func, ast.Attribute):
            return self._all([node.func.value])
        made = self.source.functions.get(called)
        if made is None or made is self.scope:
            return []
        returned = [n.value for n in ast.walk(made) if isinstance(n, ast.Return) and n.value is not None]
        return self._all(returned, made)
