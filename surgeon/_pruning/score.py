"""What a network is worth on some data: cross-entropy and accuracy, or agreement with the full network."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgeon.errors import UsageError

Score = Callable[[nn.Module], float]
Data = Iterable[Any]
NOTHING = "give either data (batches to measure on) or score (a function of a network)"


@dataclass(frozen=True, slots=True)
class Worth:
    """What a network is worth.

    Attributes:
        loss: Mean cross-entropy with the labels, or mean Kullback-Leibler divergence from the full network,
            in nats per sample; with a score of the user's own, its negative.
        accuracy: Share of right answers, or of answers that agree with the full network, in [0, 1]; None with
            a score of the user's own.
    """

    loss: float
    accuracy: float | None = None


class Scorer:
    """Measures networks on the same batches, in evaluation mode and without gradients.

    Args:
        full: The full network.
        data: Batches ``(inputs, labels)``, or inputs alone: a tensor, or a dict of keyword arguments. They
            are kept.
    """

    def __init__(self, full: nn.Module, data: Data) -> None:
        self.batches = [_parted(batch) for batch in data]
        if not self.batches:
            raise UsageError("data holds no batch")
        self.labelled = self.batches[0][1] is not None
        self._full: list[Tensor] = []
        if not self.labelled:
            self._full = [logits.log_softmax(-1) for logits in self._logits(full)]

    def __call__(self, model: nn.Module) -> Worth:
        """The worth of ``model``, which is left as it was."""
        loss, right, count = 0.0, 0.0, 0
        for place, logits in enumerate(self._logits(model)):
            labels = self.batches[place][1]
            if labels is not None:
                labels = labels.to(logits.device)
                loss += functional.cross_entropy(logits, labels, reduction="sum").item()
                right += (logits.argmax(-1) == labels).sum().item()
            else:
                full, own = self._full[place], logits.log_softmax(-1)
                loss += functional.kl_div(own, full, reduction="sum", log_target=True).item()
                right += (own.argmax(-1) == full.argmax(-1)).sum().item()
            count += len(logits)
        return Worth(loss / count, right / count)

    def _logits(self, model: nn.Module) -> Iterable[Tensor]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                for given, _ in self.batches:
                    yield rows(_called(model, given, device))
        finally:
            for module, training in modes:
                module.training = training


def scorer(full: nn.Module, data: Data | None, score: Score | None) -> Callable[[nn.Module], Worth]:
    """What measures networks: the user's own score, or a `Scorer` on ``data``.

    Raises:
        UsageError: Neither or both were given.
    """
    if (data is None) == (score is None):
        raise UsageError(NOTHING)
    if data is not None:
        return Scorer(full, data)
    return lambda model: Worth(-float(score(model.eval())))  # type: ignore[misc]


def _parted(batch: Any) -> tuple[Any, Tensor | None]:
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[1], Tensor) and batch[1].ndim == 1:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise UsageError(
            "a batch of data is (inputs, labels), with one whole number per sample as label, or inputs alone"
        )
    return batch, None


def _called(model: nn.Module, given: Any, device: torch.device) -> Any:
    if isinstance(given, Mapping):
        return model(**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in given.items()})
    return model(given.to(device))


def rows(output: Any) -> Tensor:
    """The logits among what a model gives: itself, ``.logits``, or the first tensor."""
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = next(iter(found.values()))
    while isinstance(found, (tuple, list)):
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(
            f"the network gives {shape} and not one row of logits per sample; give score=, a function of a "
            "network that says what it is worth"
        )
    return found.float()
