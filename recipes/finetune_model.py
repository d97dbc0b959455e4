"""The network of `finetune.py`: made or fetched, and given a head for the classes at hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from finetune_settings import Model
from torch import Tensor, nn

import surgeon
from surgeon._source import check_spec, resolve
from surgeon._text import first_line
from surgeon.errors import CheckpointError, SurgeonError, UsageError


def check_network(config: Model) -> None:
    """Says so at once if there is no such model, before anything is made or fetched.

    Raises:
        UsageError: With the nearest names.
    """
    check_spec(config.name)
    if config.checkpoint is not None and not config.checkpoint.exists():
        raise UsageError(f"model.checkpoint: there is no file {config.checkpoint}")


def load_network(
    config: Model, image_size: int | None = None, say: Callable[[str], None] = lambda _: None
) -> nn.Module:
    """The network that the config names, with published, given or random weights.

    Args:
        config: Which one.
        image_size: Side of the images, for networks of a fixed size.
        say: Is told which weights of a checkpoint were taken.

    Raises:
        SurgeonError: If the model is unknown, or its weights cannot be fetched or do not fit.
    """
    kwargs = {"img_size": image_size} | config.kwargs
    if config.pretrained:
        kwargs |= {"weights": "DEFAULT"} if library(config) == "torchvision" else {"pretrained": True}
    try:
        model = surgeon.load_model(config.name, **kwargs)
        if config.checkpoint is not None:
            say(f"weights    {surgeon.load(model, config.checkpoint, entry=config.entry)}")
    except CheckpointError as error:
        text = str(error).replace("Make the model with num_classes=", "Give model.kwargs.num_classes=")
        raise CheckpointError(text) from error
    except Exception as error:
        reason = _network_failure(error)
        if not config.pretrained or reason is None:
            raise
        raise SurgeonError(
            f"the pretrained weights of {config.name} could not be fetched from {_origin(config.name)} "
            f"({reason}). Check the network; or give a file that you have, model.pretrained=false "
            "model.checkpoint=FILE; model.pretrained=false alone starts from random weights."
        ) from error
    return model


def library(config: Model) -> str:
    """Where the network is from: "timm", "torchvision", or the module of its maker."""
    return resolve(config.name).partition(":")[0]


def fresh_network(
    config: Model,
    image_size: int | None,
    classes: int,
    checkpoint: Path,
    gone: Sequence[str],
    example: Tensor,
) -> nn.Module:
    """A stock network as anybody would make it, without the deleted branches, with a checkpoint's weights."""
    model = load_network(config.model_copy(update={"pretrained": False, "checkpoint": None}), image_size)
    reset_head(model, classes)
    if gone:
        surgeon.prune(model, gone, example=example, inplace=True)
    surgeon.load(model, checkpoint)
    return model


def image_settings(config: Model, model: nn.Module) -> dict[str, Any]:
    """What images the weights were made for, in timm's words; {} where nothing is known."""
    own = dict(getattr(model, "pretrained_cfg", None) or {})
    name = config.name.rpartition(":")[2]
    if library(config) == "torchvision":
        from torchvision.models import get_model_weights

        preset: Any = next((weights.transforms() for weights in get_model_weights(name)), None)
        if hasattr(preset, "crop_size") and hasattr(preset, "resize_size"):
            (crop,), (resize,) = preset.crop_size[:1], preset.resize_size[:1]
            own = {"input_size": (3, crop, crop), "crop_pct": crop / resize}
            own |= {"interpolation": preset.interpolation.value, "mean": preset.mean, "std": preset.std}
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    if channels not in (1, 3):
        raise SurgeonError(
            f"{config.name} takes images of {channels} channels, and pictures have 3, or 1 in grey"
        )
    return own | {"input_size": (channels, *(own.get("input_size") or (3, 224, 224))[1:])}


def reset_head(model: nn.Module, classes: int) -> None:
    """Gives the model a new, randomly initialised classifier for that many classes, in place.

    Raises:
        SurgeonError: If it has neither timm's `reset_classifier` nor a last linear layer.
    """
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is not None:
        reset(classes)
        return
    name, head = _classifier(model)
    if isinstance(head, nn.Linear):
        new: nn.Module = nn.Linear(
            head.in_features, classes, bias=head.bias is not None, dtype=head.weight.dtype
        )
    else:
        new = nn.Conv2d(head.in_channels, classes, 1, bias=head.bias is not None, dtype=head.weight.dtype)
    model.set_submodule(name, new)


def check_output(model: nn.Module, input_size: tuple[int, ...], classes: int) -> None:
    """Runs the model once on zeros: it must give a number for each class.

    Raises:
        SurgeonError: If it does not run on such images, or gives something else.
    """
    kind, training = type(model).__name__, model.training
    example = torch.zeros(2, *input_size, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            found = model.eval()(example)
    except Exception as error:
        raise SurgeonError(
            f"{kind} does not run on images of {'x'.join(map(str, input_size))}: {first_line(error)}. "
            "data.image_size says the size."
        ) from error
    finally:
        model.train(training)
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if shape != (2, classes):
        raise SurgeonError(
            f"{kind} is to tell {classes} classes apart, but gives {shape} for two images instead of "
            f"{(2, classes)}; its last linear layer is no classifier of images"
        )


class Features:
    """What the classifier of a model was last given: one row of features for each image."""

    def __init__(self, model: nn.Module) -> None:
        own: Any = getattr(model, "get_classifier", None)
        head = own() if own is not None else _classifier(model)[1]
        self.last: Tensor | None = None
        self.handle = head.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.last = given[0].flatten(1)

    def take(self) -> Tensor:
        if self.last is None:
            raise SurgeonError("train.distill: the model's forward does not call its classifier")
        taken, self.last = self.last, None
        return taken

    def remove(self) -> None:
        self.handle.remove()


def _classifier(model: nn.Module) -> tuple[str, Any]:
    """The last linear layer, or 1x1 convolution where there is none."""
    named = list(model.named_modules())
    linear = [(name, module) for name, module in named if isinstance(module, nn.Linear)]
    pointwise = [
        (name, module)
        for name, module in named
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    ]
    if not linear and not pointwise:
        raise SurgeonError(f"{type(model).__name__} has no linear layer that could be its classifier.")
    return (linear or pointwise)[-1]


def _network_failure(error: BaseException | None) -> str | None:
    """What the operating system said, if a failed connection is behind the error."""
    said = None
    while error is not None:
        if isinstance(error, OSError):
            said = str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return said


def _origin(name: str) -> str:
    library, _, model = name.partition(":")
    if library == "torchvision":
        from torchvision.models import get_model_weights

        return str(get_model_weights(model).DEFAULT.url)
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(model or name)
    return (
        f"https://huggingface.co/{known.hf_hub_id}"
        if known and known.hf_hub_id
        else getattr(known, "url", "its source")
    )
