"""Where a result file goes: checked before any work, written beside its place and renamed into it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgeon.errors import UsageError

_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


def destination(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The absolute path of a file that may be written; nothing is changed.

    Links are followed, so that a later rename replaces the file that the link names.

    Raises:
        UsageError: The path is a directory or no regular file, it exists and may not be overwritten, or
            its directory is missing or not writable.
    """
    try:
        place = Path(path).resolve()
        there = place.is_dir()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise UsageError(f"cannot write {path}: {error}") from error
    if str(path).endswith(_SEPARATORS) and not there:
        raise UsageError(f"cannot write {path}: there is no such directory; make it first, and name a file")
    if there:
        raise UsageError(f"{path} is a directory; name a file in it")
    if not place.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no directory {place.parent}; make it first")
    if place.exists():
        _check_existing(place, path, overwrite=overwrite)
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: the directory {place.parent} is not writable")
    return place


def _check_existing(place: Path, path: str | os.PathLike[str], *, overwrite: bool) -> None:
    if not place.is_file():
        raise UsageError(f"cannot write {path}: it is not a regular file")
    if not overwrite:
        raise UsageError(
            f"{path} exists; pass overwrite=True (--overwrite) to replace it, or name another file"
        )
    if not os.access(place, os.W_OK):
        raise UsageError(f"cannot write {path}: the file is read-only")


@contextmanager
def beside(place: Path) -> Iterator[Path]:
    """A temporary directory next to ``place``, on the same file system; removed at the end.

    A file made there is renamed into place in one step. Whatever interrupts the work before that leaves
    nothing under the final name.
    """
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
        yield Path(folder)


def settle(made: Path, place: Path) -> None:
    """Renames a finished file into its place, its bytes on the disk first; an existing file is replaced."""
    with made.open("rb+") as file:
        os.fsync(file.fileno())
    made.replace(place)
