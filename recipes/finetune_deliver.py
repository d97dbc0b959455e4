"""What `finetune.py` hands over: folded checkpoint, ONNX file, and evidence that they are the network.

Every claim is checked on the whole held-out split, sample by sample: a stock network that loads the folded
checkpoint against the gated network, and ONNX Runtime against that stock network.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from finetune_data import Images
from finetune_files import explained, write_text
from finetune_log import epochs_of
from finetune_model import fresh_network
from finetune_plot import plot_curves, plot_survival
from finetune_report import facts, model_card, report_page, timm_config
from finetune_settings import Config
from finetune_show import Display
from torch import Tensor, nn
from torch.utils.data import DataLoader

import surgeon


def deliver(
    settings: Config,
    trained: nn.Module,
    images: Images,
    device: torch.device,
    display: Display,
    figures: dict[str, Any],
    there: set[Path],
    gone: Sequence[str] = (),
) -> dict[str, Any]:
    """Folds, saves, exports, compares, times and plots; prints and returns the report. `trained` stays so.

    Args:
        settings: Of the run.
        trained: The network, gated unless `gates` is null.
        images: As it saw them.
        device: Where it is evaluated.
        display: Shows how far the work is.
        figures: Of the held-out split, "before" and "after", and "ungated" if there was a second training.
        there: Files of the output folder that are not this run's.
        gone: Names of the branches that were deleted before the training.
    """
    output = settings.output
    status = surgeon.status(trained) if settings.gates else None
    told, example = facts(settings, images, gone), torch.zeros(2, *images.input_size)
    with explained(output, "Free some space; resume=true delivers what is trained"):
        plain = surgeon.fold(trained) if status else trained
        surgeon.save_checkpoint(plain, output / "model.safetensors", told)
        weights = output / "model.safetensors"
        stock = fresh_network(
            settings.model, settings.data.image_size, len(images.classes), weights, gone, example
        ).eval()
        report: dict[str, Any] = {
            "gates": len(status.gates) if status else 0,
            "expected_depth": status.expected_depth if status else None,
            "samples": len(images.test),
            "deleted": list(gone),
            **{name: figures[name]["top1"] for name in ("before", "after", "ungated") if name in figures},
        }
        logits, targets = predict(on(trained, device), images, settings, display, "gated")
        trained.cpu()
        answers, _ = predict(on(stock, device), images, settings, display, "folded")
        stock.cpu()
        report["stock"] = _compared(answers, logits, targets)
        if settings.deliver.onnx:
            place = output / "model.onnx"
            exported = surgeon.export(
                trained, place, example=example, overwrite=True, metadata=told, labels=images.classes
            )
            report["parity"] = surgeon.verify(stock, place, example=example).require().to_dict()
            run = predict(_session(place), images, settings, display, "ONNX")[0]
            report["onnx"] = {
                "nodes": sum(exported.nodes.values()),
                "gates_folded": len(exported.folded),
                "gates_kept": len(exported.kept),
                **_compared(run, answers, targets),
            }
        if settings.deliver.timing_steps and status:
            report["step_seconds"] = time_steps(trained, images, settings, device)
        _write_pages(settings, images, stock, status, report)
    report["files"] = sorted(str(path) for path in _written(output, there))
    write_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    print("\n".join(_lines(report, settings)))
    return report


def on(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model on a device, as a function of images on the CPU; the logits come back to it."""
    model.to(device).eval()
    return lambda batch: model(batch.to(device, non_blocking=True)).float().cpu()


@torch.no_grad()
def predict(
    run: Callable[[Tensor], Tensor], images: Images, settings: Config, display: Display, what: str
) -> tuple[Tensor, Tensor]:
    """The logits and the targets of the whole held-out split."""
    batches = DataLoader(images.test, settings.train.batch_size, num_workers=settings.data.workers)
    logits, targets = [], []
    with display.bar(what, len(batches)) as advance:
        for batch, labels in batches:
            logits.append(run(batch))
            targets.append(labels)
            advance()
    return torch.cat(logits), torch.cat(targets)


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in ONNX Runtime, as a function of images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda batch: torch.from_numpy(session.run(None, {entry.name: batch.numpy()})[0])


def _write_pages(
    settings: Config, images: Images, stock: nn.Module, status: Any, report: dict[str, Any]
) -> None:
    """What others read: timm's config, the model card, the report with its curves."""
    output = settings.output
    if not report["deleted"]:  # timm makes networks of their full depth only
        timm_config(stock, settings, images, output / "config.json")
    pictures = []
    curves = {"gated" if status else "network": epochs_of(output / "metrics.jsonl")}
    if settings.compare:
        curves["ungated"] = epochs_of(output / "ungated" / "metrics.jsonl")
    if settings.deliver.plot:
        pictures.append(plot_curves(curves, output / "curves.png"))
        if status and settings.gates:
            gates = settings.gates
            title = f"{settings.model.name}: {status.schedule} schedule, drop rate {gates.drop_rate}"
            pictures.append(plot_survival(status, title, output / "survival.png"))
    write_text(output / "README.md", model_card(settings, images, report))
    write_text(output / "report.md", report_page(settings, report, status, curves, pictures))


def _written(output: Path, there: set[Path]) -> set[Path]:
    """The files of the run, the report that is about to be written among them."""
    files = {path for path in output.rglob("*") if path.is_file() and not path.name.startswith(".")}
    return (files - there) | {output / "report.json"}


def time_steps(gated: nn.Module, images: Images, settings: Config, device: torch.device) -> dict[str, float]:
    """Median seconds of a training step with gates and without, in turns to share the machine's moods."""
    batch = next(iter(DataLoader(images.train, settings.train.batch_size)))
    models = {"gated": copy.deepcopy(gated), "plain": surgeon.remove(copy.deepcopy(gated))}
    steppers = {name: _stepper(model.to(device).train(), batch, device) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for round_ in range(settings.deliver.timing_steps + 3):
        for name, step in steppers.items():
            started = time.perf_counter()
            step()
            if round_ >= 3:  # the first ones warm up
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def _stepper(model: nn.Module, batch: list[Tensor], device: torch.device) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    images, targets = (tensor.to(device) for tensor in batch)

    def step() -> None:
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return step


def _compared(logits: Tensor, reference: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy in percent, and how far the logits are from those they should equal."""
    return {
        "top1": 100 * (logits.argmax(1) == targets).double().mean().item(),
        "disagree": int((logits.argmax(1) != reference.argmax(1)).sum()),
        "max_difference": (logits - reference).abs().max().item(),
    }


def _lines(report: dict[str, Any], settings: Config) -> list[str]:
    """The report in lines of at most 80 characters."""
    total, stock, gates = report["samples"], report["stock"], settings.gates
    paper = gates is not None and gates.scaling == "paper"
    rule = "branches times p_l, the paper's rule" if paper else "branches as they are"
    work = "wrote p_l into the weights" if paper else "had nothing to write"
    lines = [
        "",
        f"before      top-1 {report['before']:6.2f} %   new head, {total} held-out images",
        f"after       top-1 {report['after']:6.2f} %   {f'gated network, {rule}' if gates else 'no gates'}",
    ]
    if "ungated" in report:
        lines.append(f"ungated     top-1 {report['ungated']:6.2f} %   the same training without gates")
    lines += [
        f"folded      top-1 {stock['top1']:6.2f} %   the fold {work};",
        "                             a stock network with model.safetensors:",
        f"                             {stock['disagree']} of {total} answers differ,",
        f"                             logits by at most {stock['max_difference']:.1e}",
    ]
    if onnx := report.get("onnx"):
        kept = f"{onnx['gates_folded']} gates folded, {onnx['gates_kept']} left as a Mul"
        lines += [
            f"ONNX file   top-1 {onnx['top1']:6.2f} %   in ONNX Runtime, against that stock network:",
            f"                             {onnx['disagree']} of {total} answers differ,",
            f"                             logits by at most {onnx['max_difference']:.1e};",
            f"                             {onnx['nodes']} nodes, {kept}",
        ]
    if seconds := report.get("step_seconds"):
        gated, plain = (1000 * seconds[name] for name in ("gated", "plain"))
        lines += [
            f"step time   {gated:.1f} ms with gates, {plain:.1f} ms without: {gated / plain:.2f}",
            f"            (medians of {settings.deliver.timing_steps} each, taken in turns)",
        ]
    return [*lines, "", "wrote", *(f"  {name}" for name in report["files"])]
