"""Finds the model that a MODEL string names.

``timm:NAME`` and ``torchvision:NAME`` name a model of these libraries, ``recipes:NAME`` a network of a paper
(`recipes/models`), ``package.module:callable`` anything importable that returns a module. A bare NAME is
looked up in the first three; one that two of them have is refused with both spellings, because their models
of one name differ in keys, defaults and training.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from surgeon._meant import did_you_mean, nearest, says_the_call
from surgeon._needs import need
from surgeon._recipes import models
from surgeon.errors import UsageError

LIBRARIES = ("timm", "torchvision", "recipes")


@says_the_call
def load_model(
    spec: str, *, checkpoint: str | Path | None = None, img_size: int | None = None, **kwargs: Any
) -> nn.Module:
    """Makes the model that ``spec`` names, with random weights or those of a checkpoint.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, ``recipes:NAME``, ``package.module:callable``, or a bare
            name that only one of the three has. Modules are also looked for in the current directory.
        checkpoint: A safetensors file or a file of torch to load; see `surgeon.load`.
        img_size: Side of the square images, in pixels, for models of fixed size (ViT, Swin, ...); models that
            take any size are made without it.
        kwargs: Passed to whatever makes the model, as ``num_classes=10``.

    Raises:
        UsageError: The name is unknown or ambiguous, or the model cannot be made with these arguments.
        CheckpointError: The checkpoint cannot be read or does not fit.

    Example:
        >>> import surgeon
        >>> model = surgeon.load_model("timm:test_resnet", num_classes=10)
        >>> surgeon.load_model("timm:test_resnett")
        Traceback (most recent call last):
        surgeon.errors.UsageError: timm has no model 'test_resnett'. Did you mean timm:test_resnet...
    """
    spec = resolve(spec)
    make = _maker(spec)
    try:
        model = make(**kwargs) if img_size is None else _made_for_size(make, img_size, kwargs)
    except Exception as error:  # Whatever a foreign constructor raises, the user gets the name with it.
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise UsageError(f"cannot make {spec}({given}): {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} returned a {type(model).__name__}; it must return a torch.nn.Module")
    if checkpoint is not None:
        from surgeon._load import load

        load(model, checkpoint)
    return model


def resolve(spec: str) -> str:
    """The full spelling of a MODEL string: ``"densenet_cifar"`` becomes ``"timm:densenet_cifar"``.

    Raises:
        UsageError: A bare name is in none of the libraries, with the nearest names, or in two.
    """
    if ":" in spec:
        return spec
    need(f"{spec!r}, a name without its library,", "timm", "torchvision")
    homes = [library for library in LIBRARIES if _has(library, spec)]
    if len(homes) == 1:
        return f"{homes[0]}:{spec}"
    if homes:
        spellings = " or ".join(f"{library}:{spec}" for library in homes)
        raise UsageError(f"{spec} is a model of {' and of '.join(homes)}, and they differ; write {spellings}")
    close = [f"{library}:{name}" for library in LIBRARIES for name in nearest(spec, names(library), 3)]
    raise UsageError(
        f"there is no model {spec!r} in timm, torchvision or recipes. {did_you_mean(close)}"
        "MODEL is timm:NAME, torchvision:NAME, recipes:NAME or package.module:callable."
    )


def check_spec(spec: str) -> None:
    """Checks that there is a model of that name; none is made.

    Raises:
        UsageError: The name is unknown or ambiguous, with the nearest names.
    """
    _maker(resolve(spec))


def names(library: str) -> list[str]:
    """All model names of ``"timm"``, ``"torchvision"`` or ``"recipes"``."""
    if library == "recipes":
        return list(models())
    if library == "timm":
        return list(_library("timm").list_models(include_tags=False))
    return list(_library("torchvision").models.list_models())


def normalisation(spec: str) -> dict[str, list[float]]:
    """Mean and standard deviation of the images that a torchvision model was trained on; empty where unknown.

    Models of timm carry theirs in ``pretrained_cfg``.
    """
    library, _, name = spec.partition(":")
    if library != "torchvision":
        return {}
    for weights in _library("torchvision").models.get_model_weights(name):
        preset = weights.transforms()
        if hasattr(preset, "mean") and hasattr(preset, "std"):
            return {"mean": list(preset.mean), "std": list(preset.std)}
    return {}


def _made_for_size(make: Callable[..., Any], size: int, kwargs: dict[str, Any]) -> Any:
    # timm and own models; torchvision's ViT; torchvision's MaxViT.
    for named in ({"img_size": size}, {"image_size": size}, {"input_size": (size, size)}):
        try:
            return make(**kwargs, **named)
        except TypeError as error:
            if "keyword argument" not in str(error):
                raise
    return make(**kwargs)


def _has(library: str, name: str) -> bool:
    if library == "timm":
        return bool(_library("timm").is_model(name))
    return name in names(library)


def _library(name: str) -> Any:
    need(f"a model of {name}", name)
    return importlib.import_module(name)


def _maker(spec: str) -> Callable[..., Any]:
    home, _, name = spec.partition(":")
    if home in LIBRARIES:
        if not _has(home, name):
            close = [f"{home}:{near}" for near in nearest(name, names(home), 3)]
            raise UsageError(f"{home} has no model {name!r}. {did_you_mean(close)}".rstrip())
        return _library_maker(home, name)
    return _imported(home, name)


def _library_maker(library: str, name: str) -> Callable[..., Any]:
    if library == "recipes":
        return models()[name]
    if library == "timm":
        timm = _library("timm")
        return lambda **kwargs: timm.create_model(name, **{"pretrained": False, **kwargs})
    torchvision = _library("torchvision")
    # Without this a segmentation or detection model fetches the weights of its backbone.
    fixed = {"weights": None}
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
        fixed["weights_backbone"] = None
    return lambda **kwargs: torchvision.models.get_model(name, **{**fixed, **kwargs})


def _imported(module: str, name: str) -> Callable[..., Any]:
    with _current_directory_importable():
        try:
            found: Any = importlib.import_module(module)
        except ImportError as error:
            libraries = f" Known prefixes: {', '.join(f'{library}:' for library in LIBRARIES)}."
            raise UsageError(
                f"cannot import {module!r} for the model {module}:{name}: {error}.{libraries}"
            ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            close = nearest(part, [key for key in dir(found) if not key.startswith("_")], 3)
            raise UsageError(f"{module} has no {name!r}. {did_you_mean(close)}".rstrip())
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise UsageError(
            f"{module}:{name} is a {type(found).__name__}; name a function or class that makes a model"
        )
    made: Callable[..., Any] = found
    return made


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """An installed command does not see the modules beside the user; ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
