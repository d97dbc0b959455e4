"""What a run of `finetune.py` leaves behind while it trains: its numbers, and the state to go on from."""

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from finetune_config import dump_config
from finetune_files import Lock, append_line, explained, write_file, write_text
from finetune_settings import Config
from pydantic import ValidationError
from torch import nn

from surgeon._checkpoint import description
from surgeon.errors import SurgeonError, UsageError

# What may differ between a run and its continuation: where things are, how it runs, how long, what it writes.
MAY_CHANGE = (
    *("output", "device", "threads", "resume", "overwrite", "compare", "deliver", "log"),
    *("data.root", "data.workers", "data.broken", "train.epochs", "train.patience"),
)
# What a run writes, and another one in its place replaces.
_OWN = (
    *(
        "last.pt",
        "best.pt",
        "metrics.jsonl",
        "config.yaml",
        "env.json",
        "report.json",
        "report.md",
        "README.md",
    ),
    *(
        "pruned.json",
        "model.safetensors",
        "model.onnx",
        "config.json",
        "survival.png",
        "curves.png",
        "probe.png",
    ),
    *("ungated/last.pt", "ungated/metrics.jsonl"),
)
_PACKAGES = (
    "surgeon",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "onnx",
    "onnxruntime",
    "numpy",
    "pillow",
)
_STATE = {"config", "epoch", "step", "best", "before", "processes", "images", "model", "optimizer"}
_RESUME_LATER = "Free some space or mend that, and go on with resume=true"


def prepare_folder(config: Config) -> dict[str, Any] | None:
    """Returns the state to resume from, if that is asked for; nothing is changed.

    Raises:
        UsageError: If the folder cannot be written, holds a run that is neither to be resumed nor replaced,
            if there is no state to resume, or if the run that left it had other settings.
        SurgeonError: If the state is damaged.
    """
    last = config.output / "last.pt"
    _check_writable(config.output)
    if config.resume:
        state = read_state(last)
        _same_settings(state["settings"], config, last)
        return state
    if last.exists() and not config.overwrite:
        raise UsageError(
            f"{config.output} already holds a run: resume=true goes on with it, overwrite=true replaces it, "
            "output=PATH keeps both."
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """A state that `RunLog.save` has written, its settings as a tree under "settings"."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(
            f"resume=true, but there is no {path}: check output, or leave resume out."
        ) from error
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise SurgeonError(
            f"{path} cannot be read: it is damaged; start again without resume, with overwrite=true."
        ) from error
    try:
        if not state.keys() >= _STATE:
            raise TypeError  # noqa: TRY301 - as for what is no dict at all
        state["settings"] = Config.model_validate(json.loads(state["config"])).model_dump(mode="json")
    except (AttributeError, TypeError, ValueError) as error:
        older = isinstance(error, ValidationError)
        why = "was left by another version of this recipe" if older else "is no state of this recipe"
        raise SurgeonError(f"{path} {why}; start again without resume, with overwrite=true.") from error
    return state


def check_continues(state: dict[str, Any], processes: int, images: dict[str, Any], path: Path) -> None:
    """Checks that what is not among the settings is as it was, too.

    Raises:
        UsageError: If the number of processes or the images differ.
    """
    before, held = state["processes"], state["images"]
    if before != processes:
        raise UsageError(
            f"{path} was left by {before} processes, and now there are {processes}: each step would see "
            "other images. Start as many, or use another output=PATH."
        )
    if held != images:
        names = {"train": "images to train on", "test": "held-out images"}
        told = [f"{held[key]} {name} then, {images[key]} now" for key, name in names.items()]
        other = sorted(set(held["classes"]) ^ set(images["classes"]))
        told += [f"classes only in one of both: {', '.join(other[:5])}"] if other else []
        raise UsageError(
            f"{path} was left by a run on other images ({'; '.join(told)}). Give data.root=PATH of the same "
            "ones, or use another output=PATH."
        )


class RunLog:
    """Writes what a run leaves in its folder while it trains; only if `active`. `told` says of what."""

    def __init__(
        self,
        config: Config,
        resumed_epoch: int | None,
        *,
        active: bool,
        part: str = "",
        told: Mapping[str, object] | None = None,
    ) -> None:
        self.active, self.config, self.part, self.told = active, config, part, told or {}
        self.folder = config.output / part
        self.path = self.folder / "metrics.jsonl"
        if not active:
            return
        with explained(self.folder, _RESUME_LATER):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = self.path.read_bytes().splitlines() if resumed_epoch and self.path.exists() else []
            kept = list(_sound(held, resumed_epoch or 0, self.path))
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, kind: str, epoch: int, step: int, **numbers: float | None) -> None:
        """Adds one line."""
        if not self.active:
            return
        with explained(self.path, _RESUME_LATER):
            append_line(self.path, json.dumps({"kind": kind, "epoch": epoch, "step": step, **numbers}))

    def save(self, name: str, model: nn.Module, **state: Any) -> None:
        """Writes a state that `torch.load(weights_only=True)` reads: tensors, numbers, strings, nothing else.

        It is for going on, not for handing on: with `scaling: paper` its weights still lack the factors that
        `surgeon fold` puts in, for which it says what it is of. `model.safetensors` is the file to hand on.
        """
        if not self.active:
            return
        settings = json.dumps(self.config.model_dump(mode="json"))
        held = {
            "config": settings,
            "metadata": description(model, self.told),
            "model": model.state_dict(),
            **state,
        }
        with explained(self.folder / name, f"The state before that is whole. {_RESUME_LATER}"):
            write_file(self.folder / name, lambda file: torch.save(held, file))


def epochs_of(path: Path) -> list[dict[str, Any]]:
    """The lines of whole epochs in a metrics.jsonl."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


@contextmanager
def occupied(config: Config, *, fresh: bool, active: bool) -> Iterator[set[Path]]:
    """The output folder while this run alone writes there; yields the files that were there and stay.

    Raises:
        UsageError: If another run writes there now.
        SurgeonError: If it cannot be written.
    """
    if not active:
        yield set()
        return
    with explained(config.output, "Give output=PATH"):
        config.output.mkdir(parents=True, exist_ok=True)
        lock = Lock(config.output)
    try:
        with explained(config.output, _RESUME_LATER):
            if fresh:  # a state of the run before must not be taken for one of this
                for name in _OWN:
                    (config.output / name).unlink(missing_ok=True)
            for draft in config.output.rglob(".*.draft"):  # of a run that was killed while it wrote
                draft.unlink()
            before = {path for path in config.output.rglob("*") if path.is_file()} if fresh else set()
            write_text(config.output / "config.yaml", dump_config(config))
            write_text(config.output / "env.json", json.dumps(environment(), indent=2) + "\n")
        yield before
    finally:
        lock.release()


def environment() -> dict[str, Any]:
    """What besides the settings decides how a run comes out: versions, machine, command."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    launched = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "devices": devices,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in launched if name in os.environ},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_writable(folder: Path) -> None:
    """The folder, or the nearest one above it that is there, can be written."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"output: {place} is a file, not a folder; give output=PATH.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"output: {place} is read-only, and {folder} is to be written; give output=PATH.")


def _same_settings(before: dict[str, Any], config: Config, path: Path) -> None:
    then, now = _flat(before), _flat(config.model_dump(mode="json"))
    changed = [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not _may_change(key)
    ]
    if changed:
        raise UsageError(
            f"{path} was left by a run with other settings: {'; '.join(changed)}. A resumed run needs the "
            f"same; these may change: {', '.join(MAY_CHANGE)}. Use another output=PATH for new ones."
        )


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings by their full names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _sound(lines: list[bytes], last: int, path: Path) -> Iterator[str]:
    """The lines that are whole, up to that epoch: what came after its state will be written again.

    A power cut or a full disk leaves half a line, or zeros.
    """
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            sound = isinstance(found["epoch"], int) and isinstance(found["kind"], str)
        except (ValueError, TypeError, KeyError):
            sound = False
        if sound and found["epoch"] <= last:
            yield line.decode("utf-8")
        elif not sound:
            print(f"{path}: line {number} is damaged and left out", file=sys.stderr)
