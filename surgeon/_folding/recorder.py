"""Notes the operators that run, and which tensor met which; nothing about a model is known here.

A ``TorchDispatchMode`` sees each call below functionalisation and numbers each tensor by identity. What it
notes of a call is its operator, its arguments, and which values it reads and makes. Three things go beyond:

* *Writes in place* that functionalisation leaves: some operators are taken apart below it, into new memory
  and copies to its parts. All values on the memory written to stand for the content before and after,
  so a call ``surgeon.written`` ties them to the one that was written through.
* *Looks at numbers* (``item()``, ``equal``), which make no tensor: they are calls without outputs.
* *Constants*: tensors that were there before, and where their memory lies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgeon._torch import TorchDispatchMode, pytree
from surgeon._tracing.aten import Family, family, form_only

WRITTEN = "surgeon.written"
"""From the value that was written to, to all others on its memory."""


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the flat list, known by its number."""

    number: int
    shape: tuple[int, ...] = field(compare=False)
    scalable: bool = field(compare=False)
    """Whether it holds real or complex numbers; an integer or a truth value cannot carry a scale."""


@dataclass(frozen=True, slots=True)
class OpCall:
    """One operator call."""

    name: str
    """Namespace and operator, without the overload: ``"aten.convolution"``."""
    arguments: Mapping[str, Any]
    """By the names of the operator's schema, defaults included; tensors stand as ``Value``."""
    inputs: tuple[Value, ...]
    """The tensors among the arguments whose content is read, in order."""
    outputs: tuple[Value, ...]
    """None where Python looked at a number."""
    module: str
    """Name of the module whose ``forward`` was running; empty for the model itself."""
    decides: bool = False
    """Whether values decide what Python gets of it: a number, or a size."""


class Recorder(TorchDispatchMode):
    """Notes every call, with the module that was running."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[OpCall] = []
        self.running: list[str] = []
        self.constants: list[Tensor] = []
        """What was read without having been made or handed in."""
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # an id is only good while its tensor lives
        self._on: dict[int, list[Value]] = {}

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor; one never seen before gets a number here."""
        known = self._values.get(id(tensor))
        if known is None:
            scalable = tensor.is_floating_point() or tensor.is_complex()
            known = Value(len(self._values), tuple(tensor.shape), scalable)
            self._values[id(tensor)] = known
            self._alive.append(tensor)
            self._on.setdefault(_memory(tensor), []).append(known)
        return known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _APART:
            with self:
                return _APART[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.replace("::", ".")
        made = _tensors(result)
        if not made and (family(func) is Family.QUESTIONS or func.namespace == "prim"):
            return result
        given = _by_name(func, args, kwargs or {})
        arguments = {key: self._described(argument) for key, argument in given.items()}
        read = {k: v for k, v in arguments.items() if k != "self"} if form_only(func) else arguments
        if family(func) is Family.STRIDES:  # it reads where it will on the memory
            read = {"memory": list(self._on[_memory(given["self"])])}
        inputs = tuple(leaf for leaf in pytree.tree_leaves(read) if isinstance(leaf, Value))
        written = _written(func, given)
        if inputs or made:
            outputs = tuple(self.value(tensor) for tensor in made or written)
            self._note(name, arguments, inputs, outputs, decides=_decides(func, given))
        for tensor in written:
            self._spread(tensor)
        return result

    def _note(
        self, name: str, arguments: Mapping[str, Any], inputs: Any, outputs: Any, *, decides: bool = False
    ) -> None:
        module = next((name for name in reversed(self.running) if name), "")
        self.calls.append(OpCall(name, arguments, tuple(inputs), tuple(outputs), module, decides))

    def _spread(self, tensor: Tensor) -> None:
        """Tie all values on the memory of a tensor to it, as it was written to."""
        value = self.value(tensor)
        others = [other for other in self._on[_memory(tensor)] if other != value]
        if others:
            self._note(WRITTEN, {"self": value}, (value,), others)

    def _described(self, argument: Any) -> Any:
        return pytree.tree_map(lambda leaf: self._read(leaf) if isinstance(leaf, Tensor) else leaf, argument)

    def _read(self, tensor: Tensor) -> Value:
        """The value of an argument: known, another view of known memory, or a constant."""
        if id(tensor) in self._values:
            return self.value(tensor)
        others = self._on.get(_memory(tensor), ())
        value = self.value(tensor)
        if others:
            self._note("aten.alias", {"self": others[0]}, (others[0],), (value,))
        else:
            self.constants.append(tensor)
        return value


def _gated(value: Tensor, dim: int = -1) -> Tensor:
    value, gate = torch.split(value, value.shape[dim] // 2, dim)
    return value * torch.sigmoid(gate)


_APART = {torch.ops.aten.glu.default: _gated}  # operators that stand for others, whose laws are known


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """What tensors on the same memory have in common; a tensor without memory is alone."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def _written(func: Any, given: Mapping[str, Any]) -> list[Tensor]:
    """The tensors whose content an operator overwrites; a new shape alone (``squeeze_``) does not count."""
    if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return []
    marked = [argument.name for argument in func._schema.arguments if _overwrites(argument)]
    return [tensor for name in marked for tensor in _tensors(given[name])]


def _overwrites(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _decides(func: Any, given: Mapping[str, Any]) -> bool:
    if func is torch.ops.aten.index.Tensor:  # by numbers it has the sizes of these, whatever they are
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(given["indices"]))
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)


def _by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under the names of the operator's schema, with its defaults."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args) and not argument.kwarg_only:
            named[argument.name] = args[position]
        else:
            named[argument.name] = kwargs.get(argument.name, argument.default_value)
    return named
