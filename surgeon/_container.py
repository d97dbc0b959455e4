"""Files and folders in which anybody keeps weights, read as stores: tensors by name. No code in them is run.

A training script puts much beside the weights: optimizers, settings, random states. What is a store follows
from the form alone, a mapping that holds tensors, wherever it is in the file; `surgeon._entry` tells which
one is the model's.

Files of torch are read with ``weights_only=True``. Classes in which scripts keep their settings are let
through by name, as stand-ins that hold what they are given and do nothing; any other class is refused by
name. The index of a ``torch.distributed.checkpoint`` folder is a pickle, too, that may name `_INDEX` only.
"""

import inspect
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from surgeon._gating.block import NOTE
from surgeon._text import first_line
from surgeon.errors import CheckpointError

Tensors = dict[str, Tensor]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar")
_INDEX_FILE = ".metadata"  # of torch.distributed.checkpoint

_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
# Settings of argparse (timm, torchvision), Lightning and OmegaConf (hydra), and what is in them.
_SETTINGS = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "collections": ("defaultdict",),
    "builtins": ("dict", "list", "tuple", "int", "float", "str", "bool"),
    "typing": ("Any",),
    "datetime": ("datetime", "date", "timedelta", "timezone"),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "lightning.pytorch.utilities.parsing": ("AttributeDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy.dtypes": tuple(
        f"{kind}DType" for kind in ("Bool", "Str", "Float32", "Float64", "Int32", "Int64", "UInt8", "UInt32")
    ),
    "torch.torch_version": ("TorchVersion",),
}

# What the index of a torch.distributed.checkpoint folder is made of; types of numbers come to it.
_INDEX = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "collections": ("OrderedDict",),
}


@dataclass(frozen=True, slots=True)
class Store:
    """One mapping of names to tensors.

    Attributes:
        path: Where it is: the file of a folder, then the keys, with dots between. Empty for a whole file.
        tensors: By name; on the meta device where only their shapes have been read.
        other: Names beside them whose values are no tensors, and no nests of such either.
        noted: What PyTorch keeps beside a state dict, by module.
        metadata: What the file says of itself.
        read: Gives the tensors their values.
    """

    path: str
    tensors: Tensors
    other: tuple[str, ...] = ()
    noted: Mapping[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    read: Callable[[Tensors], Tensors] = lambda tensors: tensors


def read_stores(path: str | os.PathLike[str]) -> list[Store]:
    """The stores of a checkpoint, in the order of the file.

    Raises:
        CheckpointError: It is missing, truncated, of another kind, or holds code.
    """
    place = _existing(Path(path))
    if place.is_dir():
        return _of_folder(place)
    return [_of_safetensors(place)] if _is_safetensors(place) else _of_torch(place)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a checkpoint says of itself, as strings; empty where it says nothing.

    Raises:
        CheckpointError: As for `read_stores`.
    """
    stores = read_stores(path)
    return next((store.metadata for store in stores if store.metadata), {})


def _existing(place: Path) -> Path:
    if not place.exists():
        raise CheckpointError(f"cannot read the checkpoint {place}: it does not exist")
    if place.is_file() and place.stat().st_size == 0:
        raise CheckpointError(f"cannot read the checkpoint {place}: the file is empty")
    return place


def _is_safetensors(place: Path) -> bool:
    """By the ending, or by how the file begins: the length of a header, and the header in JSON."""
    if place.suffix == ".safetensors":
        return True
    with place.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _of_safetensors(place: Path, path: str = "") -> Store:
    try:
        with safe_open(place, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {place}: it is truncated or no safetensors file ({error})"
        ) from error
    return Store(path, tensors, metadata=metadata)


def _of_torch(place: Path, path: str = "") -> list[Store]:
    loaded = _load(place)
    metadata = _said(loaded) if isinstance(loaded, Mapping) else {}
    return [
        Store(".".join(filter(None, (path, inner))), tensors, other, noted, metadata)
        for inner, tensors, other, noted in _mappings(loaded, "", set())
    ]


def _mappings(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, Tensors, tuple[str, ...], Any]]:
    """Every mapping that holds a tensor, with its path; a pickle may hold itself."""
    if id(value) in above or not isinstance(value, Mapping | list | tuple):
        return
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    if isinstance(value, Mapping):
        tensors = {str(key): held for key, held in items if isinstance(held, Tensor)}
        nests = (Tensor, Mapping, list, tuple)
        if tensors:
            other = tuple(str(key) for key, held in items if not isinstance(held, nests))
            yield path, tensors, other, getattr(value, "_metadata", None)
    for key, held in items:
        yield from _mappings(held, f"{path}.{key}".lstrip("."), above | {id(value)})


def _said(loaded: Mapping[Any, Any]) -> dict[str, str]:
    """What a file of torch says of its model: metadata of surgeon, or the settings of a training script."""
    own = loaded.get("metadata")
    if isinstance(own, Mapping) and all(isinstance(text, str) for text in (*own, *own.values())):
        return dict(own)
    if isinstance(scales := loaded.get(NOTE), Mapping):
        return {"weights": "gated", "scales": json.dumps(scales)}
    settings = getattr(loaded.get("args"), "__dict__", {})
    name, arguments = settings.get("model", loaded.get("arch")), settings.get("model_kwargs")
    if not isinstance(name, str):
        return {}
    made = {**arguments} if isinstance(arguments, Mapping) else {}
    if isinstance(classes := settings.get("num_classes"), int):
        made["num_classes"] = classes
    return {"model": name, **({"model_args": json.dumps(made)} if made else {})}


class _StandIn:
    """In place of an object of a known class: nothing of that class is imported."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update(state)


class _DictStandIn(_StandIn):
    """In place of a kind of dict; PyTorch fills none but plain ones."""

    def __new__(cls, *_: Any) -> Any:
        return {}


def _stand_ins() -> list[Any]:
    return [
        type(name, (_DictStandIn if name.lower().endswith("dict") else _StandIn,), {"__module__": module})
        for module, names in _SETTINGS.items()
        for name in names
    ]


def _load(place: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins()):
            warnings.simplefilter("ignore")  # Hints on how to load what is refused here.
            mapped = zipfile.is_zipfile(place)  # what nobody asks for is not read then
            return torch.load(place, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # Files of torch are zip archives, or, from before version 1.6, pickles.
        with place.open("rb") as file:
            first_bytes = file.read(2)
        if first_bytes == b"PK" or first_bytes[:1] == b"\x80":
            raise CheckpointError(_refused(place, str(error))) from error
        raise CheckpointError(f"cannot read the checkpoint {place}: it is no file of torch") from error
    except Exception as error:  # A spoiled pickle ends in whatever error its bytes lead to.
        raise CheckpointError(
            f"cannot read the checkpoint {place}: it is truncated or no file of torch ({first_line(error)})"
        ) from error


def _refused(place: Path, said: str) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", said)
    what = f" ({named[1]})" if named else ""
    return (
        f"will not read the checkpoint {place}: it holds more than tensors{what}, and loading it could run "
        "code from it. Where you trust that, let it through with torch.serialization.add_safe_globals, or "
        "load the file yourself and save the state_dict as safetensors."
    )


def _of_folder(folder: Path) -> list[Store]:
    """The stores of what is in a folder: of the first of these that is there.

    A checkpoint of torch.distributed in the folder itself, files of safetensors, files of torch, checkpoints
    of torch.distributed one level below.
    """
    if (folder / _INDEX_FILE).is_file():
        return [_of_distributed(folder)]
    passed: list[CheckpointError] = []  # optimizers and random states may be what is refused
    for suffixes in (WEIGHTS[:1], WEIGHTS[1:]):
        files = sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())
        if stores := _of_files(files, _shards(folder), passed):
            return stores
    if below := sorted(place.parent for place in folder.glob(f"*/{_INDEX_FILE}")):
        return [_of_distributed(one, one.name) for one in below]
    if passed:
        raise passed[0]
    raise CheckpointError(
        f"cannot use the folder {folder}: there are no weights in it, neither a file that ends in "
        f"{', '.join(WEIGHTS)} nor a checkpoint of torch.distributed"
    )


def _of_files(files: list[Path], shards: Mapping[str, str], passed: list[CheckpointError]) -> list[Store]:
    """The stores of several files; shards of one whole are one store, without what a missing one held."""
    stores: list[Store] = []
    whole: dict[str, Store] = {}
    for file in files:
        try:
            safe = file.suffix == WEIGHTS[0]
            found = [_of_safetensors(file, file.name)] if safe else _of_torch(file, file.name)
        except CheckpointError as error:
            passed.append(error)
            continue
        if file.name not in shards:
            stores += found
            continue
        for one in found:
            index = shards[file.name]
            joined = whole.setdefault(index, Store(index, {}, metadata=one.metadata))
            joined.tensors.update(one.tensors)
    return [*whole.values(), *stores]


def _shards(folder: Path) -> dict[str, str]:
    """The index that names a file as one of its shards, by the name of the file."""
    found: dict[str, str] = {}
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            found |= {str(name): index.name for name in names}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"cannot read {index}: it is no index of shards ({first_line(error)})"
            ) from error
    return found


class _UnknownError(Exception):
    """Something is named that no index needs."""


class _Index(pickle.Unpickler):
    """Reads the index of a torch.distributed.checkpoint folder; PyTorch would read it with all it names."""

    def find_class(self, module: str, name: str) -> Any:
        number = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if number or name in _INDEX.get(module, ()):
            return super().find_class(module, name)
        raise _UnknownError(f"GLOBAL {module}.{name}")


def _of_distributed(folder: Path, path: str = "") -> Store:
    place = folder / _INDEX_FILE
    try:
        with place.open("rb") as file:
            index = _Index(file).load()
        tensors = {
            name: torch.empty(held.size, dtype=held.properties.dtype, device="meta")
            for name, held in index.state_dict_metadata.items()
            if hasattr(held, "size")
        }
    except _UnknownError as error:
        raise CheckpointError(_refused(place, str(error))) from error
    except Exception as error:  # A spoiled pickle ends in whatever error its bytes lead to.
        raise CheckpointError(
            f"cannot read the checkpoint {place}: it is damaged ({first_line(error)})"
        ) from error
    return Store(path, tensors, read=lambda wanted: _values(folder, index, wanted))


def _values(folder: Path, index: Any, wanted: Tensors) -> Tensors:
    """The values of tensors of a torch.distributed.checkpoint folder, read in this process alone."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return index

    values = {name: torch.empty_like(tensor, device="cpu") for name, tensor in wanted.items()}
    alone = {"no_dist": True} if "no_dist" in inspect.signature(load).parameters else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            load(values, storage_reader=Reader(folder), **alone)
    except (CheckpointException, Exception) as error:  # the former, which a missing file leads to, is none
        raise CheckpointError(
            f"cannot read the checkpoint {folder}: a file of it is missing or damaged ({first_line(error)})"
        ) from error
    return values
