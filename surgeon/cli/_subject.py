"""The model that a command works on, made from its MODEL argument and options."""

import contextlib
import functools
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from surgeon.cli._complete import schedules
from surgeon.cli._run import Output
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

Body = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and what is known about it.

    Attributes:
        spec: The full spelling of the MODEL argument.
        model: The model.
        example: What it is run on; None where the model says that itself.
        metadata: What the checkpoint says of itself; empty without one.
        random: Whether the weights are random, for want of a checkpoint.
        arguments: What its maker was given.
        make: Makes the model once more, without the checkpoint.
    """

    spec: str
    model: "nn.Module"
    example: "Tensor | None"
    metadata: dict[str, str]
    random: bool
    arguments: dict[str, Any]
    make: "Callable[[], nn.Module]"


@dataclass(frozen=True, slots=True)
class Making:
    """The options that say how a model is made."""

    checkpoint: str | None
    entry: str | None
    num_classes: int | None
    img_size: int | None
    input_size: str | None
    model_args: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GateOptions:
    """The options that say which gates a model gets."""

    schedule: str | None
    drop_rate: float | None
    scaling: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def given(self) -> dict[str, object]:
        """The options that were given, but for ``scaling``."""
        values = {name: getattr(self, name) for name in ("schedule", "drop_rate", "include", "exclude")}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def settings(self, metadata: dict[str, str]) -> dict[str, Any]:
        """The arguments for `surgeon.apply`: options, else what a checkpoint remembers, else defaults."""
        noted_rate = metadata.get("drop_rate")
        schedule = _schedule(self.schedule or metadata.get("schedule", "linear"))
        if self.schedule and not isinstance(schedule, str) and self.drop_rate is not None:
            raise UsageError("--schedule lists the drop rates themselves; leave --drop-rate out")
        return {
            "schedule": schedule,
            "drop_rate": self.drop_rate if self.drop_rate is not None else float(noted_rate or 0.5),
            "scaling": self.scaling or metadata.get("scaling", "inverted"),
            "include": self.include or tuple(_json(metadata.get("include"), [])),
            "exclude": self.exclude or tuple(_json(metadata.get("exclude"), [])),
        }


def model_options(body: Body) -> Body:
    """Adds the options of `Making`, which the body gets as ``making``."""
    checkpoint = click.option(
        "--checkpoint", type=click.Path(), help="Weights: what a training of any library has left."
    )
    return checkpoint(made_options(body))


def made_options(body: Body) -> Body:
    """As `model_options`, for a command that is given its checkpoint in another way."""
    options = (
        click.option("--entry", help="Which weights of the checkpoint, as ema or state_dict."),
        click.option("--num-classes", type=click.IntRange(min=0), help="Size of the classifier."),
        click.option("--img-size", type=click.IntRange(min=1), help="Side of the square images, in pixels."),
        click.option("--input-size", metavar="CxHxW", help="Size of the input, as 1x28x28."),
        click.option(
            "--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="For MODEL's maker."
        ),
    )
    return _bundled("making", Making, options, body)


def schedule_options(body: Body) -> Body:
    """Adds the options of `GateOptions`, which the body gets as ``gating``."""
    options = (
        click.option(
            "--schedule",
            shell_complete=schedules,
            help="linear, linear-from-zero, uniform, or drop rates as 0,0.1,0.2.",
        ),
        click.option("--drop-rate", type=float, help="The last gate's drop rate, 0 to below 1. Default 0.5."),
        click.option("--scaling", type=click.Choice(["inverted", "paper"]), help="Default inverted."),
        click.option("--include", multiple=True, metavar="PATTERN", help="Gate only these; may be repeated."),
        click.option(
            "--exclude", multiple=True, metavar="PATTERN", help="Do not gate these; may be repeated."
        ),
    )
    return _bundled("gating", GateOptions, options, body)


@contextlib.contextmanager
def _left_to_the_collector_later() -> Iterator[None]:
    """What is made meanwhile is garbage-collected when the command ends.

    Libraries make a million objects, and to look at them again and again is a sixth of a command's time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


@_left_to_the_collector_later()
def load_subject(out: Output, model: str, making: Making) -> Subject:
    """Makes the model, with the checkpoint's weights; where a file has more than these, says which it took.

    A checkpoint of surgeon remembers the arguments that its model was made with, its input size (options win
    over both) and the branches that were deleted.

    Raises:
        UsageError: An option does not make sense, or the model is unknown.
        CheckpointError: The checkpoint cannot be read or does not fit.
    """
    from surgeon._checkpoint import load_checkpoint
    from surgeon._container import read_metadata
    from surgeon._entry import taken
    from surgeon._source import LIBRARIES, load_model, resolve

    size = _size(making)
    arguments = dict(_pair(text) for text in making.model_args)
    spec = resolve(model)
    metadata = read_metadata(making.checkpoint) if making.checkpoint else {}
    arguments = {**_remembered(metadata, spec), **arguments}
    if making.num_classes is not None:
        arguments["num_classes"] = making.num_classes
    known = size or _noted_size(metadata)
    side = known[-1] if known and known[-1] == known[-2] else None
    make = functools.partial(load_model, spec, img_size=side, **arguments)
    made = make()
    example = _example(made, size or _noted_size(metadata))
    if gone := _json(metadata.get("pruned"), []):
        from surgeon import prune

        prune(made, gone, example=example, inplace=True)
    if making.checkpoint:
        entry = load_checkpoint(made, making.checkpoint, making.entry)
        metadata = entry.metadata
        if entry.name or entry.others:
            out.note(f"surgeon: weights {taken(entry.name, entry.others)}")
    weighted = bool(making.checkpoint or arguments.keys() & {"pretrained", "weights"})
    unknown = spec.partition(":")[0] in LIBRARIES and not weighted
    return Subject(spec, made, example, metadata, random=unknown, arguments=arguments, make=make)


def _schedule(text: str) -> str | tuple[float, ...]:
    if not text or text[0] not in "[.0123456789":
        return text
    try:
        return tuple(float(rate) for rate in text.strip("[]").split(","))
    except ValueError as error:
        raise UsageError(f"--schedule is {text!r}; give a name, or drop rates separated by commas") from error


def _size(making: Making) -> tuple[int, ...] | None:
    """The size asked for: height and width, or channels too."""
    if making.input_size is None:
        return None if making.img_size is None else (making.img_size, making.img_size)
    if making.img_size is not None:
        raise UsageError("--img-size and --input-size say the same thing; give one of them")
    parts = making.input_size.lower().split("x")
    if len(parts) < 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(
            f"--input-size is {making.input_size!r}; give channels, height and width, as 3x224x224"
        )
    return tuple(int(part) for part in parts)


def _noted_size(metadata: dict[str, str]) -> tuple[int, ...] | None:
    return tuple(_json(metadata.get("input_size"), [])) or None


def _example(model: "nn.Module", size: tuple[int, ...] | None) -> "Tensor | None":
    from surgeon._tracing.example import default_input

    if size is None:
        return None
    usual = default_input(model)
    known = usual.shape[:2] if len(size) == 2 else usual.shape[:1]
    return usual.new_zeros(*known, *size)


def _remembered(metadata: dict[str, str], spec: str) -> dict[str, Any]:
    told = metadata.get("model") in (spec, spec.partition(":")[2])
    return dict(_json(metadata.get("model_args"), {})) if told else {}


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"--model-arg is {text!r}; give KEY=VALUE, as img_size=96 or layers=[1,1,1,1]")
    return key, _json(value, value)


def _json(text: str | None, otherwise: Any) -> Any:
    try:
        return otherwise if text is None else json.loads(text)
    except json.JSONDecodeError:
        return otherwise


def _bundled(name: str, kind: type, options: tuple[Callable[[Body], Body], ...], body: Body) -> Body:
    """Adds options to a command; its body gets their values in one dataclass."""
    keys = [held.name for held in fields(kind)]

    @functools.wraps(body)
    def call(*args: Any, **arguments: Any) -> Any:
        bundle = kind(**{key: arguments.pop(key) for key in keys})
        return body(*args, **arguments, **{name: bundle})

    made: Body = call
    for option in reversed(options):
        made = option(made)
    return made
