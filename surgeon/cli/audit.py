"""``surgeon audit``: the stochastic depth that a model brings along, and what is wrong with it."""

import dataclasses

import click

from surgeon.cli._complete import models
from surgeon.cli._run import DONE, FAILED, MODEL_HELP, NOTHING, Output
from surgeon.cli._run import command as surgeon_command
from surgeon.cli._subject import Making, load_subject, model_options
from surgeon.errors import UsageError

_EXAMPLES = """
surgeon audit timm:efficientnet_b0 --drop-rate 0.3
surgeon audit torchvision:convnext_tiny
surgeon audit timm:lcnet_050 --drop-rate 0.1 --json
surgeon audit my_networks:tiny --input-size 1x28x28
"""

_MEANING = """\
A site is a module without parameters that drops whole rows at random in training, whatever its class.
Exit code 1 says that a site is never called, or that it sits on a shortcut or has none beside it, so that a
drop takes the signal away; 4 that the model has no stochastic depth."""


@surgeon_command(
    "audit",
    "Check the stochastic depth a model already has.",
    examples=_EXAMPLES,
    more=f"{_MEANING}\n\n{MODEL_HELP}",
)
@click.argument("model", shell_complete=models)
@model_options
@click.option(
    "--drop-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Build a timm model with this drop_path_rate; by default it is 0.",
)
def command(out: Output, *, model: str, making: Making, drop_rate: float | None) -> int:
    """Lists the stochastic depth that is already in MODEL: its rate, and where each of it acts."""
    from surgeon._audit import audit
    from surgeon._source import resolve

    if drop_rate is not None:
        if not resolve(model).startswith("timm:"):
            raise UsageError(
                f"--drop-rate is for timm's models, and {model!r} is none; give its maker's own argument, "
                "as --model-arg stochastic_depth_prob=0.2"
            )
        given = (*making.model_args, f"drop_path_rate={drop_rate}")
        making = dataclasses.replace(making, model_args=given)
    with out.working(f"looking at {model}"):
        subject = load_subject(out, model, making)
        report = audit(subject.model, subject.example)
    found = {"model": subject.spec, **report.to_dict()}
    if not report.sites and not report.random:
        hint = ""
        if drop_rate is None and subject.spec.startswith("timm:"):
            hint = "; --drop-rate 0.3 builds it with some, where its maker takes a rate"
        out.note(f"surgeon: {subject.spec} has no stochastic depth{hint}")
        out.result({**found, "exit_code": NOTHING})
        return NOTHING
    code = DONE if report.ok else FAILED
    out.result({**found, "exit_code": code}, report.parts(), of=subject.spec)
    return code
