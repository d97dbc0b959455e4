"""Whose fault an exception is: the forward's that was looked at, or surgeon's own.

A forward may raise anything, and that is an answer. A name of PyTorch's that is gone is none: it must not
read as "this block has no residual add".
"""

import inspect
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch import NUMBERS_ASKED

_HOUSE = Path(__file__).resolve().parents[1]
# Proxies answer for the values behind them, also that a value has no such attribute.
_ANSWERS = {"proxy.py"}


def is_internal(error: BaseException) -> bool:
    """Whether surgeon's own code asked for a name that is not there."""
    return isinstance(error, (AttributeError, NameError, ImportError)) and _is_ours(error.__traceback__)


def _is_ours(trace: TracebackType | None) -> bool:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    return path.is_relative_to(_HOUSE) and path.name not in _ANSWERS


def asks_numbers(error: BaseException) -> bool:
    """Whether code wanted to know the numbers in a tensor, which a fake one has not."""
    return isinstance(error, NUMBERS_ASKED)


def failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception | None) -> str:
    """What to say of a model that could not be run on the example."""
    takes = ", ".join(str(p) for p in list(inspect.signature(type(model).forward).parameters.values())[1:])
    shapes = ", ".join(
        [_brief(a) for a in args] + [f"{name}={_brief(value)}" for name, value in kwargs.items()]
    )
    return (
        f"{type(model).__name__} could not be run on the example ({shapes}): "
        f"{type(error).__name__}: {error}. {_unready(model)}"
        f"Its forward takes ({takes}); give an example it accepts: "
        "example=tensor, example=(a, b) or example={'name': value}"
    )


def _unready(model: nn.Module) -> str:
    """What must be done to the model first; ``""`` if nothing is known."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and nn.parameter.is_lazy(tensor):
            return f"{name} is lazy and has no shape yet: call the model once on real data first. "
        if isinstance(tensor, Tensor) and tensor.is_quantized:
            return f"{name} is quantized: put the gates in before the model is quantized. "
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name} is TorchScript, which cannot be looked into: use the module it was made of. "
        if any(isinstance(value, torch.ScriptObject) for value in module.__dict__.values()):
            return f"{name} holds packed weights: put the gates in before the model is quantized. "
    return ""


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__
