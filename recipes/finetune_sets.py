"""Sets of images by name, from torchvision, and those that Hugging Face's `datasets` has saved to a disk."""

from dataclasses import dataclass
from typing import Any

import torchvision.datasets
from finetune_settings import Data
from PIL import Image
from torch.utils.data import ConcatDataset

from surgeon._text import first_line
from surgeon.errors import SurgeonError, UsageError

Splits = tuple[Any, Any, tuple[str, ...]]  # what to train on, what is held out, the names of the classes


@dataclass(frozen=True)
class Known:
    """A set of torchvision.

    Attributes:
        kind: Its class.
        train, test: How the parts of each split are asked for.
        files: What it looks for below the root, and where that is published.
    """

    kind: str
    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]
    files: str


_SVHN, _VGG = "http://ufldl.stanford.edu/housenumbers/", "https://www.robots.ox.ac.uk/~vgg/data"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_MNIST = "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
_FLOWERS = "flowers-102/102flowers.tgz, flowers-102/imagelabels.mat and flowers-102/setid.mat"
_PETS = "oxford-iiit-pet/images.tar.gz and oxford-iiit-pet/annotations.tar.gz"
_SETS = {
    "cifar10": Known(
        "CIFAR10", ({"train": True},), ({"train": False},), f"cifar-10-python.tar.gz of {_CIFAR}"
    ),
    "cifar100": Known(
        "CIFAR100", ({"train": True},), ({"train": False},), f"cifar-100-python.tar.gz of {_CIFAR}"
    ),
    "svhn": Known(
        "SVHN",
        ({"split": "train"},),
        ({"split": "test"},),
        f"train_32x32.mat and test_32x32.mat of {_SVHN}",
    ),
    "svhn_extra": Known(
        "SVHN",
        ({"split": "train"}, {"split": "extra"}),
        ({"split": "test"},),
        f"train_32x32.mat, extra_32x32.mat and test_32x32.mat of {_SVHN}",
    ),
    "fashion_mnist": Known(
        "FashionMNIST",
        ({"train": True},),
        ({"train": False},),
        f"{_MNIST} of https://github.com/zalandoresearch/fashion-mnist",
    ),
    "flowers102": Known(
        "Flowers102",
        ({"split": "train"}, {"split": "val"}),
        ({"split": "test"},),
        f"{_FLOWERS} of {_VGG}/flowers/102/",
    ),
    "pets": Known(
        "OxfordIIITPet", ({"split": "trainval"},), ({"split": "test"},), f"{_PETS} of {_VGG}/pets/"
    ),
    "food101": Known(
        "Food101",
        ({"split": "train"},),
        ({"split": "test"},),
        "food-101.tar.gz of https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
}


def named_set(config: Data) -> Splits:
    """A set of torchvision, fetched if it is not there.

    Raises:
        UsageError: If it cannot be; the message says which file goes where.
    """
    known = _SETS[config.kind]
    train: Any = ConcatDataset([_part(known, how, config) for how in known.train])
    test: Any = ConcatDataset([_part(known, how, config) for how in known.test])
    first = train.datasets[0]
    classes = getattr(first, "classes", None) or [str(digit) for digit in range(10)]  # SVHN names none
    return train, test, tuple(classes)


def saved_set(config: Data) -> Splits:
    """A `DatasetDict` that `save_to_disk` has written to the root.

    Raises:
        UsageError: If there is none, or it lacks the splits or a column of images or classes.
        SurgeonError: If `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise SurgeonError("data.kind=huggingface needs datasets: pip install datasets") from error
    root, names = config.root, (config.train, config.test or "null")
    try:
        held = datasets.load_from_disk(str(root))
    except Exception as error:
        raise UsageError(
            f"data.root: {root} is no data set on disk ({first_line(error)}); write it with "
            "load_dataset(NAME).save_to_disk(PATH), and give data.root=PATH"
        ) from error
    splits = list(held) if isinstance(held, dict) else []
    if missing := [name for name in names if name not in splits]:
        raise UsageError(
            f"data.train, data.test: {root} has no split {missing[0]!r}; there are: "
            f"{', '.join(splits) or 'none'}"
        )
    features = held[config.train].features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = config.label or (labels[0] if len(labels) == 1 else None)
    if not images or label is None or label not in labels:
        raise UsageError(
            f"data.label: {root} has the columns of classes {labels} and of images {images}; name one of "
            "the former"
        )
    train, test = (_Columns(held[name], images[0], label) for name in names)
    return train, test, tuple(features[label].names)


class _Columns:
    """Two columns of a Hugging Face data set."""

    def __init__(self, held: Any, image: str, label: str) -> None:
        self.held, self.image, self.label = held, image, label

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.held[index]
        return row[self.image], row[self.label]


def _part(known: Known, how: dict[str, Any], config: Data) -> Any:
    make, root = getattr(torchvision.datasets, known.kind), config.root
    try:
        return make(str(root), **how)
    except ImportError as error:
        raise SurgeonError(
            f"data.kind={config.kind} needs {error.name}: pip install 'depth-surgeon[recipes]'"
        ) from error
    except (RuntimeError, OSError):  # not there, or not whole
        pass
    try:
        root.mkdir(parents=True, exist_ok=True)
        return make(str(root), **how, download=True)
    except Exception as error:  # whatever a failed download leads to
        raise UsageError(
            f"data.kind={config.kind}: {known.kind} is not whole in {root} and could not be fetched "
            f"({first_line(error)}). Without a network put there: {known.files}. Elsewhere: data.root=PATH."
        ) from error
