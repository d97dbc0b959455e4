"""Every error surgeon raises on purpose.

One root, so that ``except surgeon.SurgeonError`` catches all of them; each subclass also inherits the
builtin it specialises. A message names what failed, on which module, with which value, why, and what
to do next.
"""

from typing import Any


class SurgeonError(Exception):
    """Root of all errors raised by surgeon."""


class UnsupportedTorchError(SurgeonError, ImportError):
    """This version of PyTorch is too old, or lacks something that surgeon needs."""


class MissingPackageError(SurgeonError, ImportError):
    """A package that only this feature needs is not installed, or too old."""


class UsageError(SurgeonError, ValueError):
    """An argument is outside its range, unknown, or does not fit the model."""


class NoResidualsError(SurgeonError, ValueError):
    """The model has no residual add that may be gated."""


class AlreadyGatedError(SurgeonError, RuntimeError):
    """The model already carries gates."""


class NotGatedError(SurgeonError, RuntimeError):
    """The model carries no gates, and the call needs some."""


class WrappedModelError(SurgeonError, TypeError):
    """The model is wrapped (DDP, FSDP, EMA, torch.compile, ...); surgery needs the plain module."""


class RecordError(SurgeonError, RuntimeError):
    """The model could not be run on the example."""


class TraceError(SurgeonError, RuntimeError):
    """A block's ``forward`` could not be traced."""


class UnseenCallError(SurgeonError, RuntimeError):
    """A gated block was called in a way that its trace does not cover."""


class FoldError(SurgeonError, RuntimeError):
    """A fold failed; nothing was changed."""


class PruneError(SurgeonError, RuntimeError):
    """A branch cannot be deleted; nothing was changed."""


class ExportError(SurgeonError, RuntimeError):
    """An ONNX export failed; no file was left behind."""


class ParityError(SurgeonError, RuntimeError):
    """Two forms of a model that must agree do not."""


class OutputsDifferError(ParityError):
    """The outputs of two forms of a model differ by more than the tolerance.

    Attributes:
        report: The whole `ParityReport`.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


class OnnxFileError(SurgeonError, ValueError):
    """A file is no valid ONNX model, or ONNX Runtime cannot run it, or not on these inputs."""


class CheckpointError(SurgeonError, ValueError):
    """A checkpoint cannot be read or does not fit the model."""
