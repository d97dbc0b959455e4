"""How large activations and gradients are at every gate while a gated model trains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from surgeon._files import beside, settle
from surgeon._gating.gated import Placed, placed_gates
from surgeon._needs import need
from surgeon._text import Drawn, Part, count
from surgeon._torch import transformed
from surgeon.errors import NotGatedError, UsageError


@dataclass(frozen=True, slots=True)
class Signal:
    """What went through one gate, on average over the forwards in which its branch ran.

    Attributes:
        name: Of its residual add.
        shortcut: Root mean square of the shortcut; None where the branch never ran.
        branch: Of the branch, before any factor.
        gradient: Mean absolute gradient of the weights of its block (matrices and kernels, no biases), on
            average over the steps that gave one; None without.
    """

    name: str
    shortcut: float | None
    branch: float | None
    gradient: float | None

    @property
    def ratio(self) -> float | None:
        """The branch over the shortcut: how much the block changes the stream."""
        return self.branch / self.shortcut if self.branch is not None and self.shortcut else None


@dataclass(frozen=True, slots=True)
class Signals(Drawn):
    """What went through the gates since it was last asked; iterating gives one `Signal` per gate."""

    gates: tuple[Signal, ...]

    def __iter__(self) -> Iterator[Signal]:
        return iter(self.gates)

    def __len__(self) -> int:
        return len(self.gates)

    def parts(self) -> Sequence[Part]:
        """A table of the gates."""
        head = ("gate", "shortcut", "branch", "ratio", "gradient")
        rows = tuple(
            (one.name, *(_said(value) for value in (one.shortcut, one.branch, one.ratio, one.gradient)))
            for one in self
        )
        return (Part(count(len(self), "gate"), head, rows, frozenset(head[1:])),)


@dataclass(slots=True)
class _Sides:
    """Sums of one gate since it was last asked; they stay on the device."""

    forwards: int = 0
    shortcut: float | Tensor = 0.0
    branch: float | Tensor = 0.0
    steps: int = 0
    gradient: float | Tensor = 0.0

    def see(self, shortcut: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        if not is_compiling() and not transformed():
            self.forwards += 1
            self.shortcut = self.shortcut + _size(shortcut)
            self.branch = self.branch + _size(branch)
        return shortcut, branch

    def signal(self, name: str) -> Signal:
        ran, steps = self.forwards, self.steps
        return Signal(
            name,
            float(self.shortcut) / ran if ran else None,
            float(self.branch) / ran if ran else None,
            float(self.gradient) / steps if steps else None,
        )


class Probe:
    """Watches both sides of every gate, and the gradients of its block; the model computes as before.

        probe = surgeon.Probe(model)
        ...
        loss.backward()
        probe.step()            # before the gradients are cleared; leave it out where activations will do
        ...
        print(probe.take())     # after an epoch
        probe.plot("probe.png")

    The gradient is what Huang et al. 2016 (section 5) follow over the training: the mean absolute gradient of
    a block's weights. What a compiled graph does is not seen. Weights that a step does not reach, as their
    branch was dropped, do not count in it.

    Args:
        model: A gated model. ``surgeon.apply(model, drop_rate=0)`` makes one of any.

    Attributes:
        history: What `take` has given so far.

    Raises:
        NotGatedError: The model has no gates.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0)
        >>> probe = surgeon.Probe(model)
        >>> model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
        >>> probe.step()
        >>> found = probe.take()
    """

    def __init__(self, model: nn.Module) -> None:
        self.placed: list[Placed] = placed_gates(model)
        if not self.placed:
            raise NotGatedError("the model has no gates; surgeon.apply(model, drop_rate=0) puts in open ones")
        self.history: list[Signals] = []
        self._forget()

    def step(self) -> None:
        """Reads the gradients, after a backward and before they are cleared."""
        for placed, sides in zip(self.placed, self.sides, strict=True):
            grads = [p.grad for p in placed.block.parameters() if p.grad is not None and p.ndim > 1]
            if grads:
                numbers = sum(grad.numel() for grad in grads)
                whole = torch.stack([grad.detach().abs().sum(dtype=torch.float32) for grad in grads]).sum()
                sides.steps, sides.gradient = sides.steps + 1, sides.gradient + whole / numbers

    def take(self) -> Signals:
        """What went through since the last call, which starts to count anew."""
        taken = Signals(tuple(s.signal(one.name) for one, s in zip(self.placed, self.sides, strict=True)))
        self.history.append(taken)
        self._forget()
        return taken

    def close(self) -> None:
        """Watches no longer."""
        for placed in self.placed:
            placed.gate.watch = None

    def plot(self, path: str | Path) -> Path:
        """Draws what was taken so far: gradients of the blocks over time, and branch over shortcut by gate.

        Raises:
            UsageError: Nothing was taken yet.
            MissingPackageError: matplotlib is not installed.
        """
        if not self.history:
            raise UsageError("there is nothing to draw yet; call take() first, after an epoch, say")
        return _drawn(self.history, Path(path))

    def _forget(self) -> None:
        self.sides = [_Sides() for _ in self.placed]
        for placed, sides in zip(self.placed, self.sides, strict=True):
            placed.gate.watch = sides


def _size(tensor: Tensor) -> Tensor:
    return tensor.detach().float().square().mean().sqrt()


def _said(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


_INK, _LAST = "#222222", "#2f6690"


def _drawn(history: Sequence[Signals], path: Path) -> Path:
    need("a plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _gradients(left, figure, history)
    _ratios(right, history)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with beside(path) as folder:
        made = folder / path.name
        figure.savefig(made, dpi=150)
        settle(made, path)
    return path


def _gradients(axes: Any, figure: Any, history: Sequence[Signals]) -> None:
    import matplotlib as mpl

    colours = mpl.colormaps["viridis"]
    count = len(history[0])
    style = "o-" if len(history) == 1 else "-"
    for place in range(count):
        values = [signals.gates[place].gradient for signals in history]
        known = [(when, value) for when, value in enumerate(values, 1) if value]
        colour = colours(place / max(count - 1, 1))
        if known:
            axes.plot(*zip(*known, strict=True), style, color=colour, linewidth=1)
    axes.set_yscale("log")
    axes.set_title("mean |gradient| of the weights of a block", loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("call of take()", color=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    shades = mpl.cm.ScalarMappable(mpl.colors.Normalize(1, max(count, 2)), colours)
    figure.colorbar(shades, ax=axes, label="gate, in execution order")


def _ratios(axes: Any, history: Sequence[Signals]) -> None:
    for signals, colour, name in ((history[0], "#8a8f98", "first"), (history[-1], _LAST, "last")):
        ratios = [(place, one.ratio) for place, one in enumerate(signals, 1) if one.ratio is not None]
        if ratios and (name == "last" or len(history) > 1):
            axes.plot(*zip(*ratios, strict=True), "o-", markersize=3, color=colour, label=f"{name} time")
    axes.set_ylim(bottom=0)
    axes.set_title("branch over shortcut, root mean squares", loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("gate, in execution order", color=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(history) > 1:
        axes.legend(frameon=False, fontsize=8)
