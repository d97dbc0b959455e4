"""A gated network as an ensemble: many draws of its gates at evaluation, and how far to believe them.

Stochastic depth trains 2^L networks at once (Huang et al. 2016, section 5); leaving the gates live at
evaluation samples from them, as Monte Carlo dropout does with dropout (Gal and Ghahramani 2016). What comes
out says how the answer depends on which branches run. It is no posterior of the weights, and with drop rates
near zero it says nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgeon._gating.gated import gated_blocks
from surgeon._meant import says_the_call
from surgeon.errors import NotGatedError, UsageError


@dataclass(frozen=True, slots=True)
class Samples:
    """What the draws gave.

    Attributes:
        outputs: Draws x samples x what the network gives per sample.
    """

    outputs: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over the draws."""
        return self.outputs.mean(0)

    @property
    def spread(self) -> Tensor:
        """Standard deviation over the draws; zero for one draw."""
        return self.outputs.std(0, correction=0)

    @property
    def probabilities(self) -> Tensor:
        """For logits: the mean of the draws' probabilities, samples x classes."""
        return self.outputs.softmax(-1).mean(0)

    @property
    def disagreement(self) -> Tensor:
        """For logits: the mutual information of answer and draw, in nats; 0 where all draws agree."""
        each = self.outputs.log_softmax(-1)
        within = -(each.exp() * each).sum(-1).mean(0)
        mean = self.probabilities
        return (-(mean * mean.clamp_min(1e-30).log()).sum(-1) - within).clamp_min(0)


@says_the_call
def sample(model: nn.Module, inputs: Tensor, draws: int = 16) -> Samples:
    """Runs ``draws`` networks drawn by the gates on ``inputs``; ``model`` is left as it was.

    Everything but the gates is in evaluation mode; no gradients are kept. With ``unit="sample"`` all draws
    are one forward of ``draws * len(inputs)`` rows, with ``unit="batch"`` one forward each. PyTorch's
    generator decides what is drawn.

    Args:
        model: A gated model that gives one tensor.
        inputs: Samples, the first dimension counting them.
        draws: How many networks, 1 or more.

    Raises:
        NotGatedError: The model has no gates.
        UsageError: ``draws`` is below 1, or the model gives something else than a tensor with one row per
            sample.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5)
        >>> drawn = surgeon.sample(model, torch.randn(2, 3, 64, 64), draws=8)
        >>> drawn.probabilities.shape, drawn.disagreement.shape
        (torch.Size([2, 10]), torch.Size([2]))
    """
    if draws < 1:
        raise UsageError(f"draws is {draws}; give 1 or more")
    gatings = [gating for _, _, gating in gated_blocks(model)]
    if not gatings:
        raise NotGatedError("the model has no gates to draw; surgeon.apply(model) puts them in")
    by_rows = all(gate.decided.unit == "sample" for gating in gatings for gate in gating.gates)
    with gates_alone(model), torch.no_grad():
        if by_rows:
            rows = inputs.repeat(draws, *[1] * (inputs.ndim - 1))
            outputs = _rows(model(rows), draws * len(inputs)).unflatten(0, (draws, len(inputs)))
        else:
            outputs = torch.stack([_rows(model(inputs), len(inputs)) for _ in range(draws)])
    return Samples(outputs)


@contextmanager
def gates_alone(model: nn.Module) -> Iterator[None]:
    """Inside, gates draw as in training, and everything else evaluates."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for _, block, _ in gated_blocks(model):
        block.training = True  # its own forward alone; its children evaluate
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _rows(output: Any, count: int) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != count:
        raise UsageError(
            f"the model gives a {type(output).__name__} and not one tensor with a row per sample; wrap it in "
            "a module that gives that"
        )
    return output


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far probabilities can be believed.

    Attributes:
        accuracy: Share of right answers, in [0, 1].
        nll: Mean negative log-likelihood of the labels, in nats.
        ece: Expected calibration error (Guo et al. 2017): the mean distance of confidence and accuracy over
            bins of equal width, weighted by the answers in them, in [0, 1].
        auarc: Area under the accuracy-rejection curve (Nadeem et al. 2009): the mean accuracy of the k most
            confident answers over all k, in [0, 1].
    """

    accuracy: float
    nll: float
    ece: float
    auarc: float

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.1%}, NLL {self.nll:.4f}, ECE {self.ece:.4f}, AUARC {self.auarc:.4f}"

    def to_dict(self) -> Mapping[str, float]:
        """The same as plain data."""
        return asdict(self)


@says_the_call
def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """Measures probabilities against labels.

    Args:
        probabilities: Samples x classes, rows that add up to 1.
        labels: The right class of each sample.
        bins: Of confidence, for the calibration error.

    Raises:
        UsageError: The shapes do not fit, or there is no sample.

    Example:
        >>> import surgeon, torch
        >>> sure = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
        >>> found = surgeon.calibration(sure, torch.tensor([0, 0, 0, 1]))
        >>> found.accuracy, round(found.ece, 2)  # right in three of four, and sure of nine in ten
        (0.75, 0.15)
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise UsageError(
            f"probabilities {list(probabilities.shape)} and labels {list(labels.shape)} do not fit; give "
            "samples x classes and one label per sample"
        )
    probabilities = probabilities.double()
    confidence, answers = probabilities.max(-1)
    right = (answers == labels).double()
    nll = functional.nll_loss(probabilities.clamp_min(1e-30).log(), labels).item()
    place = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place.cpu(), (confidence - right).cpu())
    ranked = right[confidence.argsort(descending=True, stable=True)]
    kept = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1, device=ranked.device)
    return Calibration(right.mean().item(), nll, (gaps.abs().sum() / len(labels)).item(), kept.mean().item())
