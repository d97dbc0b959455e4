"""Copies of models that have run."""

import copy
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from surgeon._torch import pytree


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``, which is only read.

    What a module has computed and kept (LeViT keeps a table of attention biases) may be part of an autograd
    graph, which PyTorch does not copy. The copy gets its numbers. A function that was put on a module
    (``model.forward = torch.compile(model.forward)``) is not copied either, and would go on calling the model
    that it closes over. The copy gets one that calls the copy.
    """
    held = (leaf for module in model.modules() for leaf in pytree.tree_leaves(vars(module)))
    computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    memo: dict[int, Any] = computed
    made = copy.deepcopy(model, memo)
    for module in model.modules():
        for holder in (module, *vars(module).values()):
            if id(holder) in memo and hasattr(holder, "__dict__"):
                _rebind(vars(holder), vars(memo[id(holder)]), memo)
    return made


def _rebind(held: dict[str, Any], twin: dict[str, Any], memo: dict[int, Any]) -> None:
    for name, value in held.items():
        if isinstance(value, FunctionType) and _reaches(value, memo, set()):
            twin[name] = _rebound(value, memo)


def _reaches(value: Any, memo: dict[int, Any], seen: set[int]) -> bool:
    """Whether a value is something of the model that has been copied, or a function that closes over such."""
    if id(value) in memo:
        return True
    if isinstance(value, MethodType):
        return id(value.__self__) in memo
    if not isinstance(value, FunctionType) or id(value) in seen:
        return False
    seen.add(id(value))
    return any(_reaches(part, memo, seen) for part in _parts(value))


def _parts(function: FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return [*cells, *(function.__defaults__ or ()), *vars(function).values()]


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """The same of the copy: a function that closes over its parts; what reaches none is left as it is."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, memo))
    if not isinstance(value, FunctionType) or not _reaches(value, memo, set()):
        return value
    cells = tuple(CellType() for _ in value.__closure__ or ())
    made = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = made  # before what it closes over: it may be itself
    for cell, own in zip(value.__closure__ or (), cells, strict=True):
        if cell != CellType():  # one that is not filled yet
            own.cell_contents = _rebound(cell.cell_contents, memo)
    made.__defaults__ = tuple(_rebound(one, memo) for one in value.__defaults__ or ()) or None
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update({name: _rebound(one, memo) for name, one in vars(value).items()})
    return made
