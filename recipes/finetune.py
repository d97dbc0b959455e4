"""Fine-tunes a network with stochastic depth, folds the gates away, and delivers a plain model and ONNX file.

    surgeon finetune digits                                        the demonstration, no download
    surgeon finetune imagefolder data.root=~/flowers               a folder of your images, timm's weights
    surgeon finetune imagefolder data.root=~/flowers resume=true   goes on after the last finished epoch
    python recipes/finetune.py imagefolder data.root=~/flowers     the same, from a copy that you may edit
    torchrun --nproc-per-node 8 recipes/finetune.py imagefolder data.root=~/flowers       on eight GPUs

`--help` lists the configs and every key, `--print-config` shows what a command would do, `--dry-run` does it
in two steps on made-up images. Beside this file lie its parts: `finetune_settings.py` (every key, explained),
`finetune_config.py` (reading them), `finetune_data.py` and `finetune_images.py` (the images),
`finetune_model.py`, `finetune_prune.py`, `finetune_log.py`, `finetune_files.py` (numbers, resumable state),
`finetune_show.py` (what is printed), `finetune_deliver.py` and `finetune_report.py` (fold, export, checks),
`finetune_plot.py`. Copy the folder and change what you like; nothing else depends on it.
"""

import copy
import math
import sys
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune_config import dump_config, help_text, load_config, rehearsal
from finetune_data import Images, find_images, first_classes, prepare_images, set_epoch
from finetune_deliver import deliver
from finetune_log import RunLog, check_continues, occupied, prepare_folder, read_state
from finetune_model import Features, check_network, check_output, image_settings, load_network, reset_head
from finetune_prune import shortened
from finetune_report import facts
from finetune_settings import Config
from finetune_show import Display, epoch_line, header, resume_command
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, distribute_bn
from torch import nn
from torch.utils.data import DataLoader

import surgeon
from surgeon._needs import need_export

Metrics = dict[str, float]


def main(config: str, overrides: list[str], *, dry_run: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Runs the whole job; returns its figures and the files it wrote ({} on further processes)."""
    settings = load_config(config, overrides)
    check_network(settings.model)
    if settings.deliver.onnx:
        need_export("deliver.onnx=true")
    if not dry_run:
        return run(settings, quiet=quiet)
    with TemporaryDirectory() as folder:
        return run(rehearsal(settings, Path(folder) / "run"), quiet=quiet)


def run(settings: Config, *, quiet: bool = False) -> dict[str, Any]:
    """The job from its settings."""
    state = prepare_folder(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    accelerator = Accelerator(
        mixed_precision=settings.train.precision,
        gradient_accumulation_steps=settings.train.accumulate,
        cpu=settings.device == "cpu",
        log_with=list(settings.log.trackers) or None,
        project_dir=settings.output,
    )
    display = Display(shown=accelerator.is_main_process and not quiet)
    with occupied(settings, fresh=state is None, active=accelerator.is_main_process) as there:
        try:
            return Job(settings, accelerator, display, state).run(there)
        except KeyboardInterrupt:
            display.line(f"stopped; this goes on after the last finished epoch:\n  {resume_command()}")
            raise


class Job:
    """Images and networks, trained one after the other, and what is delivered of them."""

    def __init__(
        self, settings: Config, accelerator: Accelerator, display: Display, state: dict[str, Any] | None
    ) -> None:
        self.settings, self.accelerator, self.display, self.state = settings, accelerator, display, state
        with accelerator.local_main_process_first():  # the others find what it has fetched and checked
            found = find_images(settings.data, display)
        set_seed(settings.seed)
        self.model = load_network(settings.model, settings.data.image_size, display.line)
        own = image_settings(settings.model, self.model)
        self.images = prepare_images(found, settings.data, own, settings.seed)
        if state:
            check_continues(state, accelerator.num_processes, self.images.mark(), settings.output / "last.pt")

    def run(self, there: set[Path]) -> dict[str, Any]:
        settings, model, images, accelerator = self.settings, self.model, self.images, self.accelerator
        twin_state = settings.output / "ungated" / "last.pt"
        starts = not self.state or (settings.compare and not twin_state.exists())
        if settings.pretrain and starts:
            self.pretrain(settings.pretrain.classes, settings.pretrain.epochs)
        whole = copy.deepcopy(model) if settings.prune and settings.train.distill else None
        gone: list[str] = []
        if settings.prune:
            gone = shortened(settings, model, images, accelerator, fresh=not self.state)
        self.told = facts(settings, images, gone)
        if not settings.model.keep_head:
            reset_head(model, len(images.classes))
        check_output(model, images.input_size, len(images.classes))
        teacher = whole or (copy.deepcopy(model) if settings.train.distill else None)
        twin = copy.deepcopy(model) if settings.compare else None
        if settings.gates:
            gates = settings.gates.model_dump(exclude={"ramp", "ramp_epochs"})
            surgeon.apply(model.cpu(), example=torch.zeros(2, *images.input_size), **gates)
        if gone:
            self.display.line(f"deleted    {len(gone)} branches: {', '.join(gone)}")
        self.display.line(header(settings, images, model, accelerator.device, accelerator.num_processes))
        accelerator.init_trackers("", config={"settings": dump_config(settings)})

        trained, figures = self.train(model, "", self.state, teacher)
        if twin:
            self.display.line("the same training without gates")
            state = read_state(twin_state) if settings.resume and twin_state.exists() else None
            _, compared = self.train(twin, "ungated", state, teacher)
            figures["ungated"] = compared["after"]
        accelerator.end_training()
        if not accelerator.is_main_process:
            return {}
        return deliver(settings, trained, images, accelerator.device, self.display, figures, there, gone)

    def train(
        self, model: nn.Module, part: str, state: dict[str, Any] | None, teacher: nn.Module | None
    ) -> tuple[nn.Module, dict[str, Metrics]]:
        """Trains one network; what it leaves goes to the folder `part` of the output."""
        log = RunLog(
            self.settings,
            state["epoch"] if state else None,
            active=self.accelerator.is_main_process,
            part=part,
            told=self.told,
        )
        trainer = Trainer(
            model,
            self.images,
            self.settings,
            self.accelerator,
            self.display,
            self.settings.train.epochs,
            log,
            teacher,
        )
        trainer.begin(state)
        after = trainer.fit(part or "fine-tune")
        trained = trainer.result()
        self.accelerator.free_memory()
        return trained, {"before": trainer.before, "after": after}

    def pretrain(self, classes: int, epochs: int) -> None:
        """Makes the "pretrained network" of a demonstration."""
        known = first_classes(self.images, classes)
        reset_head(self.model, len(known.classes))
        trainer = Trainer(self.model, known, self.settings, self.accelerator, self.display, epochs)
        figures = trainer.fit("pretrain")
        self.accelerator.free_memory()
        self.display.line(
            f"pretrained on {len(known.classes)} of {len(self.images.classes)} classes: "
            f"top-1 {figures['top1']:.2f} %\n"
        )


class Trainer:
    """One training of one model, in place, on as many devices as the launcher started processes for."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        settings: Config,
        accelerator: Accelerator,
        display: Display,
        epochs: int,
        log: RunLog | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        train, plan = settings.train, settings.optimizer
        self.settings, self.accelerator, self.display = settings, accelerator, display
        self.images, self.epochs, self.log = images, epochs, log
        self.epoch, self.step, self.best, self.best_epoch = 0, 0, -1.0, 0
        self.before: Metrics = {}
        self.classes = len(images.classes)

        self.model = model.to(accelerator.device)
        if train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        # Copied before any wrapping. With warm-up the average is useful from the first epoch on.
        self.average = ModelEmaV3(model, decay=train.ema, use_warmup=True) if train.ema else None
        self.teacher = teacher.to(accelerator.device).eval() if teacher is not None else None
        self.seen = (Features(self.model), Features(self.teacher)) if self.teacher is not None else None
        gates, gated = settings.gates, log is not None and not log.part
        self.ramp: surgeon.Ramp | None = None
        if gated and gates and gates.ramp_epochs:
            self.ramp = surgeon.Ramp(model, gates.drop_rate, steps=gates.ramp_epochs, shape=gates.ramp)

        self.meter = surgeon.DepthMeter(model) if gated and gates else None
        self.probe = surgeon.Probe(model) if gated and gates and settings.log.probe else None

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
            drop_last=len(images.train) >= train.batch_size,
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
            decay_milestones=plan.milestones,
            decay_rate=plan.decay_rate,
            warmup_epochs=plan.warmup_epochs,
            warmup_lr=plan.warmup_lr or plan.lr / 100,
            warmup_prefix=plan.decay != "multistep",
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

    def begin(self, state: dict[str, Any] | None) -> None:
        """Goes on from a state, or evaluates the network as it is and writes the first one."""
        if state is not None:
            self.load_state(state)
        if not self.before:
            with self.display.bar("before", len(self.held_out)) as advance:
                self.before = self.evaluate(advance)
            self.save("last.pt")

    def fit(self, what: str) -> Metrics:
        """Trains up to the last epoch; returns the last figures on the held-out split."""
        each = len(self.batches) + len(self.held_out)
        with self.display.bar(what, self.epochs * each, self.epoch * each) as advance:
            figures: Metrics = {} if self.goes_on() else self.evaluate(advance)
            while self.goes_on():
                started = time.perf_counter()
                numbers = self.train_epoch(advance)
                numbers["seconds"] = time.perf_counter() - started
                numbers["images_per_second"] = numbers.pop("images") / numbers["seconds"]
                depth = {"depth": self.meter.take()} if self.meter else {}
                figures = self.evaluate(advance)
                self.epoch += 1
                self.record({**numbers, **figures, **depth})
                if self.probe and self.log:
                    self.log.write("probe", self.epoch, self.step, **_flat(self.probe.take()))
        return figures

    def goes_on(self) -> bool:
        """Whether another epoch is to come."""
        patience = self.settings.train.patience
        tired = patience is not None and self.log is not None and self.epoch - self.best_epoch >= patience
        return self.epoch < self.epochs and not tired

    def train_epoch(self, advance: Any) -> Metrics:
        """One pass over the images; returns its mean loss, last learning rate and number of images."""
        train, losses, rate = self.settings.train, AverageMeter(), 0.0
        # Every epoch starts from its own seed: a resumed run draws the shuffles, augmentations and coins that
        # the uninterrupted one would have drawn. Processes differ, as their images do.
        epoch = f"{self.settings.seed} {self.epoch}"
        set_seed(zlib.crc32(f"{epoch} {self.accelerator.process_index}".encode()))
        self.shuffle.manual_seed(zlib.crc32(epoch.encode()))
        set_epoch(self.images, self.epoch)
        self.wrapped.train()
        for images, targets in self.batches:
            with self.accelerator.accumulate(self.wrapped):
                if train.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)  # noqa: PLW2901
                if self.mixup is not None:
                    images, targets = self.mixup(images, targets)  # noqa: PLW2901
                loss = self.criterion(self.wrapped(images), targets)
                if train.distill and self.seen:
                    loss = loss + train.distill * self.distance(images)
                self.accelerator.backward(loss)
                if train.clip_norm and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), train.clip_norm)
                if self.probe and self.accelerator.sync_gradients:
                    self.probe.step()
                rate = self.optimizer.param_groups[-1]["lr"]
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.update(loss.item(), len(images))
            self.check_finite("loss", losses.val)
            if self.accelerator.sync_gradients:
                self.after_step(losses.val, rate)
            advance()
        self.share_statistics()
        if self.ramp:
            self.ramp.step()
        return {"train_loss": losses.avg, "lr": rate, "images": losses.count * self.accelerator.num_processes}

    def share_statistics(self) -> None:
        """Makes one network of what the processes hold, each of which saw its own images."""
        processes = self.accelerator.num_processes
        for model in (self.model, self.average):
            if processes > 1 and model is not None:
                distribute_bn(model, processes, reduce=True)

    def distance(self, images: torch.Tensor) -> torch.Tensor:
        """How far features are from those of the pretrained network at its full depth: 1 - cosine."""
        assert self.seen is not None and self.teacher is not None
        student = self.seen[0].take()
        with torch.no_grad(), self.accelerator.autocast():
            self.teacher(images)
        return 1 - nn.functional.cosine_similarity(student, self.seen[1].take()).mean()

    def check_finite(self, what: str, value: float) -> None:
        """Stops before a state that is spoilt replaces a good one."""
        if math.isfinite(value):
            return
        kept = self.settings.output / "last.pt"
        raise surgeon.SurgeonError(
            f"the {what} is {value} at step {self.step} of epoch {self.epoch + 1}: try a smaller "
            f"optimizer.lr than {self.settings.optimizer.lr}, optimizer.warmup_epochs or train.clip_norm. "
            f"{kept} keeps epoch {self.epoch}; a new run starts from it with model.checkpoint={kept}."
        )

    def after_step(self, loss: float, rate: float) -> None:
        self.step += 1
        if self.log and self.step % self.settings.log.every == 0:
            self.log.write("step", self.epoch + 1, self.step, loss=loss, lr=rate)
            self.accelerator.log({"loss": loss, "lr": rate}, self.step)
        self.scheduler.step_update(self.step)
        if self.average is not None:
            self.average.update(self.model, self.step)

    @torch.no_grad()
    def evaluate(self, advance: Any) -> Metrics:
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
            advance()
        return {"loss": float(losses.avg), "top1": float(top1.avg), "top5": float(top5.avg)}

    def record(self, figures: dict[str, Any]) -> None:
        """Writes the epoch's line and the state to go on from."""
        if self.log is None:
            return
        self.check_finite("loss on the held-out images", figures["loss"])
        self.log.write("epoch", self.epoch, self.step, **figures)
        told = {f"epoch/{name}": value for name, value in figures.items() if value is not None}
        self.accelerator.log(told, self.step)
        self.display.line(epoch_line(self.epoch, self.epochs, figures))
        if figures["top1"] > self.best:
            self.best, self.best_epoch = figures["top1"], self.epoch
            if self.settings.deliver.weights == "best":
                self.save("best.pt")  # before last.pt, which says that it is there
        self.save("last.pt")

    def save(self, name: str) -> None:
        if self.log is None:
            return
        self.log.save(
            name,
            self.model,
            epoch=self.epoch,
            step=self.step,
            best=self.best,
            best_epoch=self.best_epoch,
            before=self.before,
            processes=self.accelerator.num_processes,
            images=self.images.mark(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            average=self.average.module.state_dict() if self.average is not None else None,
            ramp=self.ramp.state_dict() if self.ramp else None,
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.epoch, self.step, self.before = state["epoch"], state["step"], state["before"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        if self.ramp:
            self.ramp.load_state_dict(state["ramp"])
        self.scheduler.step_update(self.step)

    def result(self) -> nn.Module:
        """The trained model without wrappers; its averaged weights if any, the best if asked for."""
        if self.settings.deliver.weights == "best" and self.log:
            state = torch.load(self.log.folder / "best.pt", map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["average"] or state["model"])
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        if self.seen:
            self.seen[0].remove()
        if self.probe:
            if self.probe.history and self.settings.deliver.plot and self.accelerator.is_main_process:
                self.probe.plot(self.settings.output / "probe.png")
            self.probe.close()
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # takes autocast off self.model
        return self.model.cpu().eval()


def _flat(signals: Any) -> Metrics:
    """What a probe took, as numbers by gate."""
    told = {f"{one.name}/{what}": getattr(one, what) for one in signals for what in ("ratio", "gradient")}
    return {name: value for name, value in told.items() if value is not None}


def command(arguments: list[str]) -> int:
    """The command line of this file; returns the exit code."""
    flags = {argument for argument in arguments if argument.startswith("-")}
    config, *overrides = [argument for argument in arguments if not argument.startswith("-")] or ["digits"]
    if unknown := flags - {"-h", "--help", "--print-config", "--dry-run"}:
        print(f"error: unknown option {min(unknown)}; --help lists them", file=sys.stderr)
        return 2
    try:
        if flags & {"-h", "--help"}:
            print(f"{__doc__}\n{help_text()}")
        elif "--print-config" in flags:
            print(dump_config(load_config(config, overrides)), end="")
        else:
            main(config, overrides, dry_run="--dry-run" in flags)
    except KeyboardInterrupt:
        return 130
    except surgeon.SurgeonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
