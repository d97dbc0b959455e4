"""What surgeon does with one version of PyTorch: eight models, seven features, pass or the reason why not.

    python -m benchmarks.versions                              # tries what is installed here
    python -m benchmarks.versions --models timm:resnet10t      # with some of the models
    python -m benchmarks.versions --page                       # writes the page alone

A row per environment is kept in ``docs/versions.jsonl`` and the page written from all of them, after each
model; what is tried again in an environment of the same versions takes the place of what was. Weights are
random, images are noise of 2 x 3 x 64 x 64 (or what the model is made for).
"""

import argparse
import functools
import importlib
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgeon

ROWS, PAGE = Path("docs/versions.jsonl"), Path("docs/versions.md")
MODELS = {  # with the side of the images
    "torchvision:resnet18": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:convnext_tiny": 64,
    "torchvision:swin_t": 64,
    "timm:vit_tiny_patch16_224": 224,
    "timm:resnet10t": 64,
    "timm:convnext_atto": 64,
    "timm:mobilenetv3_small_050": 64,
}
FEATURES = ("find", "train, sample", "train, batch", "evaluate", "save and load", "fold", "export")
PACKAGES = ("torchvision", "timm", "numpy", "safetensors", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
_HEAD = """# Versions

Written by `python -m benchmarks.versions` from what it ran, never by hand. A cell tells whether all
{count} models pass, or how many of those that were tried: {models}.

*find*: at least one residual add. *train*: two steps of SGD, for each unit. *evaluate*: bit-equal to the
model without gates. *save and load*: bit-equal. *fold*: the paper's scaling in the weights, to {close:g}.
*export*: folded, one plain ONNX file, which agrees with the gated model in ONNX Runtime.
"""
_CLOSE = 1e-4  # largest relative difference of a fold: float32 with weights that are rewritten


def _attempts(model: str, size: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The features, each as a function that raises if it does not work."""
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    def make(**gates: Any) -> nn.Module:
        torch.manual_seed(0)
        made = surgeon.load_model(model)
        return surgeon.apply(made, "linear", example=image, **gates) if gates else made

    # One of each, as making them is most of the work; training comes last, as it changes weights.
    gated = functools.cache(make)

    def find() -> int:
        found = surgeon.find(make(), example=image)
        assert found.residuals, "no residual add"
        return len(found.residuals)

    def evaluate() -> None:
        same = torch.equal(_output(gated(unit="sample"), image), _output(make(), image))
        assert same, "outputs differ"

    def save() -> None:
        one, other = gated(scaling="paper"), make(scaling="paper")
        surgeon.save_checkpoint(one, folder / "model.safetensors")
        with torch.no_grad():
            for weight in other.parameters():
                weight.zero_()
        surgeon.load(other, folder / "model.safetensors")
        assert torch.equal(_output(other, image), _output(one, image)), "outputs differ"

    def fold() -> None:
        one = gated(scaling="paper")
        folded, before = surgeon.fold(one, example=image), _output(one, image)
        error = float((_output(folded, image) - before).abs().max() / before.abs().max())
        assert error < _CLOSE, f"relative difference {error:.1e}"

    def export() -> None:
        one, path = gated(scaling="paper"), folder / "model.onnx"
        surgeon.export(one, path, example=image)
        assert surgeon.verify(one, path, example=image).ok, "the file does not match"

    def train(unit: str) -> None:
        one = gated(unit=unit).train()
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-3)
        for _ in range(2):
            loss = one(image).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.isfinite(), f"the loss is {loss.item()}"

    yield "find", find
    yield "evaluate", evaluate
    yield "save and load", save
    yield "fold", fold
    yield "export", export
    yield "train, sample", lambda: train("sample")
    yield "train, batch", lambda: train("batch")


def _output(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(image)
    return found


def environment() -> dict[str, Any]:
    """The versions that are installed here."""
    row = {"torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    return {**row, **{name: _installed(name) for name in PACKAGES}, "results": {}}


def measure(model: str) -> dict[str, Any]:
    """What came of each feature."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for feature, attempt in _attempts(model, MODELS[model], Path(folder)):
            try:
                results[feature] = {"pass": True, "found": attempt()}
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
                why = next(iter(str(error).splitlines()), "")
                results[feature] = {"pass": False, "why": f"{type(error).__name__}: {why}"}
    return results


def _installed(name: str) -> str:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return "-"


def page(rows: list[dict[str, Any]]) -> str:
    """The page of all rows."""
    names = ("torch", "python", *PACKAGES)
    head = _HEAD.format(count=len(MODELS), models=", ".join(f"`{name}`" for name in MODELS), close=_CLOSE)
    lines = [head, f"| PyTorch | Python | {' | '.join(FEATURES)} |", f"|---|---|{'---|' * len(FEATURES)}"]
    for row in rows:
        cells = [_cell(row, feature) for feature in FEATURES]
        lines.append(f"| {row['torch']} | {row['python']} | {' | '.join(cells)} |")
    lines += ["", "With these packages beside it:", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(row[name] for name in names)} |" for row in rows]
    failures: dict[str, list[str]] = {}
    for row in rows:
        for model, results in row["results"].items():
            for feature, result in results.items():
                if not result["pass"]:
                    why = f"PyTorch {row['torch']}, {feature}: {result['why']}"
                    failures.setdefault(why, []).append(model)
    told = [f"- {why} ({', '.join(models)})" for why, models in failures.items()]
    lines += ["", "## What fails, and why", "", *(told or ["Nothing."]), ""]
    return "\n".join(lines)


def _cell(row: dict[str, Any], feature: str) -> str:
    results = [results[feature]["pass"] for results in row["results"].values()]
    passed = "pass" if all(results) else "fail" if not any(results) else f"{sum(results)} pass"
    return passed if all(results) and len(results) == len(MODELS) else f"{passed} ({len(results)} tried)"


def _key(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    return [int(part) for part in row["torch"].split(".")[:2]], [int(n) for n in row["python"].split(".")[:2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--models", default=",".join(MODELS), help="some of the models, separated by commas")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    # The exporter reads the source of its operators at each call, half of its time; once will do.
    registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
    for model in () if options.page else options.models.split(","):
        start, results = time.process_time(), measure(model)
        failed = [f"{feature}: {result['why']}" for feature, result in results.items() if not result["pass"]]
        print(f"{model} {time.process_time() - start:.0f} s {'; '.join(failed) or 'all pass'}", flush=True)
        write(model, results)
    write()


def write(model: str | None = None, results: dict[str, Any] | None = None) -> None:
    """Puts results into this environment's row, and writes the page."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    if model:
        new = environment()
        for row in rows:
            new["results"] |= row["results"] if _key(row) == _key(new) else {}
        new["results"][model] = results
        rows = [row for row in rows if _key(row) != _key(new)] + [new]
    rows.sort(key=_key)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
