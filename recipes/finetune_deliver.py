"""What `finetune.py` hands over: folded checkpoint, ONNX file, and evidence that they are the network.

Every claim is checked on the whole held-out split, sample by sample: a stock network that loads the folded
checkpoint against the gated network, and ONNX Runtime against that stock network.
"""

import copy
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from finetune_config import Config
from finetune_data import Images
from finetune_log import write_text
from finetune_model import fresh_network
from finetune_plot import plot_survival
from torch import Tensor, nn
from torch.utils.data import DataLoader

import surgeon


def deliver(
    settings: Config,
    gated: nn.Module,
    images: Images,
    device: torch.device,
    before: dict[str, float],
    after: dict[str, float],
) -> dict[str, Any]:
    """Folds, saves, exports, compares, times and plots; prints and returns the report. `gated` stays so."""
    output, status = settings.output, surgeon.status(gated)
    folded = surgeon.fold(gated)
    metadata = _metadata(settings, images)
    files = [surgeon.save_checkpoint(folded, output / "model.safetensors", metadata)]
    stock = fresh_network(settings.model, len(images.classes), output / "model.safetensors").eval()

    logits, targets = predict(gated, images, settings.train.batch_size)
    plain, _ = predict(stock, images, settings.train.batch_size)
    report: dict[str, Any] = {
        "gates": len(status.gates),
        "expected_depth": status.expected_depth,
        "samples": len(targets),
        "before": before["top1"],
        "after": after["top1"],
        "stock": _compared(plain, logits, targets),
    }
    if settings.deliver.onnx:
        place = output / "model.onnx"
        example = torch.zeros(2, *images.input_size)
        exported = surgeon.export(
            gated, place, example=example, overwrite=True, metadata=metadata, labels=images.classes
        )
        report["parity"] = surgeon.verify(stock, place, example=example).require().as_dict()
        report["onnx"] = {
            "nodes": sum(exported.nodes.values()),
            "gates_folded": len(exported.folded),
            "gates_kept": len(exported.kept),
            **_compared(predict_onnx(place, images, settings.train.batch_size), plain, targets),
        }
        files.append(place)
    if settings.deliver.timing_steps:
        report["step_seconds"] = time_steps(gated, images, settings, device)
    if settings.deliver.plot:
        gates = settings.gates
        title = f"{settings.model.name}: {gates.schedule} schedule, drop rate {gates.drop_rate}"
        files.append(plot_survival(status, title, output / "survival.png"))
    report["files"] = [str(output / name.name) for name in files]
    report["files"] += [str(output / name) for name in ("metrics.jsonl", "config.yaml", "last.pt")]
    write_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    print("\n".join(_lines(report, settings)))
    return report


@torch.no_grad()
def predict(model: nn.Module, images: Images, batch_size: int) -> tuple[Tensor, Tensor]:
    """The logits and the targets of the whole held-out split, on the CPU."""
    model.eval()
    pairs = [(model(batch), targets) for batch, targets in DataLoader(images.test, batch_size)]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([targets for _, targets in pairs])


def predict_onnx(path: Path, images: Images, batch_size: int) -> Tensor:
    """The logits that ONNX Runtime computes for the held-out split."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    batches = DataLoader(images.test, batch_size)
    return torch.cat([torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0]) for x, _ in batches])


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


def _metadata(settings: Config, images: Images) -> dict[str, object]:
    gates = settings.gates
    return {
        "model": settings.model.name,
        "model_kwargs": settings.model.kwargs or None,
        "input_size": list(images.input_size),
        "mean": list(images.mean),
        "std": list(images.std),
        "schedule": gates.schedule if isinstance(gates.schedule, str) else list(gates.schedule),
        "drop_rate": gates.drop_rate,
        "unit": gates.unit,
        "scaling": gates.scaling,
    }


def _lines(report: dict[str, Any], settings: Config) -> list[str]:
    """The report in lines of at most 80 characters."""
    total, stock = report["samples"], report["stock"]
    paper = settings.gates.scaling == "paper"
    rule = "branches times p_l, the paper's rule" if paper else "branches as they are"
    work = "wrote p_l into the weights" if paper else "had nothing to write"
    lines = [
        "",
        f"before      top-1 {report['before']:6.2f} %   new head, {total} held-out images",
        f"after       top-1 {report['after']:6.2f} %   gated network, {rule}",
        f"folded      top-1 {stock['top1']:6.2f} %   the fold {work};",
        "                             a stock network with model.safetensors:",
        f"                             {stock['disagree']} of {total} answers differ,",
        f"                             logits by at most {stock['max_difference']:.1e}",
    ]
    if onnx := report.get("onnx"):
        gates = f"{onnx['gates_folded']} gates folded, {onnx['gates_kept']} left as a Mul"
        lines += [
            f"ONNX file   top-1 {onnx['top1']:6.2f} %   in ONNX Runtime, against that stock network:",
            f"                             {onnx['disagree']} of {total} answers differ,",
            f"                             logits by at most {onnx['max_difference']:.1e};",
            f"                             {onnx['nodes']} nodes, {gates}",
        ]
    if seconds := report.get("step_seconds"):
        gated, plain = (1000 * seconds[name] for name in ("gated", "plain"))
        lines += [
            f"step time   {gated:.1f} ms with gates, {plain:.1f} ms without: {gated / plain:.2f}",
            f"            (medians of {settings.deliver.timing_steps} each, taken in turns)",
        ]
    return [*lines, "", "wrote", *(f"  {name}" for name in report["files"])]
