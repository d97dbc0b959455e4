"""The images of `finetune.py`: a folder of your own, scikit-learn's digits, or random ones for a test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetune_config import Data
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from surgeon.errors import SurgeonError, UsageError


@dataclass(frozen=True)
class Images:
    """Two splits of (image, class index) pairs, normalised, and what a user of the model must know."""

    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_images(config: Data) -> None:
    """Says so at once if the folders are not there, before anything is fetched.

    Raises:
        UsageError: If a split has no folder.
    """
    for key, name in (("data.train", config.train), ("data.test", config.test)):
        folder = config.root / name
        if config.kind == "folder" and not folder.is_dir():
            raise UsageError(
                f"{key}: there is no folder {folder}; expected {folder}/CLASS/IMAGE. "
                "Say where with data.root=PATH."
            )


def load_images(config: Data, model: nn.Module) -> Images:
    """The images that the config names, prepared as the model expects them."""
    match config.kind:
        case "digits":
            return _digits(config)
        case "fake":
            return _fake(config)
        case "folder":
            return _folder(config, model)


def first_classes(images: Images, count: int) -> Images:
    """The same images, without the classes from `count` on."""

    def keep(split: Dataset[Any]) -> Subset[Any]:
        targets = [int(target) for _, target in split]  # type: ignore[attr-defined]  # every split has a length
        return Subset(split, [index for index, target in enumerate(targets) if target < count])

    return Images(
        keep(images.train),
        keep(images.test),
        images.classes[:count],
        images.input_size,
        images.mean,
        images.std,
    )


def _digits(config: Data) -> Images:
    """1797 handwritten digits of 8 x 8 pixels that scikit-learn ships, enlarged; one fixed split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        cure = "pip install 'depth-surgeon[recipes]'"
        raise SurgeonError(f"data.kind=digits needs scikit-learn: {cure}") from error
    size = config.image_size or 32
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    train, test = train_test_split(
        range(len(targets)), test_size=config.test_share, stratify=targets, random_state=0
    )
    mean, std = images[train].mean().item(), images[train].std().item()
    images, labels = (images - mean) / std, torch.tensor(targets)
    return Images(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        tuple("0123456789"),
        (1, size, size),
        (mean,),
        (std,),
    )


def _fake(config: Data) -> Images:
    """Random images in random classes, the same in every run: enough to see that a setup works."""
    size = config.image_size or 32
    generator = torch.Generator().manual_seed(0)

    def split() -> TensorDataset:
        images: Tensor = torch.randn(config.samples, config.channels, size, size, generator=generator)
        return TensorDataset(images, torch.arange(config.samples) % config.classes)

    names = tuple(str(index) for index in range(config.classes))
    zeros, ones = (0.0,) * config.channels, (1.0,) * config.channels
    return Images(split(), split(), names, (config.channels, size, size), zeros, ones)


def _folder(config: Data, model: nn.Module) -> Images:
    """`root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`, as large as the model's weights expect."""
    wanted = {"img_size": config.image_size} if config.image_size else {}
    known: dict[str, Any] = resolve_data_config(wanted, model=model)
    augment = {"is_training": True, "auto_augment": config.auto_augment, "re_prob": config.erase}
    train = _split(config.root / config.train, "data.train", create_transform(**known | augment))
    test = _split(config.root / config.test, "data.test", create_transform(**known))
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise UsageError(
            f"data.root={config.root}: the splits must hold the same classes, or their numbers would mean "
            f"different ones; only in one of {config.train} and {config.test}: {', '.join(differ[:5])}."
        )
    return Images(train, test, tuple(train.classes), known["input_size"], known["mean"], known["std"])


def _split(folder: Path, key: str, transform: Any) -> ImageFolder:
    try:
        return ImageFolder(str(folder), transform=transform)
    except FileNotFoundError as error:
        raise UsageError(f"{key}: {folder} is not an image folder: {error}") from error
