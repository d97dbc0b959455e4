"""Counts how deep a gated model really was while it trained."""

from torch import nn

from surgeon._gating.gate import Tally
from surgeon._gating.gated import gates_of
from surgeon.errors import NotGatedError


class DepthMeter:
    """Counts the branches that run while a gated model trains; the model computes and draws as before.

        meter = surgeon.DepthMeter(model)
        ...                                 # an epoch
        print(meter.take())                 # 8.71: branches that ran, on average over forwards and samples

    Its expectation is ``status(model).expected_depth``. A branch that runs on k of B rows counts k / B.

    Args:
        model: A gated model; what it drew before is forgotten.

    Raises:
        NotGatedError: The model has no gates.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5, unit="batch")
        >>> meter = surgeon.DepthMeter(model)
        >>> for _ in range(4):
        ...     _ = model.train()(torch.randn(2, 3, 32, 32))
        >>> 0 <= meter.take() <= 4
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.gates = gates_of(model)
        if not self.gates:
            raise NotGatedError("the model has no gates; surgeon.apply(model) puts them in")
        self._forget()

    def take(self) -> float | None:
        """The realised depth since the last call, which starts to count anew.

        None where gates that drop did not draw where it could be seen: no forward in training mode, joins, a
        compiled graph.
        """
        depth = 0.0
        for gate in self.gates:
            tally = gate.tally
            if tally is not None and tally.draws:
                depth += float(tally.kept) / tally.draws
            elif gate.drop_rate > 0:
                self._forget()
                return None
            else:
                depth += 1.0
        self._forget()
        return depth

    def _forget(self) -> None:
        for gate in self.gates:
            gate.tally = Tally()
