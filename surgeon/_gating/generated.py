"""Graphs as generated Python."""

from collections.abc import Callable
from typing import Any

from torch import fx

Run = Callable[..., Any]


def receiver(graph: fx.Graph) -> fx.Node:
    """The block as a value in generated code; fx clears names after their last use, ``self`` must stay."""
    return graph.create_node("placeholder", "self", name="block")


def argument(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A placeholder for ``node``; its target is private, so that no argument's name can clash."""
    return graph.create_node("placeholder", f"_{node.name}_", name=node.name)


_KNOWN: dict[tuple[Any, ...], Run] = {}


def compiled(graph: fx.Graph) -> Run:
    """Python source of a graph as a function; equal blocks share one, so that compilers see it once."""
    for node in graph.nodes:
        node.type = None
    code = graph.python_code("self")
    key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
    if key not in _KNOWN:
        graph.lint()
        scope = dict(code.globals)
        exec(compile(code.src, "<surgeon>", "exec"), scope)  # noqa: S102 - what fx wrote, as GraphModule does
        _KNOWN[key] = scope["forward"]
    return _KNOWN[key]
