"""What decides which code the forward of a block runs: looked at in each call, to tell whether a trace holds.

A trace finds out what that is: attributes that were read, parts of arguments, values that the code names in
its file and its closures, the grad and autocast mode. A `Key` is the list of these; `Key.of` is what they are
now. Two calls for which that is equal run the same code.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from surgeon._tracing.state import ambient, attribute, kind, state

# Where a part of the arguments is: the number of one argument, and what is accessed from there.
Access = tuple[Callable[..., Any], tuple[Any, ...]]
Path = tuple[int, tuple[Access, ...]]


@dataclass(frozen=True, slots=True)
class Variable:
    """Where a value lies beside modules: in a file or a cell of a closure, or where names lead from there."""

    holder: Any
    names: tuple[str, ...]

    def value(self) -> Any:
        """What lies there now; None if it is gone."""
        first, *rest = self.names
        file = isinstance(self.holder, dict)
        found = self.holder.get(first) if file else getattr(self.holder, first, None)
        for name in rest:
            found = getattr(found, name, None)
        return found

    def __str__(self) -> str:
        return ".".join(self.names)


@dataclass(frozen=True, slots=True)
class Key:
    """What decides which code runs.

    Attributes:
        exact: Numbers among the arguments do, and whole shapes of tensors instead of ranks.
        ambient: The grad and autocast mode does.
        attributes: Names of attributes of the block and its children, dotted, that do.
        given: Paths of the parts of arguments that do; True where all that an object holds counts.
        variables: Where other values lie that do.
    """

    exact: bool = False
    ambient: bool = False
    attributes: tuple[str, ...] = ()
    given: Mapping[Path, bool] = field(default_factory=dict)
    variables: tuple[Variable, ...] = ()

    def __or__(self, other: "Key") -> "Key":
        """What decides for one of two traces of a block."""
        variables = {(id(one.holder), one.names): one for one in (*self.variables, *other.variables)}
        given = {path: whole or self.given.get(path, False) for path, whole in other.given.items()}
        return Key(
            self.exact or other.exact,
            self.ambient or other.ambient,
            tuple(sorted({*self.attributes, *other.attributes})),
            {**self.given, **given},
            tuple(variables.values()),
        )

    def portable(self) -> "Key":
        """The same without variables, which are no good in another process."""
        return replace(self, variables=())

    def of(
        self, block: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """What all that is in one call; ``forward`` is the function that the block runs."""
        return (
            block.training,
            self.way(args, kwargs),
            tuple([state(attribute(block, name)) for name in self.attributes]) if self.attributes else (),
            ambient() if self.ambient else None,
            (forward, _missing(block)),
            # A compiler would guard on whole files: for it they are as they were when the trace was made.
            tuple([state(one.value()) for one in self.variables])
            if self.variables and not torch.compiler.is_compiling()
            else (),
        )

    @staticmethod
    def compiled(key: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a compiler sees of what `of` gives: all but the variables outside of modules."""
        return (*key[:5], (), *key[6:])

    def way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The part of that which the arguments have."""
        return (
            tuple([kind(value, self.exact) for value in args]),
            tuple([(name, kind(value, self.exact)) for name, value in kwargs.items()]) if kwargs else (),
            self._kinds(args, kwargs) if self.given else (),
        )

    def _kinds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        values = [*args, *kwargs.values()]
        found = [(_reached(values, path), whole) for path, whole in self.given.items()]
        return tuple([state(value) if whole else kind(value, self.exact) for value, whole in found])


def _missing(block: nn.Module) -> tuple[str, ...]:
    """The children, weights and buffers of a block that are None, which code asks for first."""
    children, weights, buffers = block._modules, block._parameters, block._buffers
    missing = [name for name, value in children.items() if value is None]
    if weights or buffers:  # most blocks have none of their own
        missing += [name for one in (weights, buffers) for name, value in one.items() if value is None]
    return tuple(missing)


class _Absent(Enum):
    ABSENT = 0


def _reached(values: list[Any], path: Path) -> Any:
    place, steps = path
    try:
        value = values[place]
        for take, rest in steps:
            value = take(value, *rest)
    except Exception:  # noqa: BLE001 - what an object says instead of a missing part is its own affair
        return _Absent.ABSENT
    return value
