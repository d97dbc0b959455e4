"""What a model may be called with if nobody says: what it, its layers and its configuration tell.

No library is known by name. A configuration beside the name of the main input (Hugging Face) tells which
arguments there are; a declared input size (timm) or the usual 3 x 224 x 224 is the shape of an image. Where
the layers contradict that (made for other images or channels), their sizes come next.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import UsageError

Call = tuple[tuple[Any, ...], dict[str, Any]]

_BATCH = 2
_USUAL = (3, 224, 224)
_SIDES = range(512, 31, -32)  # of images for a model that is made for one size and does not tell which
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def candidates(model: nn.Module) -> list[Call]:
    """Arguments that the model may take, the likeliest first; one alone where nothing speaks against it.

    Tensors are on the model's device, numbers with a point in its dtype.

    Raises:
        UsageError: The model has a main input of its own (sound, say) of which no size is known.
    """
    main, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if isinstance(main, str) and config is not None:
        return [((), _like_weights(model, _by_name(model, main, config)))]
    shapes = list(dict.fromkeys(_shapes(model)))
    return [((_like_weights(model, torch.zeros(_BATCH, *shape)),), {}) for shape in shapes]


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of one image: the declared one, then those that the layers speak for."""
    declared = _field(getattr(model, "pretrained_cfg", None), "input_size")
    shape = tuple(declared) if declared else _USUAL
    yield shape
    first = next((m.in_channels for m in model.modules() if isinstance(m, _CONVOLUTIONS)), shape[0])
    channels = list(dict.fromkeys((shape[0], first)))
    own = [side for module in model.modules() if (side := _image_size(module))]
    fixed = bool(_field(getattr(model, "pretrained_cfg", None), "fixed_input_size"))
    sizes = [shape[1:], *dict.fromkeys(own)]
    if fixed and shape[1:] not in own:
        sizes += [(side, side) for side in _SIDES]
    for size in sizes:
        for count in channels:
            yield (count, *size)


def _image_size(module: nn.Module) -> tuple[int, int] | None:
    """The size of images that a module is made for (``img_size`` of a patch embedding)."""
    for name in ("img_size", "image_size"):
        size = module.__dict__.get(name)
        size = (size, size) if isinstance(size, int) else size
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) for n in size):
            return size[0], size[1]
    return None


def _by_name(model: nn.Module, main: str, config: Any) -> dict[str, Any]:
    """Arguments by name, of a model that names its main input and has a configuration."""
    named = [
        name
        for name, one in inspect.signature(model.forward).parameters.items()
        if one.kind != one.VAR_KEYWORD
    ]
    dummies: Any = {}
    with suppress(Exception):  # a property, which may fail for a model that it was not written for
        dummies = getattr(model, "dummy_inputs", None)
    call = {name: value for name, value in dict(dummies or {}).items() if name in named}
    vision = config if _field(config, "image_size") else _field(config, "vision_config")
    size = _field(vision, "image_size")
    if "pixel_values" in named and (main == "pixel_values" or size):
        batch = next((value.shape[0] for value in call.values() if isinstance(value, Tensor)), _BATCH)
        height, width = (size, size) if isinstance(size, int) else tuple(size or _USUAL[1:])
        call["pixel_values"] = torch.zeros(
            batch, _field(vision or config, "num_channels") or 3, height, width
        )
    if main not in call:
        raise UsageError(
            f"{type(model).__name__} takes {main}, of unknown size; give example={{'{main}': ...}}"
        )
    return call


def _field(held: Any, name: str) -> Any:
    return held.get(name) if isinstance(held, Mapping) else getattr(held, name, None)


def _like_weights(model: nn.Module, tree: Any) -> Any:
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return tree
    if isinstance(tree, dict):
        return {name: _like_weights(model, value) for name, value in tree.items()}
    if not isinstance(tree, Tensor):
        return tree
    return tree.to(like.device, like.dtype if tree.is_floating_point() else None)
