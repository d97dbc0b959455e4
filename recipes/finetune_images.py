"""A folder of images as people have them: what is in it, which files are whole, and how each is opened.

Every file is decoded once before training, many at a time; what was found is remembered by size and date, so
that the next run asks for changed files only.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from finetune_files import write_text
from finetune_show import Display
from PIL import Image, ImageOps, UnidentifiedImageError

from surgeon.errors import UsageError

# Suffixes of images; of these Pillow does not read the second line. Other files are counted and passed over.
_READ = ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .avif .tga .qoi"
_UNREAD = ".heic .heif .jxl .svg .psd .raw .dng .cr2 .cr3 .nef .arw .orf"
_SUFFIXES = frozenset(f"{_READ} {_UNREAD}".split())
_CLUTTER = ("__MACOSX", "@eaDir", "lost+found")  # folders that systems leave; so are all with a dot in front

_BYTES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Folder:
    """The images of one split.

    Attributes:
        root: The folder, with one folder below it for each class.
        files: Class name to its files, both in order; a class may have none.
        passed: How many files were no images by their suffix, by suffix.
    """

    root: Path
    files: dict[str, list[Path]]
    passed: Counter[str] = field(default_factory=Counter)


def list_folder(root: Path) -> Folder:
    """What lies in `root/CLASS/...`; names that begin with a dot are passed over."""
    found = Folder(root, {})
    for place in sorted(root.iterdir()):
        if place.is_dir() and not _hidden(place.name):
            found.files[place.name] = sorted(_below(place, found.passed, set()))
    return found


def as_seen(image: Image.Image, channels: int = 3) -> Image.Image:
    """The picture as a viewer shows it: upright, 8 bits a channel, on white where it is transparent.

    16 bits are scaled to 8; `convert("RGB")` alone would cut them off at 255, so that all turns white.
    """
    form = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN or (image.mode == "I" and form in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.mode not in _BYTES:
        raise ValueError(f"its numbers ({image.mode}) have no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def open_image(path: Path, channels: int = 3) -> Image.Image:
    """The picture in a file, `as_seen`.

    Raises:
        UsageError: If it cannot be read; it was whole when it was checked.
    """
    try:
        with Image.open(path) as image:
            return as_seen(image, channels)
    except Exception as error:  # whatever a decoder raises, the file is to be named
        raise UsageError(f"{path} can no longer be read: {error}") from error


def examine(path: Path) -> tuple[str, str]:
    """What is wrong with a file, and what is worth knowing of it; "" where there is nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        return ("is a link to nothing" if path.is_symlink() else f"cannot be opened: {error.strerror}"), ""
    if not head:
        return "is empty", ""
    try:
        with Image.open(path) as image:
            # The second picture of an MPO is a phone's preview or depth map.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            image.seek(0) if frames > 1 else image.draft(None, (1, 1))  # draft: JPEGs decode at an eighth
            image.load()
            as_seen(image)
    except UnidentifiedImageError:
        if path.suffix.lower() in _UNREAD.split():
            return f"is a {path.suffix[1:].upper()}, which Pillow does not read: convert it", ""
        return f"is no image: it begins with {head!r}", ""
    except Exception as error:  # noqa: BLE001 - decoders raise whatever the damage leads to
        truncated = "truncated" in str(error) or isinstance(error, EOFError)
        return "is truncated" if truncated else f"cannot be decoded: {error}", ""
    return "", f"is animated or has several pages: the first of {frames} is used" if frames > 1 else ""


def examine_all(folders: list[Folder], display: Display) -> dict[Path, tuple[str, str]]:
    """`examine` of every file; what is remembered of files that have not changed is not asked again."""
    memory = _Memory(Path(os.path.commonpath([folder.root.resolve() for folder in folders])))
    paths = [path for folder in folders for files in folder.files.values() for path in files]
    found = {path: known for path in paths if (known := memory.recall(path)) is not None}
    new = [path for path in paths if path not in found]
    pool = ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1)))  # decoders let other threads run
    try:
        with display.bar("checking", len(new)) as advance:
            for path, result in zip(new, pool.map(examine, new), strict=True):
                found[path] = result
                memory.note(path, result)
                advance()
    finally:  # an interrupted check is not for nothing
        pool.shutdown(cancel_futures=True)
        memory.save()
    return found


class _Memory:
    """What was found of the files below a folder, by size and date, in the user's cache."""

    def __init__(self, root: Path) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(f"{root} {PIL.__version__} 1".encode()).hexdigest()[:16]
        self.root, self.place = root, home / "surgeon" / f"images-{name}.json"
        try:
            held = json.loads(self.place.read_text(encoding="utf-8"))
            self.files: dict[str, list[Any]] = held if isinstance(held, dict) else {}
        except (OSError, ValueError):
            self.files = {}
        self.new = False

    def recall(self, path: Path) -> tuple[str, str] | None:
        held = self.files.get(str(path))
        if isinstance(held, list) and len(held) == 4 and held[:2] == self._mark(path):
            return str(held[2]), str(held[3])
        return None

    def note(self, path: Path, result: tuple[str, str]) -> None:
        self.files[str(path)], self.new = [*self._mark(path), *result], True

    def save(self) -> None:
        if not self.new:
            return
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.place, json.dumps(self.files))
        except OSError:  # a home that cannot be written costs the next run some time, no more
            return

    @staticmethod
    def _mark(path: Path) -> list[int]:
        try:
            found = path.stat()
        except OSError:
            return [-1, -1]
        return [found.st_size, found.st_mtime_ns]


def sound_folders(folders: list[Folder], broken: str, display: Display) -> list[Folder]:
    """The folders without files that cannot be used; each of these is named.

    Args:
        folders: The training split first.
        broken: "stop" or "skip".
        display: Shows how far the check is, and a line for each thing that a user should know.

    Raises:
        UsageError: If a file is broken, or a class of the first folder has no image, and `broken` is "stop".
    """
    results = examine_all(folders, display)
    faults = [f"{path} {fault}" for path, (fault, _) in results.items() if fault]
    whole = [
        Folder(
            folder.root,
            {name: [path for path in files if not results[path][0]] for name, files in folder.files.items()},
            folder.passed,
        )
        for folder in folders
    ]
    empty = [f"{whole[0].root / name} holds no image" for name, files in whole[0].files.items() if not files]
    if (faults or empty) and broken == "stop":
        listed = "\n  ".join(faults + empty)
        raise UsageError(
            f"{len(faults)} of {len(results)} files are broken, {len(empty)} classes empty; mend or remove "
            f"them, or leave them out with data.broken=skip:\n  {listed}"
        )
    for path, (_, remark) in results.items():
        if remark:
            display.line(f"{path} {remark}")
    for line in faults + empty:
        display.line(f"left out: {line}")
    for folder in folders:
        if folder.passed:
            counted = ", ".join(f"{count} {suffix}" for suffix, count in sorted(folder.passed.items()))
            display.line(f"passed over in {folder.root}, as they are no images by their names: {counted}")
    kept = [name for name, files in whole[0].files.items() if files]
    return [Folder(one.root, {n: f for n, f in one.files.items() if n in kept or f}) for one in whole]


def _below(place: Path, passed: Counter[str], seen: set[str]) -> Iterator[Path]:
    """The images below a folder; links are followed, in circles once."""
    real = os.path.realpath(place)
    if real in seen:
        return
    for path in place.iterdir():
        if _hidden(path.name):
            continue
        if path.is_dir():
            yield from _below(path, passed, {*seen, real})
        elif path.suffix.lower() in _SUFFIXES:
            yield path
        else:
            passed[path.suffix.lower() or "without a suffix"] += 1


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _CLUTTER
