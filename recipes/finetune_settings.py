"""The settings of `finetune.py`: every key, its type, its range, its default and what it trades.

Unknown and ill-typed keys are refused with the key's full name, so that a misspelt `optimizer.weigth_decay`
cannot silently train without weight decay. What can be known to be wrong is told before any model is made.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from timm.data import create_transform
from timm.optim import list_optimizers
from typing_extensions import Self

HomePath = Annotated[Path, AfterValidator(Path.expanduser)]  # no shell expands the ~ in data.root=~/flowers
Schedule = Literal["linear", "linear-from-zero", "uniform"]
Ramp = Literal["linear", "cosine", "early", "late", "plateau-decay-recovery"]
Kind = Literal[
    "folder",
    "digits",
    "fake",
    "huggingface",
    "cifar10",
    "cifar100",
    "svhn",
    "svhn_extra",
    "fashion_mnist",
    "flowers102",
    "pets",
    "food101",
]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v),
]
# YAML reads a bare `no` as false.
Precision = Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(lambda v: "no" if v is False else v)]


def Key(default: Any, about: str, **limits: Any) -> Any:  # noqa: N802 - stands where pydantic's Field does
    """A setting with its default (`...` for none), what it means, and its range."""
    return Field(default, description=about, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_flags_for_numbers(cls, given: Any) -> Any:
        """Pydantic takes `true` for 1; whoever writes train.mixup=true did not mean alpha = 1."""
        for key, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(key)
            if field and value in (True, False) and isinstance(value, bool) and _is_number(field.annotation):
                raise ValueError(f"{key} is a number, not {str(value).lower()}")
        return given


class Model(Section):
    name: str = Key(..., "timm:NAME, torchvision:NAME, recipes:NAME or package.module:callable")
    kwargs: dict[str, Any] = Key({}, "further arguments of the model's constructor")
    pretrained: bool = Key(False, "fetch the published weights")
    checkpoint: HomePath | None = Key(None, "or start from this file or folder, which any training has left")
    entry: str | None = Key(
        None, "which weights of the checkpoint, where it has several: ema, state_dict, ..."
    )
    keep_head: bool = Key(False, "the classes are those of the weights, in their order")

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained: true and checkpoint both give the weights; keep one of them")
        return self


class Data(Section):
    kind: Kind = Key(..., "folder: your images; digits, fake: need no files; others: sets by name")
    root: HomePath = Key(Path("data"), "where the files are; sets by name are fetched to there")
    train: str = Key("train", "folder, huggingface: the training split below root")
    test: str | None = Key("val", "the held-out split below root; null: test_share of each class of train")
    test_share: float = Key(0.25, "digits, test: null: share of the images held out", gt=0, lt=1)
    broken: Literal["stop", "skip"] = Key("stop", "folder: what to do about files that are no whole images")
    label: str | None = Key(None, "huggingface: the column of classes, where there are several")
    image_size: int | None = Key(None, "side in pixels; null: what the model was trained on", ge=8)
    mean: tuple[float, ...] | None = Key(None, "of the channels, in 0 to 1; null: the model's")
    std: tuple[float, ...] | None = Key(None, "of the channels; null: the model's")
    crop_pct: float | None = Key(None, "share of the image that evaluation sees; null: the model's", gt=0)
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = Key(None, "null: the model's")
    crop: Literal["resized", "padded", "none"] = Key(
        "resized",
        "training: a random part, resized; padded: by an eighth and cropped (CIFAR); the whole image",
    )
    flip: float = Key(0.5, "training: probability of left for right; 0 for digits and letters", ge=0, le=1)
    auto_augment: str | None = Key(None, 'crop: resized: timm\'s spelling, "rand-m9-mstd0.5-inc1"')
    erase: float = Key(0.0, "training: probability of random erasing", ge=0, le=1)
    classes: int = Key(4, "fake: how many", ge=2)
    samples: int = Key(16, "fake: images in each split", ge=2)
    workers: int = Key(0, "processes that load images; 0 is right for data held in memory", ge=0)

    @model_validator(mode="after")
    def _augmentation_exists(self) -> Self:
        if self.auto_augment:
            try:
                create_transform(32, is_training=True, auto_augment=self.auto_augment)
            except Exception as error:  # asserts, for the most part
                raise ValueError(
                    f"auto_augment: timm does not know {self.auto_augment!r}; write rand-m9-mstd0.5-inc1, "
                    "original, v0 or augmix-m5"
                ) from error
        return self


class Gates(Section):
    """The arguments of `surgeon.apply`, and a ramp."""

    schedule: Schedule | tuple[float, ...] = Key(
        "linear", "how the drop rates grow with depth, or all of them"
    )
    drop_rate: float = Key(0.5, "of the last block", ge=0, lt=1)
    unit: Literal["sample", "batch"] = Key("sample", "what one coin drops a branch for")
    scaling: Literal["inverted", "paper"] = Key("inverted", "survivors divided by p, or evaluation times p")
    keep_eval: bool = Key(False, "paper: divide pretrained weights, so that evaluation starts as it was")
    skip: bool | Literal["auto"] = Key("auto", "leave dropped branches uncomputed; auto: where that pays")
    unused: Literal["auto", "zero", "none"] = Key("auto", "gradients of a branch that did not run at all")
    sync: Literal["none", "ranks", "depth"] = Key(
        "none", "ranks: all processes draw the same; depth: as many blocks run in each"
    )
    rounding: Literal["random", "fixed"] = Key("random", "how the number of rows that run follows from p B")
    paths: Literal["both", "local", "global"] = Key("both", "what is dropped at joins of several paths")
    include: Names = Key((), "patterns of residual adds or blocks: only these")
    exclude: Names = Key((), "patterns of what to leave out")
    overrides: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Key(
        {}, "pattern: drop rate, over the schedule"
    )
    ramp: Ramp = Key("linear", "shape of the change over ramp_epochs")
    ramp_epochs: int = Key(0, "epochs over which the drop rate climbs or falls; 0: none", ge=0)

    @model_validator(mode="after")
    def _rates_are_rates(self) -> Self:
        if not isinstance(self.schedule, str):
            bad = [rate for rate in self.schedule if not 0 <= rate < 1]
            if bad or not self.schedule:
                raise ValueError(
                    f"schedule: drop rates are in [0, 1), not {bad[0] if bad else 'none at all'}"
                )
            if self.ramp_epochs:
                raise ValueError(
                    f"ramp_epochs: a ramp needs a schedule by name: {', '.join(get_args(Schedule))}"
                )
        return self


class Optimizer(Section):
    """The arguments of timm's `create_optimizer_v2`, and a learning rate that is warmed up and decayed."""

    name: str = Key("sgd", "any of timm's: sgd (with Nesterov), adamw, lamb, ...")
    lr: float = Key(..., "of the head, after the warm-up", gt=0)
    weight_decay: float = Key(0.0, "", ge=0)
    momentum: float = Key(0.9, "", ge=0, lt=1)
    layer_decay: float | None = Key(None, "learning rate of a layer over that of the next", gt=0, le=1)
    decay: Literal["cosine", "poly", "multistep"] = Key(
        "cosine", "of the learning rate; multistep: at milestones"
    )
    milestones: tuple[int, ...] = Key((), "multistep: epochs after which the rate falls")
    decay_rate: float = Key(0.1, "multistep: what it is multiplied by then", gt=0, lt=1)
    warmup_epochs: int = Key(0, "", ge=0)
    warmup_lr: float | None = Key(None, "where the warm-up begins; null: a hundredth of lr", gt=0)
    min_lr: float = Key(0.0, "", ge=0)

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        known = list_optimizers()
        if self.name.lower() not in known:
            close = difflib.get_close_matches(self.name.lower(), known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"name: timm has no optimizer {self.name!r}; {hint}timm.optim.list_optimizers()")
        if (self.decay == "multistep") != bool(self.milestones):
            raise ValueError("milestones: the epochs of decay: multistep, and of no other")
        return self


class Train(Section):
    epochs: int = Key(..., "how often every image is seen", ge=1)
    batch_size: int = Key(..., "images per process and batch", ge=1)
    accumulate: int = Key(1, "batches per step", ge=1)
    label_smoothing: float = Key(0.0, "", ge=0, lt=1)
    mixup: float = Key(0.0, "alpha of timm's Mixup; 0 is off", ge=0)
    cutmix: float = Key(0.0, "alpha of CutMix; 0 is off", ge=0)
    distill: float = Key(
        0.0, "weight of a loss that keeps features near the pretrained network's, as it was", ge=0
    )
    clip_norm: float | None = Key(None, "largest norm of the gradient", gt=0)
    ema: float | None = Key(None, "decay of an average of the weights, which is then kept", gt=0, lt=1)
    patience: int | None = Key(None, "stop after so many epochs without a better top-1", ge=1)
    precision: Precision = Key("no", "bf16 or fp16 on a GPU: half the memory, twice the speed")
    channels_last: bool = Key(False, "faster convolutions on GPUs")

    @model_validator(mode="after")
    def _mixup_pairs_images(self) -> Self:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair images: batch_size must be even, not {self.batch_size}")
        return self


class Prune(Section):
    """Shortens the network before the training: the branches go that it misses least on training images."""

    depth: float = Key(..., "share of the branches that stays", gt=0, lt=1)
    images: int = Key(512, "how many training images to choose by", ge=1)


class Pretrain(Section):
    """Makes the "pretrained network" of a demonstration: the first classes only, and no gates."""

    classes: int = Key(..., "", ge=2)
    epochs: int = Key(..., "", ge=1)


class Deliver(Section):
    weights: Literal["last", "best"] = Key("last", "best: picked on the test split, so a little optimistic")
    onnx: bool = Key(True, "write model.onnx and check it on every held-out image")
    plot: bool = Key(True, "draw the curves; needs matplotlib")
    timing_steps: int = Key(0, "steps timed with gates and as many without; 0 is off", ge=0)


class Log(Section):
    every: int = Key(50, "steps between two lines of metrics.jsonl", ge=1)
    probe: bool = Key(False, "activations and gradients at every gate, in probe.png and metrics.jsonl")
    trackers: Trackers = Key((), "where numbers go besides")


class Config(Section):
    output: HomePath = Key(..., "the folder that a run fills")
    seed: int = Key(0, "of everything that is drawn", ge=0)
    device: Literal["auto", "cpu"] = Key("auto", "auto: an accelerator where there is one")
    threads: int | None = Key(None, "of the CPU; null: as many as PyTorch takes", ge=1)
    resume: bool = Key(False, "go on from output/last.pt")
    overwrite: bool = Key(False, "replace what an earlier run left in output")
    compare: bool = Key(False, "train a second time without gates, for the report")
    model: Model = Key(..., "")
    data: Data = Key(..., "")
    gates: Gates | None = Key(Gates(), "null: none, the network at its constant depth")
    optimizer: Optimizer = Key(..., "")
    train: Train = Key(..., "")
    pretrain: Pretrain | None = Key(None, "")
    prune: Prune | None = Key(None, "")
    deliver: Deliver = Key(Deliver(), "")
    log: Log = Key(Log(), "")

    @model_validator(mode="after")
    def _needs_gates(self) -> Self:
        if self.gates is None and self.compare:
            raise ValueError("compare: there are no gates to compare with: gates is null")
        return self


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, an optional one included; None where it holds a value."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _is_number(annotation: Any) -> bool:
    kinds = (annotation, *get_args(annotation))
    return bool({int, float} & {kind for kind in kinds if isinstance(kind, type)}) and bool not in kinds
