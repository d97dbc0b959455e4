"""``surgeon inspect``: which residual adds a model has, and what a schedule makes of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from surgeon.cli._complete import models
from surgeon.cli._run import MODEL_HELP, NOTHING, Output
from surgeon.cli._run import command as surgeon_command
from surgeon.cli._subject import GateOptions, Making, load_subject, model_options, schedule_options

if TYPE_CHECKING:
    from torch import nn

    from surgeon._measure import Measured
    from surgeon._report import Plan

_EXAMPLES = """
surgeon inspect timm:resnet50
surgeon inspect torchvision:convnext_tiny --schedule uniform --drop-rate 0.2
surgeon inspect timm:vit_tiny_patch16_224 --exclude '*.attn*' --json
surgeon inspect timm:resnet50 --html resnet50.html
surgeon inspect timm:vit_small_patch16_224 --measure --batch-size 16
surgeon inspect my_networks:tiny --input-size 1x28x28 --model-arg width=64
"""


@surgeon_command(
    "inspect", "Show the residual adds and the gates they get.", examples=_EXAMPLES, more=MODEL_HELP
)
@click.argument("model", shell_complete=models)
@model_options
@schedule_options
@click.option("--unit", type=click.Choice(["sample", "batch"]), default="sample", show_default=True)
@click.option("--html", "page", type=click.Path(), help="Write a page with a slider for the drop rate.")
@click.option("--measure", is_flag=True, help="Time a few training steps beside what is reckoned.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Of --measure.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Steps of each way.")
@click.option("--overwrite", is_flag=True, help="Replace an existing page.")
def command(
    out: Output,
    *,
    model: str,
    making: Making,
    gating: GateOptions,
    unit: Literal["sample", "batch"],
    page: str | None,
    measure: bool,
    batch_size: int,
    rounds: int,
    overwrite: bool,
) -> int | None:
    """Shows the residual adds of MODEL, the gates they get, and what is left alone.

    Weights are random unless --checkpoint is given; they do not matter here.

    --measure takes training steps with masks and with skipped branches, and says from which drop rate
    skipping takes less. On one thread (OMP_NUM_THREADS=1) other work on the machine disturbs least.
    """
    import surgeon
    from surgeon._files import destination

    place = destination(page, overwrite=overwrite) if page else None
    with out.working(f"looking at {model}"):
        subject = load_subject(out, model, making)
        settings = gating.settings(subject.metadata)
        plan = surgeon.plan(subject.model, unit=unit, example=subject.example, **settings)
        steps = _measured(subject.model, plan, batch_size, rounds) if measure and plan.gates else None
    found = {"model": subject.spec, **plan.to_dict()}
    if plan.gates:
        if place is not None:
            asked = {"unit": unit, "scaling": settings["scaling"], "joins": plan.settings.paths}
            _write(place, found | asked)
            out.note(f"surgeon: the page is in {page}")
        more = {"measured": steps.to_dict()} if steps else {}
        parts = (*plan.parts(every=out.verbose), *(steps.parts() if steps else ()))
        out.result({**found, **more}, parts, of=subject.spec)
        return None
    out.note(f"surgeon: {subject.spec} has no residual add, so there is nothing to gate")
    shown = plan.parts(every=out.verbose) if plan.refused else ()
    out.result({**found, "exit_code": NOTHING}, shown, of=subject.spec)
    return NOTHING


def _measured(model: "nn.Module", plan: "Plan", batch: int, rounds: int) -> "Measured":
    from surgeon._measure import measure

    return measure(model, plan.settings, batch=batch, rounds=rounds)


def _write(place: Path, found: dict[str, Any]) -> None:
    from surgeon._files import beside, settle
    from surgeon.cli._page import page

    with beside(place) as folder:
        made = folder / place.name
        made.write_text(page(found), encoding="utf-8")
        settle(made, place)
