"""How much gradient comes through paths of each length (Veit et al. 2016, section 5.1).

A residual network of L adds is a sum of ``2^L`` paths, binomial in length (`surgeon._depth`). How much
gradient a path of length k brings to the input is sampled: k branches are drawn; at their adds the gradient
goes back through the branch alone, at all others past it. The forward is that of the whole network. Times the
number of paths of that length this is what the length contributes.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgeon._copy import copied
from surgeon._depth import interval, path_lengths
from surgeon._gating.gated import gates_of, is_gated
from surgeon._meant import says_the_call
from surgeon._pruning.score import Data, Scorer, rows
from surgeon._sample import gates_alone
from surgeon._surgery import apply, set_drop_rate
from surgeon._text import Drawn, Part
from surgeon._tracing.example import Example
from surgeon.errors import UsageError


@dataclass(frozen=True, slots=True)
class PathGradients(Drawn):
    """Gradient at the input by length of path.

    Attributes:
        lengths: Numbers of branches on a path.
        gradients: Norm of the gradient that one path of that length brings, the mean of some.
        share: Share of all gradient, times the number of paths of each length; they add up to 1.
        paths: Share of the paths that have that length.
    """

    lengths: tuple[int, ...]
    gradients: tuple[float, ...]
    share: tuple[float, ...]
    paths: tuple[float, ...]

    @property
    def peak(self) -> int:
        """The length that brings most gradient."""
        return self.lengths[max(range(len(self.share)), key=self.share.__getitem__)]

    def parts(self) -> Sequence[Part]:
        """A table by length."""
        rows = tuple(
            (str(k), f"{p:.2%}", f"{g:.3g}", f"{s:.2%}")
            for k, p, g, s in zip(self.lengths, self.paths, self.gradients, self.share, strict=True)
        )
        low, high = interval(list(self.share))
        most = f"95 % of the gradient comes through {self.lengths[low]} to {self.lengths[high]} branches"
        head = ("branches", "paths", "gradient of one", "of all gradient")
        return (Part("gradient by length of path", head, rows, frozenset(head), (most,)),)


@says_the_call
def path_gradients(
    model: nn.Module,
    data: Data,
    *,
    lengths: Sequence[int] | None = None,
    draws: int = 5,
    seed: int = 0,
    example: Example = None,
) -> PathGradients:
    """Samples how much gradient of the loss reaches the input through paths of each length.

    ``model`` is left as it was; a copy with open gates runs, its layers in evaluation mode.

    Args:
        model: A network with residual adds, gated or not.
        data: Batches as in `surgeon.lesion`; the first is used. Without labels the loss is that of the
            network's own answers.
        lengths: Numbers of branches; None takes all there are, from 0.
        draws: Paths of each length.
        seed: Of which ones.
        example: As in `find`.

    Raises:
        UsageError: A length is out of range, or the inputs are no tensor of floating point.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> data = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))]
        >>> found = surgeon.path_gradients(model, data, lengths=[0, 1], draws=1)
    """
    gated = copied(model)
    if not is_gated(gated):
        apply(gated, drop_rate=0.0, skip=False, example=example)
    set_drop_rate(gated, 0.0)
    sides = []
    for gate in gates_of(gated):
        gate.watch = one = _Way()
        sides.append(one)
    count = len(sides)
    wanted = tuple(range(count + 1)) if lengths is None else tuple(lengths)
    for k in wanted:
        if not 0 <= k <= count:
            raise UsageError(f"lengths has {k}; the network has {count} branches, so give 0 to {count}")
    backward, generator = _backward(gated, data), random.Random(seed)  # noqa: S311 - which paths, no secret
    norms = []
    with gates_alone(gated):
        for k in wanted:
            taken = []
            for _ in range(draws if 0 < k < count else 1):
                through = set(generator.sample(range(count), k))
                for place, one in enumerate(sides):
                    one.through = place in through
                taken.append(backward())
            norms.append(statistics.fmean(taken))
    law = path_lengths([1.0] * count)
    weighed = [law[k] * norm for k, norm in zip(wanted, norms, strict=True)]
    whole = sum(weighed) or 1.0
    share, paths = tuple(w / whole for w in weighed), tuple(law[k] for k in wanted)
    return PathGradients(wanted, tuple(norms), share, paths)


@dataclass(slots=True)
class _Way:
    """Where the gradient goes back at one residual add: through the branch or past it."""

    through: bool = False

    def see(self, shortcut: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return (shortcut.detach(), branch) if self.through else (shortcut, branch.detach())


def _backward(model: nn.Module, data: Data) -> Callable[[], float]:
    """Runs forward and backward and gives the norm of the gradient at the input."""
    scorer = Scorer(model, [next(iter(data))])
    given, labels = scorer.batches[0]
    if not (isinstance(given, Tensor) and given.is_floating_point()):
        raise UsageError("gradients of the input need inputs that are one tensor of floating point")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = given.detach().to(device).requires_grad_()

    def run() -> float:
        logits = rows(model(inputs))
        answers = logits.argmax(-1) if labels is None else labels.to(device)
        (grad,) = torch.autograd.grad(functional.cross_entropy(logits, answers), inputs, allow_unused=True)
        return 0.0 if grad is None else float(grad.norm())

    return run
