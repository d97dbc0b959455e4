"""The settings of `finetune.py`: every key, its type, its range, its default and what it trades.

A config is a YAML file with the sections below. Unknown and ill-typed keys are refused with the key's full
name, so that a misspelt `optimizer.weigth_decay` cannot silently train without weight decay.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from surgeon.errors import UsageError

CONFIGS = Path(__file__).resolve().parent / "configs"

HomePath = Annotated[Path, AfterValidator(Path.expanduser)]  # no shell expands the ~ in data.root=~/flowers


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    name: str  # timm:NAME, torchvision:NAME, recipes:NAME or package.module:callable
    kwargs: dict[str, Any] = {}  # further arguments of the model's constructor
    pretrained: bool = False  # fetch the published weights
    checkpoint: HomePath | None = None  # or start from this file (.safetensors, .pt)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained: true and checkpoint both give the weights; keep one of them")
        return self


class Data(Section):
    kind: Literal["folder", "digits", "fake"]
    root: HomePath = Path("data")  # folder: holds the two splits, each with one folder of images per class
    train: str = "train"  # folder: name of the training split below root
    test: str = "val"  # folder: name of the held-out split below root
    image_size: int | None = Field(None, ge=8)  # None: what the model was trained on; digits: 32
    auto_augment: str | None = None  # folder: timm's spelling, "rand-m9-mstd0.5-inc1"
    erase: float = Field(0.0, ge=0, le=1)  # folder: probability of random erasing
    test_share: float = Field(0.25, gt=0, lt=1)  # digits: share of the images held out
    channels: int = Field(3, ge=1)  # fake
    classes: int = Field(4, ge=2)  # fake
    samples: int = Field(16, ge=2)  # fake: images in each split
    workers: int = Field(0, ge=0)  # processes that load images; 0 is right for data held in memory


class Gates(Section):
    """The arguments of `surgeon.apply`, and a ramp."""

    schedule: str | tuple[float, ...] = "linear"
    drop_rate: float = Field(0.5, ge=0, lt=1)
    unit: Literal["sample", "batch"] = "sample"
    scaling: Literal["inverted", "paper"] = "inverted"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ramp_epochs: int = Field(0, ge=0)  # epochs over which the drop rate climbs to its full value


class Optimizer(Section):
    """The arguments of timm's `create_optimizer_v2`, and a learning rate that is warmed up and decayed."""

    name: str = "sgd"
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    layer_decay: float | None = Field(None, gt=0, le=1)
    decay: Literal["cosine", "poly"] = "cosine"
    warmup_epochs: int = Field(0, ge=0)
    min_lr: float = Field(0.0, ge=0)


class Train(Section):
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # per process
    accumulate: int = Field(1, ge=1)  # batches per step
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)  # alpha of timm's Mixup; 0 is off
    cutmix: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)  # decay of an average of the weights, which is then kept
    precision: Literal["no", "fp16", "bf16"] = "no"
    channels_last: bool = False

    @model_validator(mode="after")
    def _mixup_pairs_images(self) -> Self:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair images: batch_size must be even, not {self.batch_size}")
        return self


class Pretrain(Section):
    """Makes the "pretrained network" of a demonstration: the first classes only, and no gates."""

    classes: int = Field(ge=2)
    epochs: int = Field(ge=1)


class Deliver(Section):
    weights: Literal["last", "best"] = "last"  # best: picked on the test split, so a little optimistic
    onnx: bool = True
    plot: bool = True  # needs matplotlib
    timing_steps: int = Field(0, ge=0)  # steps timed with gates and as many without; 0 is off


class Log(Section):
    every: int = Field(50, ge=1)  # steps between two lines of metrics.jsonl
    tensorboard: bool = False


class Config(Section):
    output: HomePath
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = Field(None, ge=1)  # of the CPU; None: as many as PyTorch takes
    resume: bool = False  # go on from output/last.pt
    overwrite: bool = False  # replace what an earlier run left in output
    model: Model
    data: Data
    gates: Gates = Gates()
    optimizer: Optimizer
    train: Train
    pretrain: Pretrain | None = None
    deliver: Deliver = Deliver()
    log: Log = Log()


def load_config(config: str, overrides: list[str]) -> Config:
    """Reads a YAML file, or one of `recipes/configs` by its bare name, and lays `key=value` on top.

    Raises:
        UsageError: If there is no such file, it is not YAML, or a key is unknown or ill-typed.
    """
    path = _find(config)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} holds no settings: expected sections such as `model:` and `train:`.")
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(
            f"{path.name}: " + "; ".join(_explain(problem) for problem in error.errors())
        ) from error


def dump_config(config: Config) -> str:
    """The settings as YAML, defaults and overrides included: what reproduces the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _find(config: str) -> Path:
    for path in (Path(config), CONFIGS / f"{config}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise UsageError(f"there is no config {config!r}: not a file, and not one of {', '.join(known)}.")


def _override(tree: dict[str, Any], override: str) -> None:
    """Writes one `section.key=value` into the tree; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"cannot read the override {override!r}: write key=value, as in train.epochs=5.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: the value {text!r} is not YAML: {error}") from error
    *sections, last = key.split(".")
    for section in sections:
        below = tree.get(section)
        tree[section] = below = {} if below is None else below
        if not isinstance(below, dict):
            raise UsageError(f"{key}: {section} is a value, {below!r}, and has no keys below it.")
        tree = below
    tree[last] = value


def _explain(problem: Any) -> str:
    """One of pydantic's complaints in a line: the key's full name, what is wrong, what would do."""
    *sections, last = map(str, problem["loc"]) if problem["loc"] else ("",)
    where = ".".join((*sections, last))
    match problem["type"]:
        case "extra_forbidden":
            known = _keys(sections)
            close = difflib.get_close_matches(last, known, n=1)
            hint = f"did you mean {'.'.join((*sections, close[0]))}? " if close else ""
            return f"{where}: unknown key; {hint}Keys here: {', '.join(known)}"
        case "missing":
            return f"{where}: missing; give it in the file or as {where}=VALUE"
        case "value_error":
            return f"{where}: {problem['ctx']['error']}"
    return f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _keys(sections: list[str]) -> list[str]:
    """The keys of the section at that place."""
    place: type[BaseModel] = Config
    for name in sections:
        annotation = place.model_fields[name].annotation
        place = Pretrain if name == "pretrain" else annotation  # type: ignore[assignment]  # the optional one
    return list(place.model_fields)
