"""Gates in Hugging Face's Trainer."""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from surgeon.integrations.core import GateTraining

_KEY = "surgeon"


class GateCallback(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Takes a gated model through the training of a `transformers.Trainer`.

        surgeon.apply(model, drop_rate=0.3, example={"pixel_values": torch.zeros(2, 3, 224, 224)})
        trainer = Trainer(model, args, train_dataset=images)
        GateCallback(ramp={"drop_rate": 0.3}, deliver="out/plain").attach(trainer)
        trainer.train()  # resume_from_checkpoint=True goes on where the ramp was

    As one of ``callbacks=[...]`` it works as well, but trackers (TensorBoard, W&B) then see no gates.

    Args:
        how: As in `surgeon.integrations.core.GateTraining`.
    """

    def __init__(self, **how: Any) -> None:
        self.training = GateTraining(**how)

    def attach(self, trainer: Trainer) -> None:
        """Puts this callback in front of the others of ``trainer``, so that trackers get its numbers."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **more: Any) -> None:  # noqa: ARG002
        """Starts, or goes on after a checkpoint; the trainer's own count of steps is the ramp's."""
        if saved := state.stateful_callbacks.get(_KEY):
            self.training.load_state_dict(saved["attributes"])
        self.training.start(model, state.max_steps, state.global_step)
        # In the trainer's state, which it writes into each checkpoint.
        state.stateful_callbacks[_KEY] = {"args": {}, "attributes": self.training.state_dict()}

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ARG002
        """Sets the rates of the next step."""
        self.training.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **more: Any) -> None:  # noqa: ARG002
        """Adds the gates' numbers to those of the training."""
        if "loss" in logs:
            told = self.training.log()
            logs.update(told)
            state.log_history[-1].update(told)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ARG002
        """Notes the scales beside the weights."""
        if state.is_world_process_zero:
            self.training.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ARG002
        """Delivers the folded model, the best one where the trainer has loaded that."""
        if state.is_world_process_zero:
            self.training.end()
