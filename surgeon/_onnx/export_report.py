"""What an export says of itself."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from surgeon._onnx.parity import ParityReport, ParityRow
from surgeon._text import Listed, Part


@dataclass(frozen=True, slots=True)
class ExportReport(Listed[ParityRow]):
    """What an export wrote, and how it was checked; iterating gives the rows of the comparison.

    Attributes:
        path: The ONNX file.
        data: The file of weights beside it, for models above 2 GB; else None.
        bytes: Size of both together.
        opset: Version of ONNX's operators.
        inputs: Shape of each input; the batch is a name where it may vary.
        nodes: How many nodes of each operator, most frequent first.
        folded: Names of the gates that left no node behind.
        kept: Names of the gates that left a multiplication, each with the reason.
        parity: The comparison with the PyTorch model in ONNX Runtime.
        metadata: What the file says of itself.
        seconds: Time of the whole export.
    """

    path: str
    data: str | None
    bytes: int
    opset: int
    inputs: dict[str, tuple[int | str, ...]]
    nodes: dict[str, int]
    folded: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]
    parity: ParityReport
    metadata: dict[str, str]
    seconds: float

    def _entries(self) -> Sequence[ParityRow]:
        return self.parity.rows

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {**asdict(self), "parity": self.parity.to_dict()}

    def parts(self) -> Sequence[Part]:
        """What was written, and the comparison."""
        width = max(len(name) for name, _ in self._facts())
        facts = tuple(f"{name:<{width}}  {value}" for name, value in self._facts())
        return (Part(lines=facts), *self.parity.parts())

    def _facts(self) -> Iterator[tuple[str, str]]:
        beside = ", weights beside it" if self.data else ""
        yield "file", f"{self.path} ({_size(self.bytes)}{beside})"
        for name, shape in self.inputs.items():
            yield "input", f"{name} {' x '.join(map(str, shape))}"
        yield "opset", str(self.opset)
        listed = ", ".join(f"{number} {op}" for op, number in self.nodes.items())
        yield "nodes", f"{sum(self.nodes.values())}: {listed}"
        if self.folded or self.kept:
            kept = f", {len(self.kept)} kept as a multiplication" if self.kept else ""
            yield "gates", f"{len(self.folded)} folded{kept}"
        for name, reason in self.kept:
            yield "", f"{name}: {reason}"
        yield "time", f"{self.seconds:.1f} s"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"
