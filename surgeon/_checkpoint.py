"""Checkpoints: what is in one, whether it fits a model, and how one is written.

A surgeon checkpoint is a safetensors file with the model's stock keys and string metadata (model, schedule,
drop rate, scaling, unit, versions), so that stock timm and torchvision models load it. What others have
written is read by `surgeon._container`, and `surgeon._entry` tells which of it is the model's.

Weights of a model gated by the paper's rule need its evaluation scales. A checkpoint notes
them in one of these places: the ``_extra_state`` of blocks gated with ``keep_eval=True``, the metadata that
PyTorch keeps beside a ``state_dict``, the metadata of a safetensors file, and, where other libraries have
saved the weights, ``"surgeon_scales"`` in their file or in the ``config.json`` beside it. `read_weights`
finds them all.
"""

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from surgeon._entry import Entry, find_entry
from surgeon._files import beside, settle
from surgeon._finding.findings import gate_name
from surgeon._gating.block import NOTE, KeepingBlock
from surgeon._gating.gated import is_gated, scales_by_name
from surgeon._meant import says_the_call
from surgeon._text import some
from surgeon._version import __version__
from surgeon.errors import CheckpointError

Path_ = str | os.PathLike[str]

_EXTRA = "_extra_state"
_STATISTICS = ("running_mean", "running_var")


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

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5, scaling="paper")
        >>> path = surgeon.save_checkpoint(model, "gated.safetensors", {"model": "timm:test_resnet"})
        >>> path.name
        'gated.safetensors'
    """
    place = Path(path).resolve()
    held: dict[str, Any] = model.state_dict()
    if other := [key for key, value in held.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"cannot write the checkpoint {path}: a safetensors file holds tensors only, and the state of "
            f"{type(model).__name__} holds something else: {some(other)}. torch.save takes it"
        )
    # A clone per key: safetensors refuses views and shared memory, and tied weights share theirs.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in held.items()}
    noted = description(model, {**(metadata or {}), "format": "pt"})
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


def description(model: nn.Module, metadata: Mapping[str, object]) -> dict[str, str]:
    """What a file of the model's weights has to say: metadata, and which evaluation scales they need."""
    # Gated weights still need their evaluation scales; plain ones must not get them a second time.
    weights = "gated" if is_gated(model) else "plain"
    scales = scales_by_name(model)
    needed = {"scales": scales} if scales else {}
    return strings({**metadata, "weights": weights, "surgeon": __version__, **needed})


def strings(metadata: Mapping[str, object]) -> dict[str, str]:
    """Metadata as safetensors and ONNX keep it: strings as they are, ``None`` left out, the rest as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
        if value is not None
    }


def read_weights(model: nn.Module, path: Path_, wanted: str | None = None) -> Entry:
    """The model's weights in a file or folder of any origin, with the scales that they need in the metadata.

    Args:
        model: The model; it is only read.
        path: The file or folder.
        wanted: The entry to take, see `find_entry`.

    Raises:
        CheckpointError: As `find_entry` has it.
    """
    place = Path(path)
    home = place if place.is_dir() else place.parent
    entry = _renamed(model, find_entry(model, place, wanted), place, home)
    if entry.metadata.keys() & {"scales", "weights"}:
        return entry
    scales = _scales_beside(entry.noted) or _scales_in_config(home)
    noted = strings({"weights": "gated", "scales": scales}) if scales else {}
    return replace(entry, metadata=entry.metadata | noted)


def _renamed(model: nn.Module, entry: Entry, place: Path, home: Path) -> Entry:
    """The entry under the model's present names, where its class has had others and can read them.

    Hugging Face's classes read folders with older names, and write such; ``from_pretrained`` knows which, and
    tells what it has not found.
    """
    read = getattr(type(model), "from_pretrained", None)
    if read is None or model.state_dict().keys() <= entry.state.keys() or not (home / "config.json").exists():
        return entry
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other, told = read(str(home), output_loading_info=True)
        unread = {*told["missing_keys"], *(key[0] for key in told["mismatched_keys"])}
    except Exception:  # noqa: BLE001 - not a folder of this class: the names that do not fit are the message
        return entry
    name = f"{entry.name or place.name}, renamed by {type(model).__name__}.from_pretrained"
    state = {key: tensor for key, tensor in other.state_dict().items() if key not in unread}
    return replace(entry, name=name, state=state, noted=None)


def load_checkpoint(model: nn.Module, path: Path_, wanted: str | None = None) -> Entry:
    """Loads the weights of a checkpoint as they are into a plain model, in place; returns what was loaded.

    Everything is checked first; on an error the model is as it was. Evaluation scales that the weights need
    are in the metadata under ``"scales"``, by gate, as JSON: the caller has to see to them. `surgeon.load`
    does.

    Raises:
        CheckpointError: The file cannot be read or does not fit, see `find_entry` and `check_state`.
    """
    entry = read_weights(model, path, wanted)
    state, scales = split_scales(model, entry.state)
    check_state(model, state, path, entry.metadata.get("model"))
    model.load_state_dict(loadable(model, state, entry.noted))
    if not scales:
        return entry
    noted = json.loads(entry.metadata.get("scales", "{}"))
    needed = strings({"weights": "divided", "scales": {**noted, **scales}})
    return replace(entry, metadata={**entry.metadata, **needed})


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


def _scales_beside(noted: Mapping[str, Mapping[str, Any]] | None) -> dict[str, float]:
    """The scales in the metadata that PyTorch keeps beside a state dict, by gate."""
    return {
        gate_name(block, ordinal): float(scale)
        for block, held in (noted or {}).items()
        for ordinal, scale in held.get(NOTE, ())
    }


def _scales_in_config(home: Path) -> dict[str, float]:
    """The scales in the configuration that Hugging Face's and timm's savers write beside the weights."""
    try:
        config = json.loads((home / "config.json").read_text(encoding="utf-8"))
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
        *([f"{len(missing)} missing: {some(missing)}"] if missing else []),
        *([f"{len(unexpected)} unexpected: {some(unexpected)}"] if unexpected else []),
        *([f"{len(shapes)} of another shape: {some(_shape_lines(shapes, state, own))}"] if shapes else []),
        *([f"{len(types)} of another type: {some(_type_lines(types, state, own))}"] if types else []),
    ]
    if faults:
        hint = _hint(own, state, missing, shapes, trained)
        raise CheckpointError(f"{path} does not fit {kind}: {'; '.join(faults)}. {hint}Nothing was loaded.")
    if bad := non_finite(model, state):
        raise CheckpointError(f"{path} holds values that are not finite: {some(bad)}. Nothing was loaded.")


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


def loadable(
    model: nn.Module, state: Mapping[str, Tensor], noted: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Tensor]:
    """A checked state as ``load_state_dict`` takes it: complete, with the versions of the model's classes.

    PyTorch keeps these beside a state dict, and classes whose weights once had another meaning (torchvision's
    MNASNet) ask for theirs. Where the file has none the model's own are taken.

    Args:
        model: The model that the state is for.
        state: The state; what it may lack is taken from the model.
        noted: What the file has beside it, by module.
    """
    own: Any = model.state_dict()
    full: Any = OrderedDict({**own, **state})
    full._metadata = own._metadata
    if noted is not None:
        full._metadata = {
            name: {key: value for key, value in held.items() if key != NOTE} for name, held in noted.items()
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
