"""The models of both libraries: their names, how to build one, what to call it with."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
import torchvision
from accelerate import init_empty_weights
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from surgeon._tracing.example import inputs

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


def build(entry: Entry, *, device: str, size: int | None = None) -> nn.Module:
    """Builds a model with its own stochastic depth switched on where its builder has such a switch.

    A builder that computes with its initial weights cannot run on the meta device; it is run for real. On
    the CPU weights are filled in afterwards: initialising a billion of them takes minutes.

    Args:
        entry: The model.
        device: ``"meta"`` or ``"cpu"``.
        size: Height and width that a model for one size only is built for, instead of its declared one.
    """
    try:
        if device == "meta":
            with torch.device("meta"):
                return _build(entry, size)
        with init_empty_weights(include_buffers=False):
            model = _build(entry, size)
        return _filled(model)
    except (NotImplementedError, RuntimeError):
        return _build(entry, size).to(device)


def _build(entry: Entry, size: int | None) -> nn.Module:
    if entry.library == "torchvision":
        return _torchvision(entry.name)
    options: dict[str, Any] = {} if size is None else {"img_size": size}
    model: nn.Module
    try:
        model = timm.create_model(entry.name, drop_path_rate=DROP_RATE, **options)
    except TypeError:
        model = timm.create_model(entry.name, **options)
    return model


def _filled(model: nn.Module) -> nn.Module:
    """Gives parameters without memory random numbers, of variance 1 over fan-in; tied ones stay tied.

    Raises:
        NotImplementedError: Buffers have no memory either, and what they should hold is not known.
    """
    stock = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in filled:
                    filled[parameter] = nn.Parameter(_random(parameter, stock), parameter.requires_grad)
                module.register_parameter(name, filled[parameter])
    if any(buffer.is_meta for buffer in model.buffers()):
        raise NotImplementedError("the builder made buffers beside its weights")
    return model


def _random(like: Tensor, stock: Tensor) -> Tensor:
    fan_in = like[0].numel() if like.ndim > 1 and len(like) else 1
    start = like.numel() % 1013  # equal shapes repeat, others do not
    repeated = stock[start:].repeat(like.numel() // (len(stock) - start) + 1)[: like.numel()]
    filled: Tensor = repeated.reshape(like.shape).to(like.dtype) / fan_in**0.5
    return filled


def _torchvision(name: str) -> nn.Module:
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    plain: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        plain["weights_backbone"] = None
    if name.startswith("quantized_") or "quantize" in inspect.signature(builder).parameters:
        plain["quantize"] = False
    model: nn.Module = torchvision.models.get_model(name, **plain)
    if isinstance(getattr(model, "transform", None), GeneralizedRCNNTransform):  # not to 800 pixels
        model.transform.min_size, model.transform.max_size = (160,), 160
    return model


def example(entry: Entry, model: nn.Module, device: str, size: int | None = None) -> Any:
    """What to call a model with; ``None`` where its declared input size says it all."""
    if entry.library == "timm":
        return None if size is None else torch.zeros(2, 3, size, size, device=device)
    package = type(model).__module__
    if "detection" in package:
        return ([torch.zeros(3, 160, 160, device=device)] * 2,)
    if "optical_flow" in package:
        return tuple(torch.zeros(2, 3, 128, 128, device=device) for _ in range(2))
    shape = next((shape for part, shape in _SHAPES if part in f"{package}.{entry.name}"), None)
    return None if shape is None else torch.zeros(2, *shape, device=device)


def small(entry: Entry, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, int]:
    """A model on the CPU with the smallest example of a few that it runs on, and that example's height.

    What is checked on numbers does not depend on the resolution, and a sweep of large images takes days.
    """
    cfg = get_pretrained_cfg(entry.name) if entry.library == "timm" else None
    if cfg is not None:
        for size in (s for s in (64, 96, 112, 128) if s < min(cfg.input_size[-2:])):
            try:
                model = build(entry, device="cpu", size=size if cfg.fixed_input_size else None).to(dtype)
                with torch.no_grad():
                    model.eval()(torch.zeros(2, 3, size, size, dtype=dtype))
            except (TypeError, ValueError, RuntimeError, AssertionError):
                continue
            return model, torch.zeros(2, 3, size, size, dtype=dtype), size
    model = build(entry, device="cpu").to(dtype)
    given = inputs(model, example(entry, model, "cpu"))[0]
    given = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given)
    return model, given, pytree.tree_leaves(given)[0].shape[-1]
