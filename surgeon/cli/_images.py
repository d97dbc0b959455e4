"""Images from a folder, for commands that measure a model."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgeon.cli._subject import Subject
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Measuring:
    """The options that say on which images a model is measured.

    Attributes:
        data: The folder.
        batch_size: Images in a batch.
        limit: At most so many images, spread over all; 0 takes all.
        unlabelled: Whether names of folders are no labels.
    """

    data: str | None
    batch_size: int
    limit: int
    unlabelled: bool


def data_options(body: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of `Measuring`, which the body gets as ``measuring``."""
    options = (
        click.option(
            "--data",
            metavar="FOLDER",
            type=click.Path(),
            help="Images: FOLDER/CLASS/..., or FOLDER/... alone.",
        ),
        click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
        click.option("--limit", type=click.IntRange(min=0), default=1000, show_default=True, help="0: all."),
        click.option("--unlabelled", is_flag=True, help="Folders are no classes: measure agreement."),
    )
    keys = [held.name for held in fields(Measuring)]

    @functools.wraps(body)
    def call(*args: Any, **arguments: Any) -> Any:
        return body(*args, measuring=Measuring(**{k: arguments.pop(k) for k in keys}), **arguments)

    made: Callable[..., Any] = call
    for option in reversed(options):
        made = option(made)
    return made


def batches(measuring: Measuring, subject: Subject) -> list[Any]:
    """The images as batches for `surgeon.lesion`: with labels where the folders say them.

    Images are scaled to the model's size as timm does for evaluation, and normalised by what the checkpoint,
    else the model, says.

    Raises:
        UsageError: There are no images, or their classes are not the model's.
    """
    if measuring.data is None:
        raise UsageError("nothing to measure on; give --data FOLDER, a folder of images")
    root = Path(measuring.data)
    if not root.is_dir():
        raise UsageError(f"--data {root} is no folder")
    files, names = _listed(root)
    if not files:
        raise UsageError(f"there is no image in {root} that can be read")
    labelled = bool(names) and not measuring.unlabelled
    order = _classes(subject, names) if labelled else []
    count = len(files) if not measuring.limit else min(measuring.limit, len(files))
    chosen = [files[i * len(files) // count] for i in range(count)]
    return _batched(chosen, order, _preparation(subject), measuring.batch_size)


def _listed(root: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """Every image with its class, and the classes; none where the images lie in the folder itself."""
    from surgeon import _recipes

    folder = _recipes.load("finetune_images").list_folder(root)
    files = [(path, name) for name, paths in folder.files.items() for path in paths]
    if files:
        return files, [name for name, paths in folder.files.items() if paths]
    images = _recipes.load("finetune_images").list_folder(root.parent).files.get(root.name, [])
    return [(path, "") for path in images], []


def _classes(subject: Subject, names: list[str]) -> list[str]:
    """The classes in the order of the model's outputs."""
    noted = json.loads(subject.metadata.get("classes", "null"))
    outputs = _outputs(subject)
    if isinstance(noted, list):
        unknown = sorted(set(names) - set(noted))
        if unknown:
            raise UsageError(
                f"the folder {unknown[0]!r} is none of the {len(noted)} classes that the checkpoint notes; "
                "give --unlabelled to measure agreement with the whole network"
            )
        return noted
    if outputs is not None and outputs != len(names):
        raise UsageError(
            f"there are {len(names)} folders of images and {outputs} outputs; nothing says which is which: "
            "give a checkpoint that notes its classes, or --unlabelled for agreement with the whole network"
        )
    return sorted(names)


def _outputs(subject: Subject) -> int | None:
    count = getattr(subject.model, "num_classes", None)
    return count if isinstance(count, int) else None


def _preparation(subject: Subject) -> "Callable[[Path], Tensor]":
    """What makes a tensor of a file."""
    import torch
    from torchvision.transforms import v2

    from surgeon import _recipes
    from surgeon._source import normalisation
    from surgeon._tracing.example import default_input

    config = getattr(subject.model, "pretrained_cfg", None) or {}
    example = default_input(subject.model) if subject.example is None else subject.example
    channels, height, width = example.shape[1:]
    told = {key: json.loads(subject.metadata[key]) for key in ("mean", "std") if key in subject.metadata}
    known = {
        **dict(zip(("mean", "std"), _IMAGENET, strict=True)),
        **config,
        **normalisation(subject.spec),
        **told,
    }
    share = float(config.get("crop_pct") or 1.0)
    prepared = v2.Compose(
        [
            v2.Resize((round(height / share), round(width / share)), antialias=True),
            v2.CenterCrop((height, width)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(known["mean"])[:channels], list(known["std"])[:channels]),
        ]
    )
    open_image = _recipes.load("finetune_images").open_image
    return lambda path: prepared(open_image(path, channels))


def _batched(
    files: list[tuple[Path, str]], order: list[str], prepare: "Callable[[Path], Tensor]", size: int
) -> list[Any]:
    import torch

    made = []
    for start in range(0, len(files), size):
        part = files[start : start + size]
        images = torch.stack([prepare(path) for path, _ in part])
        labels = torch.tensor([order.index(name) for _, name in part]) if order else None
        made.append(images if labels is None else (images, labels))
    return made
