"""``surgeon export``: a model as one plain ONNX file."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgeon.cli._complete import models
from surgeon.cli._gated import with_scales
from surgeon.cli._images import Measuring, batches, data_options
from surgeon.cli._run import DONE, MODEL_HELP, PARITY, Output
from surgeon.cli._run import command as surgeon_command
from surgeon.cli._shorten import Shortening, choose, shortening_options, told
from surgeon.cli._subject import GateOptions, Making, Subject, load_subject, model_options, schedule_options
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from surgeon._onnx.export_report import ExportReport

_EXAMPLES = """
surgeon export timm:resnet50 --checkpoint model.safetensors -o model.onnx
surgeon export torchvision:vit_b_16 --checkpoint last.pt -o vit.onnx --opset 23 --labels classes.txt
surgeon export timm:resnet50 --checkpoint paper.pt --scaling paper --drop-rate 0.5 -o model.onnx
surgeon export timm:convnext_atto --dynamic-size --fp16 -o half.onnx
surgeon export timm:resnet50 --checkpoint model.safetensors --depth 0.75 --data photos/val -o short.onnx
surgeon export timm:resnet50 --checkpoint model.safetensors --latency-budget 30 --data photos/val -o fast.onnx
surgeon export timm:resnet50 --checkpoint model.safetensors --int8 photos/val -o int8.onnx
surgeon export my_networks:tiny -o tiny.onnx --input-size 1x28x28 --overwrite --json
"""

# What a checkpoint remembers and an ONNX file should say too.
_CARRIED = ("mean", "std", "classes", "schedule", "drop_rate", "scaling", "unit")


@surgeon_command("export", "Write one plain ONNX file, checked.", examples=_EXAMPLES, more=MODEL_HELP)
@click.argument("model", shell_complete=models)
@click.option("-o", "--output", required=True, type=click.Path(), help="The ONNX file to write.")
@model_options
@schedule_options
@data_options
@shortening_options
@click.option("--opset", type=int, help="Version of ONNX's operators; default is PyTorch's.")
@click.option("--static-batch", is_flag=True, help="Fix the batch to one.")
@click.option("--dynamic-size", is_flag=True, help="Let height and width of the images vary.")
@click.option("--fp16", is_flag=True, help="Half precision inside; inputs and outputs stay float32.")
@click.option(
    "--int8", metavar="FOLDER", type=click.Path(), help="Whole numbers of 8 bits, calibrated on these images."
)
@click.option("--fuse-batchnorm", is_flag=True, help="Also take norms into the layers behind them.")
@click.option(
    "--optimize",
    type=click.Choice(["basic", "extended", "all"]),
    help="Let ONNX Runtime optimise the graph before it is written.",
)
@click.option(
    "--check-nodes", is_flag=True, help="Compare the nodes with the ungated model's; twice the time."
)
@click.option("--labels", type=click.Path(), help="A text file with one class name per line.")
@click.option("--tolerance", type=float, help="Largest relative error.  [default: 0.0001; 0.01 with --fp16]")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def command(  # noqa: PLR0913 - one for each option
    out: Output,
    *,
    model: str,
    output: str,
    making: Making,
    gating: GateOptions,
    measuring: Measuring,
    shortening: Shortening,
    opset: int | None,
    static_batch: bool,
    dynamic_size: bool,
    fp16: bool,
    int8: str | None,
    fuse_batchnorm: bool,
    optimize: str | None,
    check_nodes: bool,
    labels: str | None,
    tolerance: float | None,
    overwrite: bool,
) -> int:
    """Writes MODEL as one plain ONNX file, compared with PyTorch before it is in place.

    Weights trained with surgeon's default scaling, or never gated, are exported as they are. Weights trained
    by the paper's rule (--scaling paper, or a checkpoint that says so) get the schedule's evaluation scales
    folded into them first; name the schedule and the drop rate of the training.

    --drop-blocks deletes branches by name before the export, --depth 0.75 the quarter that is missed least on
    the images in --data, --latency-budget as many as it takes: the file is that of the shorter network, and
    it is measured beside the whole one.

    --int8 tries several settings of ONNX Runtime's static quantisation on half of the images, and measures
    the best on the other half: below 99 % of answers as in float nothing is written, and the exit code is 3.
    """
    import surgeon
    from surgeon._files import destination
    from surgeon._needs import need_export

    need_export("surgeon export")
    place = destination(output, overwrite=overwrite)
    if int8 is not None and fp16:
        raise UsageError("--int8 and --fp16 are two forms of one file; give one of them")
    names = _labels(labels)
    with out.working(f"exporting {model}"):
        subject = with_scales(load_subject(out, model, making), gating)
        choice = choose(out, subject, shortening, measuring)
        shorter = subject.model if choice is None else choice.shorter()
        export = functools.partial(
            surgeon.export,
            example=_one_sample(subject.example) if static_batch else subject.example,
            opset=opset,
            overwrite=overwrite,
            dynamic_batch=not static_batch,
            dynamic_size=dynamic_size,
            dtype="float16" if fp16 else "float32",
            fuse_batchnorm=fuse_batchnorm,
            optimize=optimize,
            check_nodes=check_nodes,
            metadata=_metadata(subject),
            labels=names,
            tolerance=tolerance,
        )
        if int8 is not None:
            images = batches(replace(measuring, data=int8, unlabelled=True), subject)
            return _quantized(out, subject, place, images, lambda path: export(shorter, path))
        report = export(shorter, output)
        found, shown = {"model": subject.spec, **report.to_dict()}, list(report.parts())
        if choice is not None:
            result = told(out, subject, shortening, choice, shorter, export, report)
            found, shown = {**found, "shorter": result.to_dict()}, [*shown, *result.parts()]
    if subject.random:
        out.note("surgeon: the weights are random; give --checkpoint to export trained ones")
    out.result(found, shown, of=subject.spec)
    return DONE


def _quantized(
    out: Output,
    subject: Subject,
    place: Path,
    images: "list[Tensor]",
    export: "Callable[[Path], ExportReport]",
) -> int:
    """Writes the int8 file, where its answers are those of the float one."""
    from surgeon._files import beside, settle
    from surgeon._onnx.int8 import to_int8

    with beside(place) as folder:
        exported = export(folder / "float.onnx")
        made = folder / place.name
        report = to_int8(Path(exported.path), made, images)
        if report.ok:
            settle(made, place)
    found = {"model": subject.spec, "path": str(place) if report.ok else None, **report.to_dict()}
    out.result(found, report.parts(), of=subject.spec)
    if not report.ok:
        out.note(
            f"surgeon: int8 keeps {report.agreement:.1%} of the answers, {report.required:.0%} are asked "
            "for. Nothing was written; --fp16 halves the file without such losses"
        )
    return DONE if report.ok else PARITY


def _one_sample(example: Any) -> Any:
    return None if example is None else example[:1]


def _labels(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the labels in {path}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _metadata(subject: Subject) -> dict[str, object]:
    """What the ONNX file says of the model, beyond what the model knows of itself."""
    from surgeon._source import normalisation

    noted = {key: subject.metadata[key] for key in _CARRIED if key in subject.metadata}
    if "classes" in noted:
        noted["labels"] = json.dumps(json.loads(noted.pop("classes")))
    return {"model": subject.spec, **normalisation(subject.spec), **noted}
