"""Files that are whole or not there: written beside their place, on the disk before they are in it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from surgeon.errors import SurgeonError, UsageError


def write_text(path: Path, text: str) -> Path:
    """Writes the whole file or leaves the old one."""
    return write_file(path, lambda file: file.write(text.encode("utf-8")))


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Writes a file by `write(open file)`; whatever interrupts that leaves the old file whole.

    Raises:
        OSError: If it cannot be written, a full disk for one; no half of it is left.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _settle_names(path.parent)
    return path


def append_line(path: Path, line: str) -> None:
    """Adds a line that is on the disk when this returns."""
    with path.open("ab") as file:
        file.write(line.encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def explained(path: Path, way_out: str) -> Iterator[None]:
    """Says which file could not be written, why, and what to do, whatever library was writing it.

    Raises:
        SurgeonError: In place of an OSError, or of the RuntimeError that torch.save makes of one.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, SurgeonError):
            raise
        cause: Any = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise SurgeonError(f"cannot write {path}: {reason}. {way_out}") from error


class Lock:
    """Keeps a second run out of a folder for as long as this process lives, killed or not."""

    def __init__(self, folder: Path) -> None:
        self.file: IO[str] | None = None
        try:
            import fcntl
        except ImportError:  # Windows: the check for an earlier run has to do
            return
        file = (folder / ".lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise UsageError(
                f"{folder}: another run (process {owner}) writes there now; wait for it, or give output=PATH."
            ) from error
        except OSError:  # a file system without locks
            file.close()
            return
        if os.fstat(file.fileno()).st_nlink == 0:  # its owner has just ended
            file.close()
            self.__init__(folder)  # type: ignore[misc]  # the file that is there now
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self.file = file

    def release(self) -> None:
        if self.file is not None:
            Path(self.file.name).unlink(missing_ok=True)
            self.file.close()
            self.file = None


def _settle_names(folder: Path) -> None:
    """The rename is on the disk, too; not every system lets a folder be opened for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
