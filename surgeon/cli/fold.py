"""``surgeon fold``: a checkpoint trained by the paper's rule as one of a stock model."""

import json
import warnings
from typing import TYPE_CHECKING, Any

import click

from surgeon.cli._complete import models
from surgeon.cli._gated import with_scales
from surgeon.cli._run import DONE, MODEL_HELP, NOTHING, Output
from surgeon.cli._run import command as surgeon_command
from surgeon.cli._subject import GateOptions, Making, Subject, load_subject, made_options, schedule_options
from surgeon.errors import FoldError, ParityError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

_EXAMPLES = """
surgeon fold gated.safetensors -o model.safetensors
surgeon fold ckpt.pth --model timm:resnet50 --schedule linear --drop-rate 0.5 -o model.safetensors
surgeon fold last.pt --model torchvision:resnet18 --schedule uniform --drop-rate 0.2 -o stock.safetensors
"""

_MEANING = """\
A checkpoint of surgeon knows its model and its scales. Of any other, name the model, and the schedule and the
final drop rate of its training: p_l = 1 - l/L * RATE for linear. Files of torch are read without running code
from them."""


@surgeon_command(
    "fold",
    "Make a stock checkpoint of a gated one.",
    examples=_EXAMPLES,
    more=f"{_MEANING}\n\n{MODEL_HELP}",
)
@click.argument("checkpoint", type=click.Path())
@click.option("--model", shell_complete=models, help="The model; by default what the checkpoint says.")
@click.option("-o", "--output", required=True, type=click.Path(), help="The safetensors file to write.")
@made_options
@schedule_options
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Largest relative error.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def command(
    out: Output,
    *,
    model: str | None,
    output: str,
    making: Making,
    gating: GateOptions,
    tolerance: float,
    overwrite: bool,
) -> int:
    """Writes the weights of CHECKPOINT, trained by the paper's rule, for a stock model.

    The evaluation scales p_l go into the weights, and the file written loads with strict=True into a model
    freshly made by timm or torchvision, which gives the same outputs without any gate: compared on random
    images before the file is in place.
    """
    import surgeon
    from surgeon._checkpoint import save_checkpoint
    from surgeon._files import destination
    from surgeon._text import Part, count

    place = destination(output, overwrite=overwrite)
    if place.suffix != ".safetensors":
        raise UsageError(f"--output is {output}; stock checkpoints are safetensors files, name it so")
    subject, gating = _subject(out, model, making, gating)
    if not _has_scales(subject, gating):
        out.note(
            f"surgeon: the weights in {making.checkpoint} need no evaluation scales; there is nothing to fold"
        )
        out.result({"checkpoint": making.checkpoint, "gates": [], "exit_code": NOTHING})
        return NOTHING
    with out.working(f"folding {making.checkpoint}"):
        gated = with_scales(subject, gating).model
        scales = {gate.name: gate.scale for gate in surgeon.status(gated).gates}
        stock, error = _fold(gated, subject, tolerance)
        save_checkpoint(stock, place, _metadata(subject, gating))
    found = {
        "checkpoint": making.checkpoint,
        "model": subject.spec,
        "path": str(place),
        "gates": [{"name": name, "scale": scale} for name, scale in scales.items()],
        "error": error,
    }
    low, high = min(scales.values()), max(scales.values())
    what = f"{count(len(scales), 'gate')} folded, scales {low:.4g} to {high:.4g}, relative error {error:.1e}"
    lines = (what, f"{making.checkpoint} -> {output}")
    out.result(found, [Part("stock weights", lines=lines)], of=subject.spec)
    return DONE


def _subject(
    out: Output, model: str | None, making: Making, gating: GateOptions
) -> tuple[Subject, GateOptions]:
    """The checkpoint's model with its weights, and the options with what they imply."""
    from dataclasses import replace

    from surgeon._container import read_metadata

    noted = read_metadata(str(making.checkpoint))
    spec = model or noted.get("model")
    if spec is None:
        raise UsageError(f"{making.checkpoint} does not say of which model it is; name it with --model")
    if model is None:
        _check_told(spec, making)
    subject = load_subject(out, spec, making)
    knows = {"scales", "weights"} & subject.metadata.keys()
    if not knows and not (gating.schedule or gating.drop_rate is not None):
        raise UsageError(
            f"{making.checkpoint} does not say with which survival probabilities it was trained; give "
            "--schedule and --drop-rate"
        )
    implied = gating.scaling or (None if knows else "paper")
    return subject, replace(gating, scaling=implied)


def _check_told(spec: str, making: Making) -> None:
    """A training script's name for its model need not be one that makes it."""
    from surgeon._source import check_spec

    try:
        check_spec(spec)
    except UsageError as error:
        raise UsageError(
            f"{making.checkpoint} says that its model is {spec!r}; name it with --model. {error}"
        ) from error


def _has_scales(subject: Subject, gating: GateOptions) -> bool:
    noted = subject.metadata
    if gating.scaling == "inverted" or noted.get("weights") == "plain":
        return gating.scaling == "paper"  # which is refused with the reason
    return gating.scaling == "paper" or "scales" in noted or noted.get("scaling") == "paper"


def _fold(gated: "nn.Module", subject: Subject, tolerance: float) -> tuple["nn.Module", float]:
    """A stock model, freshly made, with the folded weights, and its largest relative error.

    The gated model is folded in place.

    Raises:
        FoldError: Some gate needs a multiplication, which no stock model has.
        ParityError: The stock model gives other outputs.
    """
    import surgeon
    from surgeon._gating.gated import is_gated

    expected = _outputs(gated, subject)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What it warns of is an error here.
        surgeon.fold(gated, inplace=True, example=subject.example)
    if is_gated(gated):
        kept = surgeon.status(gated).gates
        listed = "; ".join(f"{gate.name}: {gate.note}" for gate in kept)
        raise FoldError(
            f"no stock model has these weights: {len(kept)} gates need a multiplication ({listed}). "
            "surgeon export keeps it in the graph. Nothing was written"
        )
    stock = subject.make()
    stock.load_state_dict(gated.state_dict(), strict=True)
    error = max(map(_difference, _outputs(stock, subject), expected))
    if not error <= tolerance:
        raise ParityError(
            f"the folded weights of {subject.spec} give other outputs: largest relative error {error:.3g}, "
            f"tolerance {tolerance:g}. Nothing was written"
        )
    return stock, error


def _outputs(model: "nn.Module", subject: Subject) -> "list[Tensor]":
    """What the evaluating model returns for two random samples, always the same ones."""
    import torch

    from surgeon._onnx.signature import signature
    from surgeon._tracing.nests import tensors

    called = signature(model, subject.example)
    drawn = called.draw(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [t for t in tensors(called.call(model.eval(), drawn)) if t.is_floating_point()]


def _difference(one: "Tensor", other: "Tensor") -> float:
    largest = other.abs().max().clamp_min(1e-30)
    return float((one - other).abs().max() / largest)


def _metadata(subject: Subject, gating: GateOptions) -> dict[str, Any]:
    """What the file written says of itself: what the one read said, and the options."""
    kept = {key: value for key, value in subject.metadata.items() if key not in ("scales", "weights")}
    settings = {**gating.given(), "scaling": "paper"}
    arguments = {"model_args": json.dumps(subject.arguments)} if subject.arguments else {}
    return {**kept, **settings, "model": subject.spec, **arguments}
