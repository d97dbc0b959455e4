"""``surgeon lesion``: what each branch of a trained network is worth."""

from pathlib import Path

import click

from surgeon.cli._complete import models
from surgeon.cli._gated import with_scales
from surgeon.cli._images import Measuring, batches, data_options
from surgeon.cli._run import MODEL_HELP, Output
from surgeon.cli._run import command as surgeon_command
from surgeon.cli._subject import GateOptions, Making, load_subject, model_options, schedule_options
from surgeon.errors import UsageError

_EXAMPLES = """
surgeon lesion timm:resnet50 --checkpoint model.safetensors --data photos/val
surgeon lesion digits_net:small --checkpoint last.pt --data digits/test --together 1,2,3 --plot lesion.png
surgeon lesion timm:vit_small_patch16_224 --checkpoint vit.safetensors --data images --unlabelled --json
"""


@surgeon_command("lesion", "Measure a network without its branches.", examples=_EXAMPLES, more=MODEL_HELP)
@click.argument("model", shell_complete=models)
@model_options
@schedule_options
@data_options
@click.option("--together", default="", metavar="N,N", help="Also delete so many branches at once.")
@click.option(
    "--draws", type=click.IntRange(min=1), default=5, show_default=True, help="Random sets of each."
)
@click.option("--cache", type=click.Path(), help="Keep what was measured in this file.")
@click.option("--plot", type=click.Path(), help="Draw it into this file (png, svg or pdf).")
def command(
    out: Output,
    *,
    model: str,
    making: Making,
    gating: GateOptions,
    measuring: Measuring,
    together: str,
    draws: int,
    cache: str | None,
    plot: str | None,
) -> None:
    """Measures MODEL without each of its branches, and without several together.

    With labels (one folder per class) the measure is cross-entropy and accuracy, without them agreement with
    the whole network. The options of the schedule are as for export.
    """
    import surgeon

    counts = _numbers(together)
    with out.working(f"loading {model}"):
        subject = with_scales(load_subject(out, model, making), gating)
        data = batches(measuring, subject)
    if subject.random:
        out.note("surgeon: the weights are random; give --checkpoint to measure trained ones")
    with out.counting(f"measuring {model} without branches") as counted:
        found = surgeon.lesion(
            subject.model,
            data,
            counts=counts,
            draws=draws,
            cache=cache,
            example=subject.example,
            progress=counted,
        )
    if plot:
        from surgeon._pruning.picture import draw

        draw(found, Path(plot), subject.spec)
    out.result({"model": subject.spec, **found.to_dict()}, found.parts(), of=subject.spec)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(
            f"--together is {text!r}; give whole numbers separated by commas, as 1,2,4"
        ) from error
