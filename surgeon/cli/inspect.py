"""``surgeon inspect``: which residual adds a model has, and what a schedule makes of them."""

from dataclasses import asdict
from typing import Any, Literal

import click

from surgeon.cli._run import MODEL_HELP, NOTHING, Output
from surgeon.cli._run import command as surgeon_command
from surgeon.cli._subject import GateOptions, Making, Subject, load_subject, model_options, schedule_options

_EXAMPLES = """
surgeon inspect timm:resnet50
surgeon inspect torchvision:convnext_tiny --schedule uniform --drop-rate 0.2
surgeon inspect timm:vit_tiny_patch16_224 --exclude '*.attn*' --json
surgeon inspect my_networks:tiny --input-size 1x28x28 --model-arg width=64
"""


@surgeon_command(
    "inspect", "Show the residual adds and the gates they get.", examples=_EXAMPLES, more=MODEL_HELP
)
@click.argument("model")
@model_options
@schedule_options
@click.option("--unit", type=click.Choice(["sample", "batch"]), default="sample", show_default=True)
def command(
    out: Output,
    *,
    model: str,
    making: Making,
    gating: GateOptions,
    unit: Literal["sample", "batch"],
) -> int | None:
    """Shows the residual adds of MODEL, the gates they get, and what is left alone.

    Weights are random unless --checkpoint is given; they do not matter here.
    """
    import surgeon
    from surgeon import _table

    with out.working(f"looking at {model}"):
        subject = load_subject(model, making)
        settings = gating.settings(subject.metadata)
        chosen = {name: settings[name] for name in ("include", "exclude")}
        findings = surgeon.find(subject.model, subject.example, **chosen)
        if not findings.residuals:
            return _nothing(out, subject, findings)
        surgeon.apply(subject.model, unit=unit, example=subject.example, **settings)
        status = surgeon.status(subject.model)
    found = {
        "model": subject.spec,
        "gates": _table.gate_rows(status, findings),
        "refused": [asdict(refusal) for refusal in findings.refused],
        "schedule": status.schedule,
        "expected_depth": status.expected_depth,
        "expected_flops": status.expected_flops,
        "flops": findings.flops,
    }
    out.result(found, *_table.inspection(subject.spec, status, findings, every=out.verbose))
    return None


def _nothing(out: Output, subject: Subject, findings: Any) -> int:
    from surgeon import _table

    refused = [asdict(refusal) for refusal in findings.refused]
    out.note(f"surgeon: {subject.spec} has no residual add, so there is nothing to gate")
    shown = _table.refusals(findings.refused, every=out.verbose) if refused else ()
    out.result({"model": subject.spec, "gates": [], "refused": refused, "exit_code": NOTHING}, *shown)
    return NOTHING
