"""What a user of `finetune.py` sees: facts before it starts, a bar and a line for each epoch meanwhile."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from finetune_settings import Config
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import surgeon

if TYPE_CHECKING:
    from finetune_data import Images


class Display:
    """A bar on a terminal, which goes when its work is done; lines that stay, there and in any log."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Says something that is not the result."""
        if not self.shown:
            return
        if self.console.is_terminal:
            self.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """Shows how far the work is; the function that is yielded counts a step."""
        columns = (TextColumn("{task.description:9}"), BarColumn(20), TimeRemainingColumn())
        hidden = not self.shown or not self.console.is_terminal
        with Progress(*columns, console=self.console, disable=hidden, transient=True) as progress:
            task = progress.add_task(what, total=total, completed=done)
            yield lambda: progress.advance(task)


def header(settings: Config, images: "Images", model: nn.Module, device: torch.device, processes: int) -> str:
    """What will be trained on what, and how, before the first step."""
    train, plan = settings.train, settings.optimizer
    weights = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    step = train.batch_size * train.accumulate * processes
    times = f"{train.batch_size} images x {processes} processes x {train.accumulate} batches"
    facts = {
        "images": f"{len(images.train):,} to train on, {len(images.test):,} held out; {len(images.classes)} "
        f"classes; {'x'.join(map(str, images.input_size))}",
        "device": f"{name}, precision {'float32' if train.precision == 'no' else train.precision}; "
        f"{step} images a step ({times})",
        "model": f"{settings.model.name}, {weights / 1e6:.2f} million parameters",
        "training": f"{train.epochs} epochs, {plan.name}, learning rate {plan.lr:g}, {plan.decay}",
        **({"gates": _gates(settings, model)} if settings.gates else {"gates": "none"}),
        "output": str(settings.output),
    }
    return "\n".join(f"{key:9} {value}" for key, value in facts.items()) + "\n"


def epoch_line(epoch: int, epochs: int, figures: dict[str, Any]) -> str:
    """One epoch's figures."""
    text = f"epoch {epoch:{len(str(epochs))}}/{epochs}  loss {figures['train_loss']:.3f}"
    text += f"  held out {figures['loss']:.3f}  top-1 {figures['top1']:6.2f} %  lr {figures['lr']:.2g}"
    if figures.get("depth") is not None:
        text += f"  depth {figures['depth']:.2f}"
    return text + f"  {figures['images_per_second']:.0f} images/s  {figures['seconds']:.1f} s"


def resume_command() -> str:
    """The command line that goes on with this run."""
    program, *rest = sys.argv
    name = Path(program).name
    start = [name] if not name.endswith(".py") else ["python", program]
    rest = [argument for argument in rest if not argument.startswith(("resume=", "overwrite="))]
    return shlex.join([*start, *rest, "resume=true"])


def _gates(settings: Config, model: nn.Module) -> str:
    gates, status = settings.gates, surgeon.status(model)
    assert gates is not None
    count = len(status.gates)
    ramp = f", {gates.ramp} over {gates.ramp_epochs} epochs" if gates.ramp_epochs else ""
    rate = f" {gates.drop_rate:g}" if isinstance(gates.schedule, str) else ""
    return (
        f"{count}, {status.schedule}{rate}{ramp}, unit {gates.unit}, scaling {gates.scaling}; "
        f"expected depth {status.expected_depth:.2f} of {count}, training FLOPs {status.expected_flops:.1%}"
    )
