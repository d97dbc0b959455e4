"""Checkpoints: what is in one, whether it fits a model, and how one is written.

A surgeon checkpoint is a safetensors file with the model's stock keys and string metadata (model, schedule,
drop rate, scaling, unit, versions), so that stock timm and torchvision models load it. Files of torch are
read with ``weights_only=True``: no code in them is ever run.

Weights of a model gated by the paper's rule need its evaluation scales. A checkpoint notes
them in one of these places: the ``_extra_state`` of blocks gated with ``keep_eval=True``, the metadata that
PyTorch keeps beside a ``state_dict``, the metadata of a safetensors file, and, where other libraries have
saved the weights, ``"surgeon_scales"`` in their file or in the ``config.json`` beside it. `read_state` finds
them all.
"""

import json
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from surgeon._files import beside, settle
from surgeon._finding.findings import gate_name
from surgeon._gating.block import NOTE, KeepingBlock
from surgeon._gating.gated import is_gated, scales_by_name
from surgeon._meant import says_the_call
from surgeon._text import first_line
from surgeon._version import __version__
from surgeon.errors import CheckpointError

Path_ = str | os.PathLike[str]

# In timm's order of preference: averaged weights before raw ones.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
_EXTRA = "_extra_state"
_STATISTICS = ("running_mean", "running_var")
_SHOWN = 4


@says_the_call
def save_checkpoint(model: nn.Module, path: Path_, metadata: Mapping[str, object] | None = None) -> Path:
    """Writes the model's weights and string metadata to a safetensors file; the model is only read.

    Tensors that share memory are written once per key, so that every stock key is there. The file
    appears in one step: an interruption leaves the old file, or none.

    Args:
        model: The model; its ``state_dict`` keys are written as they are.
        path: The file; an existing one is replaced.
        metadata: What to remember: ``model``, ``schedule``, ``drop_rate``, ``scaling``, ``unit``, ...
            Strings are kept, ``None`` is left out, anything else is written as JSON. Added are ``weights``,
            ``"gated"`` or ``"plain"``, the evaluation scale of each gate that has one, and surgeon's version.

    Returns:
        The absolute path of the file.

    Raises:
        CheckpointError: The file cannot be written, or the model's state holds something that is no tensor.
    """
    place = Path(path).resolve()
    held: dict[str, Any] = model.state_dict()
    if other := [key for key, value in held.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"cannot write the checkpoint {path}: a safetensors file holds tensors only, and the state of "
            f"{type(model).__name__} holds something else: {_some(other)}. torch.save takes it"
        )
    # A clone per key: safetensors refuses views and shared memory, and tied weights share theirs.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in held.items()}
    # Gated weights still need their evaluation scales; plain ones must not get them a second time.
    weights = "gated" if is_gated(model) else "plain"
    scales = scales_by_name(model)
    own = {"weights": weights, "surgeon": __version__, "format": "pt"}
    noted = strings({**(metadata or {}), **own, **({"scales": scales} if scales else {})})
    try:
        with beside(place) as folder:
            made = folder / place.name
            made.touch()
            mode = made.stat().st_mode  # as the umask has it; safetensors makes a file of mode 0600
            safetensors.torch.save_file(state, made, noted)
            made.chmod(mode)
            settle(made, place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error
    return place


def strings(metadata: Mapping[str, object]) -> dict[str, str]:
    """Metadata as safetensors and ONNX keep it: strings as they are, ``None`` left out, the rest as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
        if value is not None
    }


def read_metadata(path: Path_) -> dict[str, str]:
    """The string metadata of a checkpoint; empty for files of torch, which carry none.

    Raises:
        CheckpointError: The file is missing or is no safetensors file although it is named one.
    """
    place = _existing(path)
    return _read_safetensors(place, tensors=False)[1] if place.suffix == ".safetensors" else {}


def read_state(path: Path_) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, freed from nesting in a training checkpoint, and the metadata.

    Raises:
        CheckpointError: The file is missing, truncated, of another kind, holds code, or holds no tensors.
    """
    place = _existing(path)
    if place.suffix == ".safetensors":
        state, metadata = _read_safetensors(place, tensors=True)
        scales = {} if metadata.keys() & {"scales", "weights"} else _scales_in_config(place)
    else:
        loaded = _read_torch(place)
        held = _unnest(loaded)
        state, metadata = _tensors_only(held, place), {}
        noted = loaded.get(NOTE) if isinstance(loaded, Mapping) else None
        scales = _scales_beside(held) or noted or _scales_in_config(place)
    return state, metadata | (strings({"weights": "gated", "scales": scales}) if scales else {})


def load_checkpoint(model: nn.Module, path: Path_) -> dict[str, str]:
    """Loads the weights of a checkpoint as they are into a plain model, in place; returns the metadata.

    Everything is checked first; on an error the model is as it was. Evaluation scales that the weights need
    are in the metadata under ``"scales"``, by gate, as JSON: the caller has to see to them. `surgeon.load`
    does.

    Raises:
        CheckpointError: The file cannot be read or does not fit, see `read_state` and `check_state`.
    """
    read, metadata = read_state(path)
    prefix = wrapper_prefix(model, read)
    state, scales = split_scales(model, without_prefix(read, prefix))
    check_state(model, state, path, metadata.get("model"))
    model.load_state_dict(loadable(model, state, read, prefix))
    if not scales:
        return metadata
    noted = json.loads(metadata.get("scales", "{}"))
    return {**metadata, **strings({"weights": "divided", "scales": {**noted, **scales}})}


def split_scales(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Takes the notes of ``keep_eval=True`` out of a state: the weights, and the scale of each gate by name.

    A class of the model may have an extra state of its own; that stays where it is.
    """
    rest, scales = dict(state), dict[str, float]()
    modules = dict(model.named_modules())
    for key in [key for key in state if key.rpartition(".")[2] == _EXTRA]:
        block = key.removesuffix(_EXTRA).removesuffix(".")
        own = type(modules.get(block, model)).get_extra_state
        table = state[key]
        if own in (nn.Module.get_extra_state, KeepingBlock.get_extra_state) and table.shape[1:] == (2,):
            scales |= {gate_name(block, int(l)): scale for l, scale in table.tolist() if scale != 1.0}
            del rest[key]
    return rest, scales


def _scales_beside(held: Any) -> dict[str, float]:
    """The scales in the metadata that PyTorch keeps beside a state dict, by gate."""
    found = {}
    for block, noted in dict(getattr(held, "_metadata", {})).items():
        for ordinal, scale in noted.get(NOTE, ()) if isinstance(noted, Mapping) else ():
            found[gate_name(block, ordinal)] = float(scale)
    return found


def _scales_in_config(place: Path) -> dict[str, float]:
    """The scales in the configuration that Hugging Face's and timm's savers write beside the weights."""
    try:
        config = json.loads((place.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    homes = [config, config.get("pretrained_cfg")] if isinstance(config, dict) else []
    noted = [home["surgeon_scales"] for home in homes if isinstance(home, dict) and "surgeon_scales" in home]
    return noted[0] if noted else {}


def check_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: Path_,
    trained: str | None = None,
    own: Mapping[str, Tensor] | None = None,
) -> None:
    """Checks that a state fits a model: the same keys and shapes, no `non_finite` value; nothing is changed.

    Args:
        model: The model that the state is for.
        state: Tensors by name.
        path: The file they come from, for the message.
        trained: What the file says it holds, for the message.
        own: What to compare with in place of the model's whole state.

    Raises:
        CheckpointError: Keys are missing or unexpected, shapes differ, there are whole or complex numbers in
            place of real ones or the other way round, or values are NaN or wrongly infinite.
    """
    whole = model.state_dict() if own is None else own
    own = {key: value for key, value in whole.items() if isinstance(value, Tensor)}
    # Old files lack this counter, and nothing depends on it.
    missing = [key for key in whole if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    types = [key for key in own if key in state and not _holds(own[key], state[key])]
    kind = type(model).__name__
    faults = [
        *([f"{len(missing)} missing: {_some(missing)}"] if missing else []),
        *([f"{len(unexpected)} unexpected: {_some(unexpected)}"] if unexpected else []),
        *([f"{len(shapes)} of another shape: {_some(_shape_lines(shapes, state, own))}"] if shapes else []),
        *([f"{len(types)} of another type: {_some(_type_lines(types, state, own))}"] if types else []),
    ]
    if faults:
        hint = _hint(own, state, missing, shapes, trained)
        raise CheckpointError(f"{path} does not fit {kind}: {'; '.join(faults)}. {hint}Nothing was loaded.")
    if bad := non_finite(model, state):
        raise CheckpointError(f"{path} holds values that are not finite: {_some(bad)}. Nothing was loaded.")


def non_finite(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a model's state with NaN, or infinities that cannot be meant, and how many they hold.

    A buffer may be infinite on purpose, as masks and the bounds of a clamp are; running statistics may not.
    """
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    found = []
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        meant = name in buffers and not name.endswith(_STATISTICS)
        if count := int((tensor.isnan() if meant else ~tensor.isfinite()).sum()):
            found.append(f"{name} ({count} of {tensor.numel()})")
    return found


def _existing(path: Path_) -> Path:
    place = Path(path)
    if not place.is_file():
        what = "is a directory" if place.is_dir() else "does not exist"
        raise CheckpointError(f"cannot read the checkpoint {path}: it {what}")
    if place.stat().st_size == 0:
        raise CheckpointError(f"cannot read the checkpoint {path}: the file is empty")
    return place


def _read_safetensors(place: Path, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(place, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {place}: it is truncated or no safetensors file ({error})"
        ) from error
    if tensors and not state:
        raise CheckpointError(f"cannot use the checkpoint {place}: it holds no tensors")
    return state, metadata


def _read_torch(place: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hints on how to load what is refused here.
            return torch.load(place, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Files of torch are zip archives, or, from before version 1.6, pickles.
        with place.open("rb") as file:
            first_bytes = file.read(2)
        if first_bytes == b"PK" or first_bytes[:1] == b"\x80":
            raise CheckpointError(
                f"will not read the checkpoint {place}: it holds more than tensors, and loading it could run "
                "code from it. Load it where you trust it, and save the state_dict as safetensors."
            ) from error
        raise CheckpointError(f"cannot read the checkpoint {place}: it is no file of torch") from error
    except Exception as error:  # A spoiled pickle ends in whatever error its bytes lead to.
        raise CheckpointError(
            f"cannot read the checkpoint {place}: it is truncated or no file of torch ({first_line(error)})"
        ) from error


def _unnest(loaded: Any) -> Any:
    for key in _NESTS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            return loaded[key]
    return loaded


def _tensors_only(loaded: Any, place: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(
            f"cannot use the checkpoint {place}: it holds a {type(loaded).__name__} and no tensors by name, "
            f"neither at its top nor under {', '.join(_NESTS)}"
        )
    other = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(f"cannot use the checkpoint {place}: not all of it are tensors: {_some(other)}")
    found: Any = OrderedDict((str(key), value) for key, value in loaded.items())
    found._metadata = getattr(loaded, "_metadata", None)
    tensors: dict[str, Tensor] = found
    return tensors


def wrapper_prefix(model: nn.Module, names: Iterable[str]) -> str:
    """What a wrapper (DDP, a weight average, Lightning) has put in front of every name, if that fits better.

    A prefix comes off only where every key has it; a model may have a child that is called ``module``.
    """
    own = model.state_dict().keys()
    # AveragedModel counts beside its module.
    names = [name for name in names if name != "n_averaged" or name in own]
    best, prefix = "", ""
    most = sum(name in own for name in names)
    while found := _shared(names):
        prefix += found
        names = [name.removeprefix(found) for name in names]
        if (count := sum(name in own for name in names)) > most:
            best, most = prefix, count
    return best


def _shared(names: list[str]) -> str:
    """The part before the first dot, with the dot, if it is the same in all names."""
    first = names[0].partition(".")[0] + "." if names else ""
    return first if first and all(name.startswith(first) for name in names) else ""


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What of a state is under a prefix, by its name without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def loadable(
    model: nn.Module, state: Mapping[str, Tensor], read: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """A checked state as ``load_state_dict`` takes it: complete, with the versions of the model's classes.

    PyTorch keeps these beside a state dict, and classes whose weights once had another meaning (torchvision's
    MNASNet) ask for theirs. Where the file has none the model's own are taken.

    Args:
        model: The model that the state is for.
        state: The state; what it may lack is taken from the model.
        read: As `read_state` gave it.
        prefix: What a wrapper has put in front of the names in ``read``.
    """
    own: Any = model.state_dict()
    full: Any = OrderedDict({**own, **state})
    full._metadata, noted = own._metadata, getattr(read, "_metadata", None)
    if isinstance(noted, Mapping):
        full._metadata = {
            f"{name}."[len(prefix) : -1]: {key: value for key, value in held.items() if key != NOTE}
            for name, held in noted.items()
            if f"{name}.".startswith(prefix) and isinstance(held, Mapping)
        }
    tensors: dict[str, Tensor] = full
    return tensors


def _shape_lines(keys: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    return [f"{key} is {_shape(state[key])}, the model's is {_shape(own[key])}" for key in keys]


def _type_lines(keys: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    return [f"{key} is {_type(state[key])}, the model's is {_type(own[key])}" for key in keys]


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _holds(own: Tensor, given: Tensor) -> bool:
    """Whether a tensor can hold these numbers; those of one kind may be stored more or less precisely.

    Whole ones may come as real ones (counters in averages of checkpoints), real ones not as whole ones.
    """
    if own.is_floating_point() or own.is_complex() or given.is_complex():
        return (own.is_floating_point(), own.is_complex()) == (given.is_floating_point(), given.is_complex())
    return not given.is_floating_point() or bool((given == given.round()).all())


def _hint(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    shapes: list[str],
    trained: str | None,
) -> str:
    if len(missing) + len(shapes) > len(own) // 2:
        return f"It holds {f'the model {trained}' if trained else 'another architecture'}. "
    heads = [key for key in shapes if own[key].shape[1:] == state[key].shape[1:]]
    sizes = {state[key].shape[0] for key in heads if state[key].ndim}
    if not missing and len(heads) == len(shapes) and len(sizes) == 1:
        return f"Make the model with num_classes={sizes.pop()}. "
    return ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
