"""The models of both libraries: their names, how to build one, what to call it with."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
import torchvision
from torch import nn

DROP_RATE = 0.3
# By a part of the module's or the model's name; torchvision's models do not say what they take.
_SHAPES = (
    ("video.mvit", (3, 16, 224, 224)),
    ("video.s3d", (3, 16, 224, 224)),
    ("models.video", (3, 16, 112, 112)),
    ("inception", (3, 299, 299)),
)


@dataclass(frozen=True)
class Entry:
    """One model: its library and its name there."""

    library: str
    name: str

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"


def entries(library: str | None, match: Sequence[str]) -> list[Entry]:
    """Every model of timm and torchvision whose name matches one of some glob patterns."""
    names = {"torchvision": torchvision.models.list_models(), "timm": timm.list_models()}
    wanted = [library] if library else list(names)
    return [
        Entry(lib, name) for lib in wanted for name in names[lib] if any(fnmatchcase(name, m) for m in match)
    ]


def build(entry: Entry, *, device: str) -> nn.Module:
    """Builds a model with its own stochastic depth switched on where its builder has such a switch.

    A builder that computes with its initial weights cannot run on the meta device; it is run for real.
    """
    try:
        return _build(entry, device)
    except (NotImplementedError, RuntimeError):
        return _build(entry, "cpu").to(device)


def _build(entry: Entry, device: str) -> nn.Module:
    with torch.device(device):
        if entry.library == "torchvision":
            return _torchvision(entry.name)
        try:
            return timm.create_model(entry.name, drop_path_rate=DROP_RATE)
        except TypeError:
            return timm.create_model(entry.name)


def _torchvision(name: str) -> nn.Module:
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    plain: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        plain["weights_backbone"] = None
    if name.startswith("quantized_") or "quantize" in inspect.signature(builder).parameters:
        plain["quantize"] = False
    return torchvision.models.get_model(name, **plain)


def example(entry: Entry, model: nn.Module, device: str) -> Any:
    """What to call a model with; ``None`` where its declared input size says it all."""
    if entry.library == "timm":
        return None
    package = type(model).__module__
    if "detection" in package:
        return ([torch.zeros(3, 320, 320, device=device)] * 2,)
    if "optical_flow" in package:
        return tuple(torch.zeros(2, 3, 128, 128, device=device) for _ in range(2))
    shape = next((shape for part, shape in _SHAPES if part in f"{package}.{entry.name}"), None)
    return None if shape is None else torch.zeros(2, *shape, device=device)
