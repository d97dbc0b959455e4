"""What happens to a model's gates while the loop of another library trains it: start, step, log, save, end.

Each library's own file only says when.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgeon._checkpoint import save_checkpoint
from surgeon._files import beside, settle
from surgeon._gating.block import NOTE
from surgeon._gating.gated import gated_network, recorded_inputs
from surgeon._meter import DepthMeter
from surgeon._needs import need_export
from surgeon._note import put_note
from surgeon._plain import check_plain
from surgeon._ramp import Ramp
from surgeon._removal import fold
from surgeon._surgery import status
from surgeon._tracing.example import Example
from surgeon.errors import CheckpointError, NotGatedError, UsageError, WrappedModelError


class GateTraining:
    """Takes a gated model through a training: ramp, numbers for logs, notes beside checkpoints, delivery.

    Args:
        ramp: Arguments of `surgeon.Ramp`, such as ``{"drop_rate": 0.5, "shape": "cosine"}``; ``steps`` are
            optimizer steps, by default all of the training. None: the rates stay as they are.
        deliver: A folder for the folded model at the end of the training: ``model.safetensors`` with stock
            keys, or what the model's own ``save_pretrained`` writes. Adapters of PEFT are merged first. None:
            nothing is delivered.
        onnx: Whether ``model.onnx`` is exported there, too.
        example: As in `surgeon.find`, for fold and export; by default the one that `apply` recorded.

    Raises:
        UsageError: ``onnx`` without a folder.
        MissingPackageError, UnsupportedTorchError: ``onnx``, and nothing can be exported here.
    """

    def __init__(
        self,
        *,
        ramp: Mapping[str, Any] | None = None,
        deliver: str | os.PathLike[str] | None = None,
        onnx: bool = False,
        example: Example = None,
    ) -> None:
        if onnx and deliver is None:
            raise UsageError("onnx=True needs a folder for the file: deliver='...'")
        if onnx:
            need_export("onnx=True")
        self.settings, self.onnx, self.example = dict(ramp) if ramp else None, onnx, example
        self.folder = None if deliver is None else Path(deliver)
        self.model: nn.Module | None = None
        self.ramp: Ramp | None = None
        self.plain: nn.Module | None = None
        self._loaded: dict[str, Any] = {}

    def start(self, model: nn.Module, total: float | None = None, done: int = 0) -> None:
        """Takes up a training after ``done`` of its ``total`` optimizer steps, before the next one.

        Args:
            model: The gated model, or one that holds it, without the wrappers of DDP and others.
            total: How many steps the training has, if that is known.
            done: How many are over.

        Raises:
            NotGatedError: There are no gates.
            UsageError: The length of a ramp is not known, or the model is sharded and cannot be folded here.
            CheckpointError: The training that is resumed had other evaluation scales.
        """
        name = gated_network(model)
        if name is None:
            raise NotGatedError(
                f"{type(model).__name__} has no gates; call surgeon.apply(network, ...) before its trainer "
                "is made"
            )
        self.model, self.network = model, _delivered(model, name)
        self._check_scales()
        if self.folder is not None:
            self._check_delivery(self.folder)
        put_note(self.network)
        self.meter = DepthMeter(self.network)
        if self.settings is not None:
            steps = self.settings["steps"] if "steps" in self.settings else _length(total)
            self.ramp = Ramp(self.network, **(self.settings | {"steps": steps}))
        self.step(done)

    def step(self, done: int) -> None:
        """Sets the rates for the step after ``done`` ones."""
        if self.ramp is not None:
            self.ramp.step(done)

    def log(self) -> dict[str, float]:
        """The final drop rate, the expected depth, and the realised one since the last call."""
        now = status(self.network)
        rate = self.ramp.rate if self.ramp else now.gates[-1].drop_rate
        depth = self.meter.take()
        told = {"gates/drop_rate": rate, "gates/expected_depth": now.expected_depth}
        return told if depth is None else told | {"gates/depth": depth}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Notes the evaluation scales beside weights that another library has saved: in ``config.json``.

        Under the default scaling there is nothing to note.
        """
        scales = self.scales()
        place = Path(folder).resolve() / "config.json"
        if not scales or not place.parent.is_dir():
            return
        told = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
        with beside(place) as room:
            (room / place.name).write_text(json.dumps(told | {NOTE: scales}, indent=2), encoding="utf-8")
            settle(room / place.name, place)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training compares: the evaluation scale of each gate that has one."""
        return {"scales": self.scales()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of the training that is resumed, which `start` compares.

        Raises:
            CheckpointError: The training has begun already, and had other evaluation scales.
        """
        self._loaded = dict(state)
        if self.model is not None:
            self._check_scales()

    def end(self) -> nn.Module | None:
        """Folds a copy of the trained model, writes it to the folder and returns it; None without a folder.

        Raises:
            FoldError: As in `surgeon.fold`.
            ExportError, ParityError: As in `surgeon.export`; the weights are written by then.
        """
        if self.folder is None:
            return None
        plain: Any = fold(self.network, example=self.example).eval()
        if hasattr(plain, "merge_and_unload"):
            plain = plain.merge_and_unload()
        if hasattr(plain, "save_pretrained"):
            plain.save_pretrained(self.folder)
        else:
            save_checkpoint(plain, self.folder / "model.safetensors")
        if self.onnx:
            from surgeon._onnx.export import export

            args, kwargs = recorded_inputs(plain, self.meter.gates[0].decided, self.example)
            export(plain, self.folder / "model.onnx", example=args or kwargs, overwrite=True)
        self.plain = plain
        return self.plain

    def scales(self) -> dict[str, float]:
        """The evaluation scale of each gate that has one, by its name in the model that is trained."""
        assert self.model is not None, "start comes first"
        return status(self.model).scales

    def _check_scales(self) -> None:
        then, now = self._loaded.get("scales"), self.scales()
        if then is None or then == now:
            return
        name = min(name for name in {**then, **now} if then.get(name) != now.get(name))
        raise CheckpointError(
            f"the training that is resumed had the evaluation scale {then.get(name, 1.0):.4g} at {name}, "
            f"this model has {now.get(name, 1.0):.4g}; call surgeon.apply as it was called then"
        )

    def _check_delivery(self, folder: Path) -> None:
        try:
            check_plain(self.network)
        except WrappedModelError as error:
            raise UsageError(
                f"the model cannot be folded at the end of this training ({error}); leave deliver out, and "
                "afterwards surgeon.load the checkpoint into a gated model and surgeon.fold that"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"cannot deliver to {folder}: the directory is not writable")


def _length(total: float | None) -> int:
    if total is None or not 0 < total < float("inf"):
        raise UsageError(
            "how many steps the training has is not known; give the ramp its length: ramp={'steps': ...}"
        )
    return int(total)


def _delivered(model: nn.Module, name: str) -> nn.Module:
    """The network of that name, or what holds it and can merge adapters into it."""
    parts = name.split(".") if name else []
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
    return next((module for module in around if hasattr(module, "merge_and_unload")), around[-1])
