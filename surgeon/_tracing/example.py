"""The example a model is recorded on: what the user gave, or what the model says of its own input."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import UsageError

Example = Tensor | tuple[Any, ...] | Mapping[str, Any] | None

_BATCH = 2
_DEFAULT_SIZE = (3, 224, 224)


def inputs(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turns an example into positional and keyword arguments; the model is only read.

    Args:
        model: The model that will be called.
        example: A tensor (the only argument), a tuple of positional arguments or a mapping of keyword
            arguments. ``None`` makes a batch of two zeros of the size in ``model.pretrained_cfg``
            (timm), else 3 x 224 x 224, in the model's own dtype and on its device.

    Raises:
        UsageError: The example is of another type.
    """
    if example is None:
        return (default_input(model),), {}
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise UsageError(
        f"example is a {type(example).__name__}; give a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments"
    )


def default_input(model: nn.Module) -> Tensor:
    """A batch of two zeros of the input size that the model declares, else 3 x 224 x 224."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    shape = tuple(size) if size else _DEFAULT_SIZE
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype, device = (torch.float32, torch.device("cpu")) if like is None else (like.dtype, like.device)
    return torch.zeros(_BATCH, *shape, dtype=dtype, device=device)
