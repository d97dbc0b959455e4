"""The images of `finetune.py`: a folder of yours, a set by name, scikit-learn's digits, or made-up ones.

`find_images` looks for them, and for what is wrong with them, before a model is made; `prepare_images` then
scales and augments them as the model expects.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetune_images import Folder, as_seen, list_folder, open_image, sound_folders
from finetune_sets import named_set, saved_set
from finetune_settings import Data
from finetune_show import Display
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import transforms

from surgeon.errors import SurgeonError, UsageError

Pairs = Sequence[tuple[Any, int]]  # an image, and the number of its class


@dataclass(frozen=True)
class Images:
    """Two splits of images, and what a user of the model must know of them.

    Attributes:
        train, test: Pairs of an image and the number of its class.
        classes: The names of the classes.
        known: How an image becomes an input, in timm's words: `input_size`, `interpolation`, `mean`, `std`,
            `crop_pct`, `crop_mode`.
    """

    train: Any
    test: Any
    classes: tuple[str, ...]
    known: dict[str, Any]

    @property
    def input_size(self) -> tuple[int, int, int]:
        channels, height, width = self.known["input_size"]
        return channels, height, width

    def mark(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        return {"train": len(self.train), "test": len(self.test), "classes": list(self.classes)}


def find_images(config: Data, display: Display) -> Images:
    """The images that the config names, as they are: pictures, or tensors that are inputs already.

    Raises:
        UsageError: If they are not there and cannot be fetched, or some are broken; the message says which.
    """
    match config.kind:
        case "digits":
            return _digits(config)
        case "fake":
            return _fake(config)
        case "folder":
            return _folder(config, display)
        case "huggingface":
            return Images(*saved_set(config), {})
    return Images(*named_set(config), {})


def prepare_images(images: Images, config: Data, own: dict[str, Any], seed: int) -> Images:
    """The same images as the model expects them, those of the training split augmented.

    What is drawn for an image depends on the seed, the epoch and its number alone: neither on the number of
    processes that load images, nor on what was drawn before.

    Args:
        images: As `find_images` gave them.
        config: What is asked for.
        own: What the model's weights expect, in timm's words.
        seed: Of the augmentations.
    """
    if images.known:
        return images
    known = _known(config, own)
    channels = known["input_size"][0]
    evaluating = create_transform(**known)
    return replace(
        images,
        train=Prepared(images.train, channels, _augmenting(config, known), seed),
        test=Prepared(images.test, channels, evaluating),
        known=known,
    )


def first_classes(images: Images, count: int) -> Images:
    """The same images, without the classes from `count` on."""

    def keep(split: Any) -> Subset[Any]:
        return Subset(split, [index for index, target in enumerate(_targets(split)) if target < count])

    return replace(images, train=keep(images.train), test=keep(images.test), classes=images.classes[:count])


def set_epoch(images: Images, epoch: int) -> None:
    """Says which epoch's augmentations come next."""
    split = images.train.dataset if isinstance(images.train, Subset) else images.train
    if isinstance(split, Prepared):
        split.epoch = epoch


class Prepared(Dataset[Any]):
    """Pictures as inputs of a model."""

    def __init__(
        self, pairs: Any, channels: int, transform: Callable[[Image.Image], Tensor], seed: int | None = None
    ) -> None:
        self.pairs, self.channels, self.transform = pairs, channels, transform
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.pairs[index]
        image = as_seen(image, self.channels)
        if self.seed is None:
            return self.transform(image), target
        with _drawing(zlib.crc32(f"{self.seed} {self.epoch} {index}".encode())):
            return self.transform(image), target


class Files:
    """The pictures of a folder, in order."""

    def __init__(self, files: list[Path], targets: list[int]) -> None:
        self.files, self.targets = files, targets

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.files[index]), self.targets[index]


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Draws follow from the seed meanwhile; the coins of the gates, drawn outside, do not notice."""
    state, own = random.getstate(), torch.get_rng_state()
    numbers = np.random.get_state()  # noqa: NPY002 - where timm draws
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.random.set_rng_state(own)


def _known(config: Data, own: dict[str, Any]) -> dict[str, Any]:
    """How an image becomes an input: as the config says, else as the model's weights expect."""
    channels, *size = own.get("input_size") or (3, 224, 224)
    side = [config.image_size] * 2 if config.image_size else size
    names = ("mean", "std", "crop_pct", "interpolation")
    given: dict[str, Any] = {name: getattr(config, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("mean", "std"):
        if len(given.get(name, ())) not in (0, 1, channels):
            raise UsageError(f"data.{name}: {len(given[name])} numbers for images of {channels} channels")
    others: dict[str, Any] = {name: given[name] for name in names[2:] if name in given}
    others["input_size"] = (channels, *side)
    known: dict[str, Any] = resolve_data_config(others, pretrained_cfg=own)
    for name in ("mean", "std"):
        values = given.get(name) or known[name]
        known[name] = tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
    return known


def _augmenting(config: Data, known: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    if config.crop == "resized":
        made: Callable[[Image.Image], Tensor] = create_transform(
            **known,
            is_training=True,
            hflip=config.flip,
            auto_augment=config.auto_augment,
            re_prob=config.erase,
        )
        return made
    side = known["input_size"][1:]
    mode = transforms.InterpolationMode(known["interpolation"])
    steps = [
        transforms.Resize(side, mode),
        *([transforms.RandomCrop(side, max(side) // 8)] if config.crop == "padded" else []),
        transforms.RandomHorizontalFlip(config.flip),
        transforms.ToTensor(),
        transforms.Normalize(known["mean"], known["std"]),
        *([RandomErasing(config.erase, device="cpu")] if config.erase else []),
    ]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


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
    known = {"input_size": (1, size, size), "mean": (mean,), "std": (std,), "crop_pct": 1.0}
    return Images(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        tuple("0123456789"),
        {**known, "interpolation": "bilinear", "crop_mode": "center"},
    )


def _fake(config: Data) -> Images:
    """Random pictures in random classes, the same in every run: enough to see that a setup works."""
    draw = np.random.default_rng(0)
    side = (config.image_size or 224) + 16

    def split() -> Pairs:
        pixels = draw.integers(0, 256, (min(config.samples, 16), side, side, 3), dtype=np.uint8)
        pictures = [Image.fromarray(one) for one in pixels]
        return [(pictures[n % len(pictures)], n % config.classes) for n in range(config.samples)]

    return Images(split(), split(), tuple(str(index) for index in range(config.classes)), {})


def _folder(config: Data, display: Display) -> Images:
    """`root/train/CLASS/...` and `root/val/CLASS/...`."""
    names = {"data.train": config.train} | ({"data.test": config.test} if config.test is not None else {})
    for key, name in names.items():
        if not (config.root / name).is_dir():
            raise UsageError(_no_folder(key, config.root, config.root / name))
    folders = [list_folder(config.root / name) for name in names.values()]
    if not folders[0].files:
        raise UsageError(f"data.train: {folders[0].root} has no folders of classes; {_LAYOUT}")
    train, *held_out = sound_folders(folders, config.broken, display)
    classes = tuple(train.files)
    if not classes:
        raise UsageError(f"data.train: {train.root} holds no image that can be used; {_LAYOUT}")
    if not held_out:
        return Images(*_parted(train, config.test_share), classes, {})
    (test,) = held_out
    if train.files.keys() != test.files.keys():
        differ = sorted(train.files.keys() ^ test.files.keys())
        raise UsageError(
            f"data.root={config.root}: the splits must hold the same classes, or their numbers would mean "
            f"different ones; only in one of {config.train} and {config.test}: {', '.join(differ[:5])}."
        )
    if not any(test.files.values()):
        raise UsageError(f"data.test: {test.root} holds no image that can be used; {_LAYOUT}")
    return Images(_files(train.files), _files(test.files), classes, {})


_LAYOUT = "expected CLASS/IMAGE below it"


def _no_folder(key: str, root: Path, folder: Path) -> str:
    """What is there instead; the two usual mistakes have their remedy."""
    text = f"{key}: there is no folder {folder}; expected {folder}/CLASS/IMAGE. "
    there = sorted(place.name for place in root.iterdir() if place.is_dir()) if root.is_dir() else []
    there = [name for name in there if not name.startswith(".")]
    if not there:
        return text + "Say where with data.root=PATH."
    listed = f"{root} holds {', '.join(there[:6])}{', ...' if len(there) > 6 else ''}"
    return text + (
        f"{listed}. If these are the splits, name them: data.train=NAME data.test=NAME. If they are the "
        "classes: data.train=. data.test=null holds a share of each out (data.test_share)."
    )


def _files(by_class: dict[str, list[Path]]) -> Files:
    pairs = [(path, number) for number, files in enumerate(by_class.values()) for path in files]
    return Files([path for path, _ in pairs], [number for _, number in pairs])


def _parted(folder: Folder, share: float) -> tuple[Files, Files]:
    """A share of each class, at least one image, held out; always the same."""
    train, test = {}, {}
    for name, files in folder.files.items():
        if len(files) < 2:
            raise UsageError(f"data.test: {folder.root / name} has one image only, and none can be held out")
        order = random.Random(0).sample(files, len(files))  # noqa: S311 - no secret
        count = min(len(files) - 1, max(1, round(share * len(files))))
        test[name], train[name] = sorted(order[:count]), sorted(order[count:])
    return _files(train), _files(test)


def _targets(split: Any) -> list[int]:
    """The classes of a split, without opening its pictures where that can be done."""
    if isinstance(split, Prepared) and isinstance(split.pairs, Files):
        return split.pairs.targets
    return [int(target) for _, target in split]
