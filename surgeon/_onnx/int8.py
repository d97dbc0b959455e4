"""ONNX files in int8: ONNX Runtime's static quantisation, with the settings chosen on images.

Which settings keep a network's answers depends on the network, its images and the processor, and the defaults
may keep hardly any. So several are tried: weights per channel or per tensor, their range reduced to 7 bits,
which processors without VNNI need, and two ways to calibrate. Where none is good enough, the layers that lose
most stay in float. One half of the images calibrates and chooses, the other half measures what was chosen.
"""

import io
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from onnxruntime.quantization import qdq_loss_debug as debug
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from surgeon._onnx.parity import Array
from surgeon._text import Drawn, Part
from surgeon.errors import UsageError

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOAT_SHARES = (0.125, 0.25, 0.5, 0.75)
_LOOKED_AT = 4  # images that tell which layers lose most
_RUNS = 25


@dataclass(frozen=True, slots=True)
class Way:
    """Settings of a quantisation.

    Attributes:
        per_channel: Whether each channel of a weight has a scale of its own.
        reduced: Whether weights take 7 bits.
        calibration: How the range of values is found: ``"MinMax"`` or ``"Percentile"``.
        float_layers: Names of layers that stay in float.
    """

    per_channel: bool
    reduced: bool
    calibration: str
    float_layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        left = f", {len(self.float_layers)} layers in float" if self.float_layers else ""
        return (
            f"per {'channel' if self.per_channel else 'tensor'}, {7 if self.reduced else 8} bits, "
            f"{self.calibration}{left}"
        )


_WAYS = (
    Way(per_channel=False, reduced=False, calibration="MinMax"),  # ONNX Runtime's defaults
    Way(per_channel=True, reduced=False, calibration="MinMax"),
    Way(per_channel=True, reduced=True, calibration="MinMax"),
    Way(per_channel=True, reduced=False, calibration="Percentile"),
    Way(per_channel=True, reduced=True, calibration="Percentile"),
)


@dataclass(frozen=True, slots=True)
class Int8Trial:
    """One of the settings that were tried.

    Attributes:
        settings: Which.
        agreement: Share of the calibration images that get the answer of the float model.
        error: Root mean square of the difference of the outputs, over that of the float model's.
    """

    settings: str
    agreement: float
    error: float


@dataclass(frozen=True, slots=True)
class Int8Report(Drawn):
    """What came of a quantisation.

    Attributes:
        trials: The settings that were tried.
        chosen: The best of them.
        calibrated: Number of images that calibrated and chose.
        measured: Number of other images, on which the chosen file was measured.
        agreement: Share of those that get the answer of the float model.
        required: The share that is asked for.
        bytes: Size of the float file and of the int8 file.
        milliseconds: Median time of one image, float and int8.
        threads: With how many threads.
    """

    trials: tuple[Int8Trial, ...]
    chosen: str
    calibrated: int
    measured: int
    agreement: float
    required: float
    bytes: tuple[int, int]
    milliseconds: tuple[float, float]
    threads: int

    @property
    def ok(self) -> bool:
        """Whether enough answers are the same."""
        return self.agreement >= self.required

    def parts(self) -> Sequence[Part]:
        """The trials, and what the best is worth."""
        rows = tuple((one.settings, f"{one.agreement:.1%}", f"{one.error:.3f}") for one in self.trials)
        same = round(self.agreement * self.measured)
        (size, size8), (ms, ms8) = self.bytes, self.milliseconds
        lines = (
            f"chosen     {self.chosen}",
            f"agreement  {self.agreement:.1%}: {same} of {self.measured} other images answered as in float",
            f"size       {size8 / 1e6:.1f} MB, float {size / 1e6:.1f} MB",
            f"latency    {ms8:.1f} ms, float {ms:.1f} ms; one image, {self.threads} threads",
        )
        head = ("settings", f"agreement on {self.calibrated}", "error")
        return (Part("int8", head, rows, frozenset(head[1:]), lines),)


def to_int8(source: Path, place: Path, images: Sequence[Tensor], *, required: float = 0.99) -> Int8Report:
    """Writes the ONNX file ``source`` in int8 (QDQ) to ``place``, with the best of several settings.

    Args:
        source: A file with one input, a batch of images, and one output, their scores.
        place: The file to write; it is written whatever the agreement is.
        images: Batches of images as the model takes them, 4 images at least.
        required: The share of images whose answers have to be the same.

    Raises:
        UsageError: There are too few images, or the file is no classifier of images.
    """
    whole = torch.cat(list(images))
    if len(whole) < 4:
        raise UsageError(f"--int8 needs images to calibrate with and others to measure on, not {len(whole)}")
    calibrating, measuring = whole[::2].numpy(), whole[1::2].numpy()
    answers = _answers(source, calibrating)
    if answers.ndim != 2:
        raise UsageError(f"--int8 compares answers; outputs of shape {answers.shape} are no scores by class")
    with TemporaryDirectory(prefix="surgeon.") as folder, _silent():
        made = _Making(source, Path(folder), calibrating, answers, required)
        way, trials = made.best()
        made.write(way, place)
        agreement, _ = _compared(_answers(place, measuring), _answers(source, measuring))
        times = _times((source, place), measuring[:1])
    _tell(source, place, str(way))
    sizes = (source.stat().st_size, place.stat().st_size)
    counts = len(calibrating), len(measuring)
    return Int8Report(trials, str(way), *counts, agreement, required, sizes, times, torch.get_num_threads())


class _Making:
    """The trials for one file."""

    def __init__(self, source: Path, folder: Path, images: Array, answers: Array, required: float) -> None:
        self.folder, self.images, self.answers, self.required = folder, images, answers, required
        self.prepared = folder / "prepared.onnx"
        quant_pre_process(str(source), str(self.prepared), skip_symbolic_shape=True)

    def best(self) -> tuple[Way, tuple[Int8Trial, ...]]:
        """The settings that keep most answers, of several the one with the least error; and all trials."""
        found = {way: self.trial(way) for way in _WAYS}
        best = _first(found)
        if found[best].agreement < self.required:
            layers = self.by_loss(best)
            for share in _FLOAT_SHARES:
                way = replace(best, float_layers=tuple(layers[: round(share * len(layers))]))
                found[way] = self.trial(way)
                if found[way].agreement >= self.required:
                    break
        return _first(found), tuple(found.values())

    def trial(self, way: Way) -> Int8Trial:
        place = self.folder / "trial.onnx"
        self.write(way, place)
        return Int8Trial(str(way), *_compared(_answers(place, self.images), self.answers))

    def write(self, way: Way, place: Path) -> None:
        """Writes the file with these settings."""
        quantization.quantize_static(
            str(self.prepared),
            str(place),
            _Reader(self.prepared, self.images),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=way.per_channel,
            reduce_range=way.reduced,
            calibrate_method=quantization.CalibrationMethod[way.calibration],
            nodes_to_exclude=list(way.float_layers),
        )

    def by_loss(self, way: Way) -> list[str]:
        """The layers, those first whose outputs are furthest from the float model's."""
        place, seen = self.folder / "looked_at.onnx", []
        self.write(way, place)
        for path in (self.prepared, place):
            exposed = self.folder / f"exposed_{path.name}"
            debug.modify_model_output_intermediate_tensors(str(path), str(exposed))
            seen.append(debug.collect_activations(str(exposed), _Reader(path, self.images[:_LOOKED_AT])))
        floats, quantized = seen
        matched = debug.create_activation_matching(quantized, floats)
        errors = debug.compute_activation_error(matched)
        nodes = onnx.load(self.prepared, load_external_data=False).graph.node
        readers = {name: node for node in reversed(nodes) for name in node.input}
        noise = {
            node.name: _noise(errors, readers, node.output[0]) for node in nodes if node.op_type in _LAYERS
        }
        return sorted(noise, key=lambda name: noise[name])


def _noise(errors: dict[str, dict[str, float]], readers: dict[str, onnx.NodeProto], output: str) -> float:
    """Signal to noise where a layer's output is made whole numbers: often behind its activation."""
    while output not in errors and output in readers:
        output = readers[output].output[0]
    return errors[output]["qdq_err"] if output in errors else np.inf


def _first(found: dict[Way, Int8Trial]) -> Way:
    return max(found, key=lambda way: (found[way].agreement, -found[way].error))


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # it has no types
    """The images as onnxruntime.quantization asks for them, one after the other."""

    def __init__(self, path: Path, images: Array) -> None:
        self.name = onnx.load(path, load_external_data=False).graph.input[0].name
        self.images = iter(images)

    def get_next(self) -> dict[str, Array] | None:
        image = next(self.images, None)
        return None if image is None else {self.name: image[None]}


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _answers(path: Path, images: Array) -> Array:
    session = _session(path)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in images])


def _compared(found: Array, reference: Array) -> tuple[float, float]:
    same = float((found.argmax(1) == reference.argmax(1)).mean())
    return same, float(np.sqrt(np.square(found - reference).mean() / np.square(reference).mean()))


def _times(paths: tuple[Path, Path], image: Array) -> tuple[float, float]:
    """Median milliseconds of a run of each, in turns to share the machine's moods."""
    sessions = [_session(path) for path in paths]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(_RUNS + 3):
        for session, found in zip(sessions, seconds, strict=True):
            began = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: image})
            if turn >= 3:  # the first ones warm up
                found.append(time.perf_counter() - began)
    return 1e3 * median(seconds[0]), 1e3 * median(seconds[1])


def _tell(source: Path, place: Path, how: str) -> None:
    """Copies what a file says of itself, and adds how this one was made."""
    said = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
    model = onnx.load(place)
    onnx.helper.set_model_props(model, {**said, "int8": how})
    onnx.save(model, place)


@contextmanager
def _silent() -> Iterator[None]:
    """onnxruntime.quantization logs advice at the root, and prints how far it is."""
    logger, before = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
