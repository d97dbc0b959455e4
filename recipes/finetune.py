"""Fine-tunes a network with stochastic depth, folds the gates away, and delivers a plain model and ONNX file.

    surgeon finetune digits                                        the demonstration, no download
    surgeon finetune resnet50 data.root=~/flowers                  a folder of your images, timm's weights
    python recipes/finetune.py resnet50 data.root=~/flowers        the same, from a copy that you may edit
    torchrun --nproc-per-node 8 recipes/finetune.py convnext_tiny data.root=~/flowers     on eight GPUs
    surgeon finetune resnet50 data.root=~/flowers resume=true      goes on after the last finished epoch

The settings are explained in `finetune_config.py` and in `configs/*.yaml`. Beside this file lie its parts:
`finetune_data.py` (the images), `finetune_log.py` (numbers and resumable state), `finetune_deliver.py` (fold,
export, checks), `finetune_plot.py`. Copy the folder and change what you like; nothing else depends on it.
"""

import math
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune_config import Config, load_config
from finetune_data import Images, check_images, first_classes, load_images
from finetune_deliver import deliver
from finetune_log import RunLog, prepare_folder
from finetune_model import load_network, reset_head
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import nn
from torch.utils.data import DataLoader

import surgeon

Metrics = dict[str, float]


def main(config: str, overrides: list[str]) -> dict[str, Any]:
    """Runs the whole job; returns its figures and the files it wrote ({} on further processes)."""
    settings = load_config(config, overrides)
    check_images(settings.data)
    state = prepare_folder(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    accelerator = Accelerator(
        mixed_precision=settings.train.precision,
        gradient_accumulation_steps=settings.train.accumulate,
        cpu=settings.device == "cpu",
    )
    say = accelerator.print
    log = RunLog(settings, state["epoch"] if state else 0, active=accelerator.is_main_process)

    set_seed(settings.seed)
    model = load_network(settings.model)
    images = load_images(settings.data, model)
    if settings.pretrain and not state:
        known = first_classes(images, settings.pretrain.classes)
        reset_head(model, len(known.classes))
        figures = Trainer(model, known, settings, accelerator, settings.pretrain.epochs).fit("pretrain")
        accelerator.free_memory()
        say(
            f"pretrained on {len(known.classes)} of {len(images.classes)} classes: "
            f"top-1 {figures['top1']:.2f} %\n"
        )
    reset_head(model, len(images.classes))

    gates = settings.gates.model_dump(exclude={"ramp_epochs"})
    surgeon.apply(model.cpu(), example=torch.zeros(2, *images.input_size), **gates)
    say(f"{surgeon.status(model)}\n")

    trainer = Trainer(model, images, settings, accelerator, settings.train.epochs, log)
    before = trainer.evaluate()
    if state:
        trainer.load_state(state)
    after = trainer.fit("fine-tune")
    log.close()
    if not accelerator.is_main_process:
        return {}
    return deliver(settings, trainer.result(), images, accelerator.device, before, after)


class Trainer:
    """One training of one model, in place, on as many devices as the launcher started processes for."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        settings: Config,
        accelerator: Accelerator,
        epochs: int,
        log: RunLog | None = None,
    ) -> None:
        train, plan = settings.train, settings.optimizer
        self.settings, self.accelerator, self.epochs, self.log = settings, accelerator, epochs, log
        self.gated = log is not None  # pretraining has neither
        self.epoch, self.step, self.best = 0, 0, -1.0
        self.classes = len(images.classes)

        self.model = model.to(accelerator.device)
        if train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        # Copied before any wrapping. With warm-up the average is useful from the first epoch on.
        self.average = ModelEmaV3(model, decay=train.ema, use_warmup=True) if train.ema else None

        # timm reads no_weight_decay and group_matcher off the model: gates leave its methods where they are.
        optimizer = create_optimizer_v2(
            model, plan.name, plan.lr, plan.weight_decay, plan.momentum, layer_decay=plan.layer_decay
        )
        self.shuffle = torch.Generator()
        workers = settings.data.workers
        batches = DataLoader(
            images.train,
            train.batch_size,
            shuffle=True,
            generator=self.shuffle,
            num_workers=workers,
            drop_last=len(images.train) >= train.batch_size,  # type: ignore[arg-type]
        )
        held_out = DataLoader(images.test, 2 * train.batch_size, num_workers=workers)
        self.wrapped, self.optimizer, self.batches, self.held_out = accelerator.prepare(
            model, optimizer, batches, held_out
        )
        self.steps_per_epoch = math.ceil(len(self.batches) / train.accumulate)
        # The learning rate is a function of the step alone, so a resumed run needs no state of the scheduler.
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=plan.decay,
            num_epochs=epochs,
            warmup_epochs=plan.warmup_epochs,
            warmup_lr=plan.lr / 100,
            warmup_prefix=True,
            min_lr=plan.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.mixup: Mixup | None = None
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        if train.mixup or train.cutmix:
            self.mixup = Mixup(
                train.mixup, train.cutmix, label_smoothing=train.label_smoothing, num_classes=self.classes
            )
            self.criterion = SoftTargetCrossEntropy()

    def fit(self, what: str) -> Metrics:
        """Trains up to the last epoch; returns the last figures on the held-out split."""
        figures: Metrics = self.evaluate() if self.epoch >= self.epochs else {}
        with _progress(shown=self.accelerator.is_main_process) as progress:
            bar = progress.add_task(
                what, total=self.epochs * self.steps_per_epoch, completed=self.step, note=""
            )
            while self.epoch < self.epochs:
                loss = self.train_epoch(lambda: progress.advance(bar))
                figures = self.evaluate()
                self.epoch += 1
                self.record(loss, figures)
                note = f"epoch {self.epoch}/{self.epochs}  loss {loss:.3f}  top-1 {figures['top1']:.2f} %"
                progress.update(bar, note=note)
        return figures

    def train_epoch(self, advance: Any) -> float:
        """One pass over the images; returns the mean loss."""
        settings, train, losses = self.settings, self.settings.train, AverageMeter()
        # Every epoch starts from its own seed: a resumed run draws the shuffles, augmentations and coins that
        # the uninterrupted one would have drawn. Processes differ, as their images do.
        set_seed(1000 * settings.seed + self.epoch, device_specific=True)
        self.shuffle.manual_seed(1000 * settings.seed + self.epoch)
        if self.gated and settings.gates.ramp_epochs:
            share = min(1.0, (self.epoch + 1) / settings.gates.ramp_epochs)
            surgeon.set_drop_rate(self.model, share * settings.gates.drop_rate)
        self.wrapped.train()
        for images, targets in self.batches:
            with self.accelerator.accumulate(self.wrapped):
                if train.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)  # noqa: PLW2901
                if self.mixup is not None:
                    images, targets = self.mixup(images, targets)  # noqa: PLW2901
                loss = self.criterion(self.wrapped(images), targets)
                self.accelerator.backward(loss)
                if train.clip_norm and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), train.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.update(loss.item(), len(images))
            if not math.isfinite(losses.val):
                raise surgeon.SurgeonError(
                    f"the loss is {losses.val} at step {self.step} of epoch {self.epoch + 1}: try a smaller "
                    f"optimizer.lr than {settings.optimizer.lr}, optimizer.warmup_epochs or train.clip_norm."
                )
            if self.accelerator.sync_gradients:
                self.after_step(losses.val)
                advance()
        return float(losses.avg)

    def after_step(self, loss: float) -> None:
        self.step += 1
        if self.log and self.step % self.settings.log.every == 0:
            rate = self.optimizer.param_groups[-1]["lr"]
            self.log.write("step", self.epoch + 1, self.step, loss=loss, lr=rate)
        self.scheduler.step_update(self.step)
        if self.average is not None:
            self.average.update(self.model, self.step)

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Loss and accuracies in percent on the held-out split, every image counted once."""
        model = self.average.module if self.average is not None else self.wrapped
        model.eval()
        losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
        for images, targets in self.held_out:
            logits, targets = self.accelerator.gather_for_metrics((model(images), targets))  # noqa: PLW2901
            hits = accuracy(logits, targets, topk=(1, min(5, self.classes)))
            losses.update(nn.functional.cross_entropy(logits.float(), targets).item(), len(targets))
            top1.update(hits[0].item(), len(targets))
            top5.update(hits[1].item(), len(targets))
        return {"loss": float(losses.avg), "top1": float(top1.avg), "top5": float(top5.avg)}

    def record(self, loss: float, figures: Metrics) -> None:
        """Writes the epoch's line and the state to go on from."""
        if self.log is None:
            return
        self.log.write("epoch", self.epoch, self.step, train_loss=loss, **figures)
        improved, self.best = figures["top1"] > self.best, max(self.best, figures["top1"])
        self.log.save("last.pt", self.settings, self.model, **self.state())
        if improved and self.settings.deliver.weights == "best":
            self.log.save("best.pt", self.settings, self.model, **self.state())

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "average": self.average.module.state_dict() if self.average is not None else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.scheduler.step_update(self.step)

    def result(self) -> nn.Module:
        """The trained model without wrappers; its averaged weights if any, the best if asked for."""
        if self.settings.deliver.weights == "best":
            state = torch.load(self.settings.output / "best.pt", map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["average"] or state["model"])
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # takes autocast off self.model
        return self.model.cpu().eval()


def _progress(*, shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description:9}"),
        BarColumn(20),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "digits", sys.argv[2:])
    except surgeon.SurgeonError as error:
        sys.exit(f"error: {error}")
