"""Notes which parts of its arguments a traced forward has read that their kind does not tell.

An attribute of an object that was handed in (a flag of a context, a tensor in it) may decide which code runs.
Each one that is read is noted by its path from the arguments, so that a key can ask for it at every call; an
object whose methods answered a question is noted as a whole. Lists, dicts and dataclasses need no note:
`surgeon._tracing.state.kind` covers what is in them.
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, fx

from surgeon._tracing.facts import Fact
from surgeon._tracing.key import Path
from surgeon._tracing.state import PLAIN, draws_numbers
from surgeon.errors import TraceError


def _get(nest: Any, *key: Any) -> Any:
    return nest.get(*key)


_TAKES: dict[Any, Callable[..., Any]] = {operator.getitem: operator.getitem, getattr: getattr, "get": _get}


class Given:
    """The parts of the arguments that a trace has read.

    Args:
        facts: What is known of the nodes so far.

    Attributes:
        read: Their paths: the place among the arguments, and the steps from there. True where all that
            the object there holds counts.
    """

    def __init__(self, facts: Mapping[fx.Node, Fact]) -> None:
        self.facts = facts
        self.read: dict[Path, bool] = {}
        self._paths: dict[fx.Node, Path] = {}
        self._covered: set[fx.Node] = set()

    def argument(self, node: fx.Node, place: int) -> None:
        """Notes an argument."""
        self._paths[node] = place, ()
        self._covered.add(node)

    def takes(self, node: fx.Node) -> bool:
        """Whether a node that has run only takes an argument apart (tensors excepted); noted if so."""
        nest = node.args[0] if node.target in _TAKES and node.args else None
        if not isinstance(nest, fx.Node) or nest not in self._paths or len(node.all_input_nodes) > 1:
            return False
        value = self.facts[nest].value
        if isinstance(value, Tensor) or node.kwargs:
            return False
        if nest in self._covered and _covers(value, node):
            self._covered.add(node)
        path = self._beyond(nest, node.target, node.args[1:])
        if node not in self._covered and not self._note(path):
            return False
        self._paths[node] = path
        return True

    def asked(self, node: fx.Node, name: str) -> bool:
        """Notes that an attribute of the node's value was asked for; whether it is part of an argument."""
        return node in self._paths and self._note(self._beyond(node, getattr, (name,)))

    def decides(self, node: fx.Node) -> None:
        """Notes the objects that a node was computed from whose value decides which code runs."""
        todo, seen = [node], set[fx.Node]()
        while todo:
            one = todo.pop()
            if one in seen or one.op == "call_module":
                continue
            seen.add(one)
            value = self.facts[one].value
            if draws_numbers(value):
                raise TraceError("its forward draws random numbers from a generator that it was given")
            if one not in self._paths:
                todo += one.all_input_nodes
            elif not isinstance(value, (Tensor, *PLAIN)):
                self._note(self._paths[one], whole=True)

    def _beyond(self, node: fx.Node, target: Any, rest: tuple[Any, ...]) -> Path:
        place, steps = self._paths[node]
        return place, (*steps, (_TAKES[target], rest))

    def _note(self, path: Path, *, whole: bool = False) -> bool:
        try:
            self.read[path] = whole or self.read.get(path, False)
        except TypeError:  # a slice does not hash
            return False
        return True


def _covers(nest: Any, node: fx.Node) -> bool:
    """Whether the kind of ``nest`` tells that of the part that ``node`` takes."""
    if node.target is getattr:
        return is_dataclass(nest) or (isinstance(nest, tuple) and hasattr(nest, "_fields"))
    return isinstance(nest, (list, tuple, dict))


def argument_names(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Readable, distinct placeholder names for the arguments as called."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = itertools.takewhile(lambda p: p.kind is not inspect.Parameter.VAR_POSITIONAL, parameters)
    names = [parameter.name for parameter in named][: len(args)]
    return [*names, *(f"arg_{place}" for place in range(len(names), len(args))), *kwargs]
