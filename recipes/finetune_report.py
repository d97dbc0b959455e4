"""What `finetune.py` writes for others to read: facts in the files, timm's config, a model card, a report."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune_data import Images
from finetune_files import write_text
from finetune_model import library
from finetune_settings import Config
from timm.models import save_for_hf
from torch import nn

from surgeon._source import LIBRARIES


def facts(settings: Config, images: Images, gone: Sequence[str]) -> dict[str, object]:
    """What a user of the weights must know, for the metadata of model.safetensors and model.onnx."""
    gates, known = settings.gates, images.known
    found = {
        "model": settings.model.name,
        "model_args": _arguments(settings, images) or None,
        "classes": list(images.classes),
        "pruned": list(gone) or None,
        **{name: _plain(known[name]) for name in _PREPARATION},
    }
    if gates is not None:
        found |= {
            "schedule": gates.schedule if isinstance(gates.schedule, str) else list(gates.schedule),
            "drop_rate": gates.drop_rate,
            "unit": gates.unit,
            "scaling": gates.scaling,
        }
    return found


def _arguments(settings: Config, images: Images) -> dict[str, Any]:
    """What makes the network with its new head; one of your own makes it as it likes."""
    makes = library(settings.model) in LIBRARIES and not settings.model.keep_head
    head = {"num_classes": len(images.classes)} if makes else {}
    return settings.model.kwargs | head


_PREPARATION = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def timm_config(stock: nn.Module, settings: Config, images: Images, path: Path) -> Path:
    """Writes the `config.json` by which timm makes the model: `timm.create_model("local-dir:FOLDER")`.

    One of another library gets the same facts, under the name that `surgeon.load_model` knows.
    """
    known = {name: _plain(images.known[name]) for name in _PREPARATION}
    if library(settings.model) == "timm":
        told = {"pretrained_cfg": known, "label_names": list(images.classes)}
        with TemporaryDirectory() as folder:  # timm writes the weights along; they are here already
            save_for_hf(stock, folder, told, safe_serialization=True)
            written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        for name in ("test_input_size", "test_pool_size", "test_crop_pct"):  # advice for other weights
            written["pretrained_cfg"].pop(name, None)
        return write_text(path, json.dumps(written, indent=2) + "\n")
    config = {
        "architecture": settings.model.name,
        "num_classes": len(images.classes),
        "label_names": list(images.classes),
        "model_args": settings.model.kwargs,
        "pretrained_cfg": known,
    }
    return write_text(path, json.dumps(config, indent=2) + "\n")


def model_card(settings: Config, images: Images, report: dict[str, Any]) -> str:
    """README.md of the folder, as the Hugging Face hub shows it."""
    name, known, top1 = settings.model.name, images.known, report["stock"]["top1"]
    home, bare = library(settings.model), name.rpartition(":")[2]
    resized = round(known["input_size"][1] / known["crop_pct"])
    size = "x".join(map(str, known["input_size"]))
    shown = ", ".join(images.classes[:12]) + (", ..." if len(images.classes) > 12 else "")
    load = {
        "timm": 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))\n"
        'logits = model(transform(image.convert("RGB")).unsqueeze(0))',
    }.get(home, f'import surgeon\n\nmodel = surgeon.load_model("{name}", checkpoint="model.safetensors")')
    deleted = f", without {len(gone)} branches" if (gone := report["deleted"]) else ""
    if gone:
        load = (
            f'import surgeon\n\nmodel = surgeon.load_model("{name}", num_classes={len(images.classes)})\n'
            f"model = surgeon.prune(model, {gone})\n"
            'surgeon.load(model, "model.safetensors")'
        )
    start = "from its published weights" if settings.model.pretrained else "from random weights"
    start = f"from {settings.model.checkpoint}" if settings.model.checkpoint else start
    return f"""---
library_name: {"timm" if home == "timm" else "pytorch"}
tags:
- image-classification
- {"timm" if home == "timm" else "pytorch"}
---
# {bare}, {len(images.classes)} classes

`{name}` trained {start} on {len(images.train):,} images: top-1 {top1:.2f} % of {report["samples"]:,} held-out
images. The file is a stock checkpoint{deleted}: {_history(settings)}

```python
{load}
```

| | |
|---|---|
| classes | {shown} |
| input | {size}, values in 0 to 1, less mean {_short(known["mean"])}, over std {_short(known["std"])} |
| resized to | {resized} pixels, {known["interpolation"]}; then the centre |
| pictures | upright by EXIF; 16 bits scaled to 8; on white where transparent |

`model.onnx`, where it is, has the same facts among its properties; `report.md` tells how it was trained.
"""


def report_page(
    settings: Config, report: dict[str, Any], status: Any, curves: dict[str, Any], pictures: list[Path]
) -> str:
    """report.md: what was trained, what came of it, and how it went."""
    train, plan = settings.train, settings.optimizer
    rows = [("before", report["before"], "new head"), ("after", report["after"], "as trained")]
    if "ungated" in report:
        rows.append(("ungated", report["ungated"], "the same training without gates"))
    rows.append(("folded", report["stock"]["top1"], "stock network with model.safetensors"))
    if "onnx" in report:
        rows.append(("ONNX", report["onnx"]["top1"], "model.onnx in ONNX Runtime"))
    parts = [
        f"# {settings.model.name}",
        (
            f"{train.epochs} epochs, batches of {train.batch_size} x {train.accumulate} images, {plan.name}, "
            f"learning rate {plan.lr:g} ({plan.decay}), seed {settings.seed}; every setting is in "
            "`config.yaml`, versions and machine are in `env.json`."
        ),
        _table(("network", "top-1 %", ""), [(name, f"{top1:.2f}", note) for name, top1, note in rows]),
        (
            f"Of {report['samples']:,} held-out images {report['stock']['disagree']} got another answer from "
            f"the folded network; logits differ by at most {report['stock']['max_difference']:.1e}."
        ),
    ]
    if seconds := report.get("step_seconds"):
        gated, plain = seconds["gated"], seconds["plain"]
        parts.append(
            f"A step takes {1000 * gated:.1f} ms with gates and {1000 * plain:.1f} ms without: "
            f"{gated / plain:.2f}."
        )
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    parts += [_epochs(name, lines) for name, lines in curves.items()]
    if status is not None:
        parts.append(f"## Gates\n\n```\n{status}\n```")
    return "\n\n".join(parts) + "\n"


def _epochs(name: str, lines: list[dict[str, Any]]) -> str:
    head = ("epoch", "train loss", "held-out loss", "top-1 %", "learning rate", "depth", "images/s", "s")
    keys = ("epoch", "train_loss", "loss", "top1", "lr", "depth", "images_per_second", "seconds")
    forms = ("d", ".4f", ".4f", ".2f", ".2g", ".2f", ".0f", ".1f")
    rows = [
        tuple(
            "" if line.get(key) is None else f"{line[key]:{form}}"
            for key, form in zip(keys, forms, strict=True)
        )
        for line in lines
    ]
    return f"## Epochs, {name}\n\n{_table(head, rows)}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _history(settings: Config) -> str:
    gates = settings.gates
    if gates is None:
        return "it was trained without stochastic depth."
    rates = f"{gates.schedule}, drop rate {gates.drop_rate:g}"
    return f"it was trained with stochastic depth ({rates}), which is folded away."


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(numbers: Any) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)
