"""Writes a graph as the file that was asked for, in a folder of its own, and moves it into its place."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from surgeon._files import settle
from surgeon._onnx.file import Runtime, runtime

# An ONNX file is one protobuf message, which ends at 2 GB; the graph itself needs some of that.
ONE_FILE_LIMIT = 2**31 - 2**27

_Step = Callable[[Runtime, Path, str | None], None]


def write(graph: ir.Model, folder: Path, place: Path, *, dtype: str, optimize: str | None) -> str | None:
    """Writes a graph into ``folder`` under the name of ``place``.

    Args:
        graph: The graph, in float32.
        folder: Where to write.
        place: Where the file goes afterwards.
        dtype: ``"float32"`` or ``"float16"``.
        optimize: ONNX Runtime's level of optimisation; None for none.

    Returns:
        The name of the file beside it that holds the weights, if there is one.

    Raises:
        OSError: The disk is full, or the like.
        OnnxFileError: ONNX Runtime cannot do what was asked.
    """
    stored = [value.const_value for value in graph.graph.initializers.values()]
    weights = sum(tensor.nbytes for tensor in stored if tensor is not None)
    made = folder / place.name
    data = _data_name(place, weights)
    ir.save(graph, made, external_data=data)
    if dtype == "float16":
        weights //= 2
        data = _again(made, _data_name(place, weights), lambda run, into, beside: run.halve(into, beside))
    if optimize is not None:
        data = _again(
            made,
            _data_name(place, weights),
            lambda run, into, beside: run.open(level=optimize, optimized=str(into), data=beside),
        )
    return data


def _again(made: Path, data: str | None, step: _Step) -> str | None:
    """Replaces a file by what a step makes of it."""
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        into = Path(folder) / made.name
        with runtime(made) as process:
            step(process, into, data)
        for old in made.parent.iterdir():
            if old.is_file():
                old.unlink()
        for new in Path(folder).iterdir():
            new.replace(made.with_name(new.name))
    # Small weights stay in the graph, so there may be nothing beside it.
    return data if data is not None and made.with_name(data).exists() else None


def _data_name(place: Path, weights: int) -> str | None:
    """A name for the weights that no file has: the old graph reads the old weights until it is replaced."""
    if weights <= ONE_FILE_LIMIT:
        return None
    first = f"{place.name}.data"
    later = (f"{place.name}.{number}.data" for number in range(1, 1000))
    return next(name for name in (first, *later) if not (place.parent / name).exists())


def move(made: Path, data: str | None, place: Path) -> None:
    """Renames a file and its weights into their place, weights first; those of the file it replaces go."""
    beside = place.parent.glob(f"{place.name}.*data") if place.exists() else ()
    stale = [old for old in beside if _is_ours(old, place)]
    if data is not None:
        settle(made.with_name(data), place.with_name(data))
    settle(made, place)
    for old in stale:
        old.unlink()


def _is_ours(old: Path, place: Path) -> bool:
    number = old.name.removeprefix(f"{place.name}.").removesuffix("data").removesuffix(".")
    return number == "" or number.isdigit()
