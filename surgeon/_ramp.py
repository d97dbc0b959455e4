"""A drop rate that changes while training runs."""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import nn

from surgeon._gating.gated import gates_of
from surgeon._surgery import set_drop_rate, strayed
from surgeon._text import count
from surgeon.errors import UsageError

Shape = Literal["linear", "cosine", "early", "late", "plateau-decay-recovery"]

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "early": lambda t: float(t < 1),
    "late": lambda t: float(t >= 1),
    "plateau-decay-recovery": lambda t: min(1.0, max(0.0, (0.8 - t) / 0.3)),
}


class Ramp:
    """Sets the drop rate of a gated model step by step; the evaluating model does not change.

    ``"linear"`` and ``"cosine"`` go from ``start`` to ``drop_rate`` over ``steps`` steps and stay there (a
    warm-up; with ``start`` above ``drop_rate`` a way down). ``"early"`` is on for ``steps`` steps and off
    afterwards, ``"late"`` the other way round (Liu et al. 2023, "Dropout Reduces Underfitting").
    ``"plateau-decay-recovery"`` stays at ``drop_rate`` for half of the steps, falls to ``start``, and trains
    the whole network for the last fifth ("Don't Drop Dropout", ICML 2026, which found that the optimizer has
    to be tuned anew; the shares are ours). Any other shape is a callable. One step is one call of `step`: per
    iteration or per epoch, as the caller likes. Under ``scaling="paper"`` evaluation multiplies by the rates
    of `apply`, so a ramp that ends at others warns.

        surgeon.apply(model, drop_rate=0.5)
        ramp = surgeon.Ramp(model, 0.5, steps=1000)
        for batch in loader:
            ...
            optimizer.step()
            ramp.step()

    Args:
        model: A gated model whose schedule has a name; its rates are set to those of step 0 at once.
        drop_rate: Final drop rate r of the schedule, in [0, 1).
        steps: How many steps the change takes, at least 1.
        shape: As above, or a callable that is given the share of the steps that are over, in [0, 1], and
            returns how far the rate is from ``start`` to ``drop_rate``, in [0, 1]. A ``state_dict`` holds its
            name only.
        start: The drop rate of step 0 for ``"linear"`` and ``"cosine"``, and the one that is "off".

    Raises:
        UsageError: An argument is out of range or unknown, or the gates' schedule has no name.
        NotGatedError: The model has no gates.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5)
        >>> ramp = surgeon.Ramp(model, 0.5, steps=4)
        >>> [ramp.step() for _ in range(4)]
        [0.125, 0.25, 0.375, 0.5]
    """

    def __init__(
        self,
        model: nn.Module,
        drop_rate: float,
        *,
        steps: int,
        shape: Shape | Callable[[float], float] = "linear",
        start: float = 0.0,
    ) -> None:
        if not callable(shape) and shape not in _SHAPES:
            known = ", ".join(map(repr, get_args(Shape)))
            raise UsageError(f"shape is {shape!r}; known are {known}, or give a callable")
        if steps < 1:
            raise UsageError(f"steps is {steps}; a ramp takes at least 1")
        for name, value in (("drop_rate", drop_rate), ("start", start)):
            if not 0 <= value < 1:
                raise UsageError(f"{name} is {value}; give a rate in [0, 1)")
        for gate in gates_of(model):
            if not gate.decided.named:
                raise UsageError(
                    f"the gates follow {gate.decided.schedule}; a ramp needs a named schedule; "
                    'apply with schedule="linear"'
                )
        self.model, self.drop_rate, self.steps, self.shape, self.start = model, drop_rate, steps, shape, start
        self.count = 0
        self._check_end()
        self._set()

    @property
    def rate(self) -> float:
        """The present final drop rate."""
        return self._rate_at(self.count)

    def _rate_at(self, count: int) -> float:
        passed = min(count / self.steps, 1.0)
        share = float(self.shape(passed) if callable(self.shape) else _SHAPES[self.shape](passed))
        if not 0 <= share <= 1:
            raise UsageError(
                f"the shape {_named(self.shape)} gave {share} for {passed}; it has to give a share in [0, 1]"
            )
        return self.start + (self.drop_rate - self.start) * share

    def _check_end(self) -> None:
        """Warns of an end at which the evaluation scales are not those of the paper's rule."""
        _, end = self.rate, self._rate_at(self.steps)  # both have to be rates
        if names := strayed(self.model, end):
            warnings.warn(
                f"the ramp ends at the drop rate {end:g}, but under scaling='paper' evaluation goes on "
                f"multiplying {count(len(names), 'branch', 'branches')} ({names[0]} first) by the survival "
                f"probability that surgeon.apply gave. Apply with drop_rate={end:g}, or with "
                "scaling='inverted', whose evaluation depends on no rate",
                stacklevel=3,
            )

    def step(self, count: int | None = None) -> float:
        """Counts one step, sets the rate of the next and returns it.

        Args:
            count: How many steps are over, for a loop that counts them itself; by default one more.
        """
        self.count = self.count + 1 if count is None else count
        return self._set()

    def state_dict(self) -> dict[str, Any]:
        """How far the ramp has come, and its settings."""
        names = ("count", "drop_rate", "steps", "start")
        return {"shape": _named(self.shape), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where the saved ramp was, with its settings, and sets the model's rate.

        Raises:
            UsageError: The saved ramp had a callable for its shape, and this one has not.
        """
        if state["shape"] not in _SHAPES and state["shape"] != _named(self.shape):
            raise UsageError(
                f"the saved ramp has the shape {state['shape']}, this one {_named(self.shape)}; make it with "
                "that"
            )
        for name in self.state_dict().keys() - {"shape"}:
            setattr(self, name, state[name])
        self.shape = state["shape"] if state["shape"] in _SHAPES else self.shape
        self._check_end()
        self._set()

    def _set(self) -> float:
        set_drop_rate(self.model, self.rate)
        return self.rate


def _named(shape: Shape | Callable[[float], float]) -> str:
    """A shape's name, as a `state_dict` holds it."""
    return f"callable {getattr(shape, '__name__', type(shape).__name__)}" if callable(shape) else shape
