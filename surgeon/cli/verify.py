"""``surgeon verify``: an ONNX file against a PyTorch model."""

import click

from surgeon.cli._complete import models
from surgeon.cli._gated import with_scales
from surgeon.cli._run import DONE, MODEL_HELP, PARITY, Output
from surgeon.cli._run import command as surgeon_command
from surgeon.cli._subject import GateOptions, Making, load_subject, model_options, schedule_options

_EXAMPLES = """
surgeon verify model.onnx timm:resnet50 --checkpoint model.safetensors
surgeon verify model.onnx torchvision:vit_b_16 --checkpoint last.pt --tolerance 1e-5
surgeon verify model.onnx my_networks:tiny --checkpoint tiny.safetensors --json
"""


@surgeon_command("verify", "Compare an ONNX file with a model.", examples=_EXAMPLES, more=MODEL_HELP)
@click.argument("file", type=click.Path())
@click.argument("model", shell_complete=models)
@model_options
@schedule_options
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 3),
    show_default=True,
    help="Sizes to compare at; may be repeated.",
)
@click.option("--tolerance", type=float, help="Largest relative error.  [default: 0.0001; 0.01 in float16]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs.")
def command(
    out: Output,
    *,
    file: str,
    model: str,
    making: Making,
    gating: GateOptions,
    batch_sizes: tuple[int, ...],
    tolerance: float | None,
    seed: int,
) -> int:
    """Compares the ONNX file FILE with MODEL on random and extreme inputs, and searches its graph.

    Outputs have to agree at every batch size, and the graph may hold nothing random, no gate, no node in
    training mode and no control flow. Where they do not agree, the node at which the two part is named.
    Weights come from --checkpoint; without it MODEL's are random, and nothing can agree. The options of the
    schedule are as for export.
    """
    from surgeon import verify
    from surgeon._onnx.file import open_onnx

    with out.working(f"comparing {file} with {model}"):
        with open_onnx(file):  # A bad file is said before a large model is made.
            pass
        subject = with_scales(load_subject(out, model, making), gating)
        report = verify(
            subject.model,
            file,
            example=subject.example,
            batch_sizes=batch_sizes,
            tolerance=tolerance,
            seed=seed,
        )
    out.result({"model": subject.spec, **report.to_dict()}, report.parts())
    if not report.ok:
        hint = "; the weights of the model are random, give --checkpoint" if subject.random else ""
        out.note(f"surgeon: {report.fault}{hint}")
    return DONE if report.ok else PARITY
