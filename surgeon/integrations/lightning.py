"""Gates in Lightning's Trainer."""

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from surgeon._gating.block import NOTE
from surgeon.integrations.core import GateTraining


class GateCallback(Callback):  # type: ignore[misc] # lightning is not imported by mypy
    """Takes a gated model through the training of a Lightning ``Trainer``.

        surgeon.apply(module.network, drop_rate=0.3, example=torch.zeros(2, 3, 224, 224))
        gates = GateCallback(ramp={"drop_rate": 0.3}, deliver="out/plain")
        Trainer(max_epochs=10, callbacks=[gates]).fit(module, loader)  # ckpt_path=... goes on

    Call `surgeon.apply` in the module's ``__init__`` where checkpoints are loaded by
    ``load_from_checkpoint``. What is delivered is the network that has the gates, without the module around
    it, with averaged weights where a callback of Lightning's makes them.

    Args:
        how: As in `surgeon.integrations.core.GateTraining`. Steps are those of ``trainer.global_step``.
    """

    def __init__(self, **how: Any) -> None:
        self.training = GateTraining(**how)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts, or goes on after a checkpoint; the trainer's own count of steps is the ramp's."""
        self.training.start(pl_module, trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:  # noqa: ARG002 - the signature of the hook
        """Sets the rates of the next step, and logs where Lightning does."""
        self.training.step(trainer.global_step)
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            self.log_dict(self.training.log())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training compares."""
        return self.training.state_dict() if self.training.model is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of the training that is resumed."""
        self.training.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Notes the scales in the checkpoint: averaged weights come without PyTorch's note."""
        if self.training.model is not None and (scales := self.training.scales()):
            checkpoint[NOTE] = scales

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - the signature of the hook
        """Delivers the folded network, after every callback that puts averaged weights in its place."""
        if trainer.is_global_zero:
            self.training.end()
