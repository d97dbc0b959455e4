"""Branches compiled apart, the coin outside: what `surgeon.compile` does for unit ``"batch"``."""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Branch = Callable[..., Tensor]


class Compiler:
    """Compiles branches, each make of them once: equal blocks share a graph, and nothing is compiled anew.

    Args:
        options: Of `torch.compile`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.made: dict[Any, Branch] = {}

    def add(
        self,
        run: Branch,
        own: Sequence[Tensor],
        block: nn.Module,
        shortcut: Tensor,
        factor: Tensor,
        onto: str,
        given: Any,
    ) -> Tensor:
        """``shortcut + factor * run(block, *given)``, compiled.

        PyTorch gives up a piece of code that meets more than a few makes of tensors, without a word. So each
        make has a copy of its own.

        Args:
            run: The branch.
            own: The weights that it uses.
            block: Its block.
            shortcut: What it is added to.
            factor: What it is multiplied by, a scalar.
            onto: ``"branch"`` where the sum is of the branch's type, else ``""``.
            given: What it reads.
        """
        makes = tuple(map(_make, (shortcut, *given, *own)))
        key = (run, makes, torch.is_grad_enabled(), torch.is_autocast_enabled(shortcut.device.type))
        if key not in self.made:
            self.made[key] = torch.compile(_copy(run), **self.options)
        return self.made[key](block, shortcut, factor, onto, *given)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiler":
        return self  # what it has compiled serves a copy of the model as well

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "made": {}}


def _copy(run: Branch) -> Branch:
    """A branch and its sum as a function with code of its own."""

    def add(block: nn.Module, shortcut: Tensor, factor: Tensor, onto: str, *given: Any) -> Tensor:
        result: Tensor = own(block, *given)
        total = shortcut + result * factor.to(result.dtype)
        return total.to(result.dtype) if onto else total

    code = run.__code__
    own = types.FunctionType(code.replace(), run.__globals__, code.co_name)
    return types.FunctionType(add.__code__.replace(), add.__globals__, add.__name__, None, add.__closure__)


def _make(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    return value if isinstance(value, (int, float, bool, str)) else type(value)
