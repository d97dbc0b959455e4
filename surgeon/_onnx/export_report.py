"""What an export says of itself."""

from dataclasses import asdict, dataclass
from typing import Any

from surgeon._onnx.parity import ParityReport


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote, and how it was checked.

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

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {**asdict(self), "parity": self.parity.as_dict()}

    def __str__(self) -> str:
        inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.inputs.items())
        gates = f"{len(self.folded)} folded, {len(self.kept)} kept as a multiplication"
        lines = [
            f"{self.path}: {self.bytes / 1e6:.1f} MB, opset {self.opset}, {inputs}",
            f"{sum(self.nodes.values())} nodes: {', '.join(f'{op} {n}' for op, n in self.nodes.items())}",
            *([f"gates: {gates}"] if self.folded or self.kept else []),
            *[f"  {name}: {reason}" for name, reason in self.kept],
            str(self.parity),
        ]
        return "\n".join(lines)
