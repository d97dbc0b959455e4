"""The network of `finetune.py`: made or fetched, and given a head for the classes at hand."""

from pathlib import Path
from typing import Any

from finetune_config import Model
from torch import nn

import surgeon
from surgeon.errors import SurgeonError


def load_network(config: Model) -> nn.Module:
    """The network that the config names, with published, given or random weights.

    Raises:
        SurgeonError: If the model is unknown, or its weights cannot be fetched or do not fit.
    """
    kwargs = dict(config.kwargs)
    if config.pretrained:
        kwargs |= {"weights": "DEFAULT"} if config.name.startswith("torchvision:") else {"pretrained": True}
    try:
        return surgeon.load_model(config.name, checkpoint=config.checkpoint, **kwargs)
    except Exception as error:
        reason = _network_failure(error)
        if not config.pretrained or reason is None:
            raise
        raise SurgeonError(
            f"the pretrained weights of {config.name} could not be fetched from {_origin(config.name)} "
            f"({reason}). Check the network; or give a file that you have: model.pretrained=false "
            "model.checkpoint=FILE."
        ) from error


def fresh_network(config: Model, classes: int, checkpoint: Path) -> nn.Module:
    """A stock network as anybody would make it, with the weights of a checkpoint."""
    return surgeon.load_model(config.name, checkpoint=checkpoint, **{**config.kwargs, "num_classes": classes})


def reset_head(model: nn.Module, classes: int) -> None:
    """Gives the model a new, randomly initialised classifier for that many classes, in place.

    Raises:
        SurgeonError: If it has neither timm's `reset_classifier` nor a last linear layer.
    """
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is not None:
        reset(classes)
        return
    heads = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise SurgeonError(f"{type(model).__name__} has no linear layer that could be its classifier.")
    name, head = heads[-1]
    new = nn.Linear(head.in_features, classes, bias=head.bias is not None, dtype=head.weight.dtype)
    model.set_submodule(name, new)


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
