"""The example a model is recorded on: what the user gave, or what the model says of its own input."""

import logging
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from surgeon._torch import FAKE_LOG, FakeTensorMode, pytree
from surgeon._tracing.default import Call, candidates
from surgeon._tracing.nests import tensors
from surgeon._tracing.undisturbed import undisturbed
from surgeon.errors import UsageError

Example = Tensor | tuple[Any, ...] | Mapping[str, Any] | None


def inputs(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turns an example into positional and keyword arguments; the model is only read.

    Args:
        model: The model that will be called.
        example: A tensor (the only argument), a tuple of positional arguments or a mapping of keyword
            arguments. ``None`` takes what the model tells of its input (timm, Hugging Face, or the sizes
            that its layers are made for), else a batch of two images of 3 x 224 x 224.

    Raises:
        UsageError: The example is of another type, or there is none and the model tells of no size.
    """
    if example is None:
        return default_call(model)
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


def default_call(model: nn.Module) -> Call:
    """The likeliest arguments that the model runs on; it is only asked where there is a doubt."""
    calls = candidates(model)
    if len(calls) == 1 or any(map(nn.parameter.is_lazy, model.parameters())):
        return calls[0]
    return next((call for call in calls if _runs(model, *call)), calls[0])


def default_input(model: nn.Module) -> Tensor:
    """The first tensor of `default_call`."""
    return tensors(default_call(model))[0]


def _runs(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether the model takes these arguments, in evaluation on fake tensors; it is left as it was."""
    untold = mock.patch.object(logging.getLogger(FAKE_LOG), "disabled", new=True)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with undisturbed(model, training=False), untold, torch.no_grad(), fake:
            args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, (args, kwargs))
            model(*args, **kwargs)
    except Exception:  # noqa: BLE001 - whatever the forward of another size raises
        return False
    return True
