"""What a run of `finetune.py` leaves behind while it trains: its numbers, and the state to go on from."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from finetune_config import Config, dump_config
from torch import nn

from surgeon import __version__
from surgeon.errors import SurgeonError, UsageError

MAY_CHANGE = {
    "output",
    "device",
    "threads",
    "resume",
    "overwrite",
    "deliver",
    "log",
}  # between a run and its continuation


def prepare_folder(config: Config) -> dict[str, Any] | None:
    """Makes the output folder; returns the state to resume from, if that is asked for.

    Raises:
        UsageError: If the folder holds a run that is neither to be resumed nor replaced, if there is no
            state to resume, or if the run that left it had other settings.
    """
    last = config.output / "last.pt"
    if config.resume:
        state = _read_state(last)
        _same_settings(json.loads(state["config"]), config, last)
        return state
    if last.exists() and not config.overwrite:
        raise UsageError(
            f"{config.output} already holds a run: resume=true goes on with it, overwrite=true replaces it, "
            "output=PATH keeps both."
        )
    return None


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(
            f"resume=true, but there is no {path}: check output, or leave resume out."
        ) from error
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise SurgeonError(f"{path} cannot be read: it is damaged; start again without resume.") from error
    if not isinstance(state, dict) or not {"config", "epoch", "model"} <= state.keys():
        raise SurgeonError(f"{path} is no state of this recipe; start again without resume.")
    return state


def _same_settings(before: dict[str, Any], config: Config, path: Path) -> None:
    now = config.model_dump(mode="json")
    for section in now.keys() - MAY_CHANGE:
        if before.get(section) != now[section]:
            raise UsageError(
                f"{path} was left by a run with {section}: {before.get(section)}; now it is {now[section]}. "
                "A resumed run needs the same settings; use another output=PATH for new ones."
            )


class RunLog:
    """Writes `config.yaml`, `metrics.jsonl` and, if asked to, TensorBoard events; only if `active`."""

    def __init__(self, config: Config, resumed_epoch: int, *, active: bool) -> None:
        self.active = active
        self.folder = config.output
        self.board = _tensorboard(config) if active and config.log.tensorboard else None
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", f"# {_versions()}\n{dump_config(config)}")
        self.path = self.folder / "metrics.jsonl"
        kept = self.path.read_text().splitlines(keepends=True) if resumed_epoch and self.path.exists() else []
        # What a run wrote after its last saved epoch will be written again.
        write_text(self.path, "".join(line for line in kept if json.loads(line)["epoch"] <= resumed_epoch))

    def write(self, kind: str, epoch: int, step: int, **numbers: float) -> None:
        """Adds one line."""
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **numbers}) + "\n")
        if self.board is not None:
            for name, number in numbers.items():
                self.board.add_scalar(f"{kind}/{name}", number, step)

    def save(self, name: str, config: Config, model: nn.Module, **state: Any) -> None:
        """Writes a state that `torch.load(weights_only=True)` reads: tensors, numbers, strings, nothing else.

        It is for going on, not for handing on: with `scaling: paper` its weights still lack the factors that
        `surgeon.fold` puts in. `model.safetensors` is the file to hand on.
        """
        if not self.active:
            return
        path, draft = self.folder / name, self.folder / f"{name}.draft"
        settings = json.dumps(config.model_dump(mode="json"))
        torch.save({"config": settings, "model": model.state_dict(), **state}, draft)
        draft.replace(path)  # a run that is killed leaves the old file whole

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or leaves the old one."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _versions() -> str:
    return f"surgeon {__version__}, torch {torch.__version__}, timm {timm.__version__}"


def _tensorboard(config: Config) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SurgeonError(
            "log.tensorboard=true needs tensorboard: pip install 'depth-surgeon[recipes]'"
        ) from error
    return SummaryWriter(str(config.output))
