"""Gates in training loops over accelerate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from surgeon.integrations import core


class GateTraining(core.GateTraining):
    """Takes a gated model through a loop over accelerate, whose ``save_state`` and ``load_state`` it joins.

        surgeon.apply(model, drop_rate=0.3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        gates = GateTraining(accelerator, model, ramp={"drop_rate": 0.3, "steps": 1000}, deliver="out")
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
            gates.count()
            accelerator.log(gates.log())
        gates.end()

    Args:
        accelerator: It says which steps are steps of the optimizer, and which process writes.
        model: The gated model, prepared or not.
        total: How many optimizer steps the training has, for a ramp that does not say it.
        how: As in `surgeon.integrations.core.GateTraining`.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, total: int | None = None, **how: Any
    ) -> None:
        super().__init__(**how)
        self.accelerator, self.done = accelerator, 0
        self.start(accelerator.unwrap_model(model), total)
        accelerator.register_for_checkpointing(self)
        accelerator.register_save_state_pre_hook(self._note)

    def count(self) -> None:
        """Counts a step if the optimizer has made one; the rates are then those of the next."""
        if self.accelerator.sync_gradients:
            self.done += 1
            self.step(self.done)

    def state_dict(self) -> dict[str, Any]:
        """How many steps are over, and what a resumed training compares."""
        return super().state_dict() | {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the steps of a saved state.

        Raises:
            CheckpointError: Its training had other evaluation scales.
        """
        super().load_state_dict(state)
        self.done = state["done"]
        self.step(self.done)

    def end(self) -> nn.Module | None:
        """As in the core, on the main process; None on the others."""
        return super().end() if self.accelerator.is_main_process else None

    def _note(self, models: Any, weights: Any, folder: str) -> None:  # noqa: ARG002 - the hook's signature
        if self.accelerator.is_main_process:
            self.save(Path(folder))
