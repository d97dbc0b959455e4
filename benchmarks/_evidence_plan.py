"""What `benchmarks.evidence` runs, in order: docs/evidence_plan.md as data."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

SEEDS = 5
AFTER_SEEDS = 3  # of the depth map, and of what is done with trained networks

Kind = Literal["train", "lesion", "sample", "time", "control"]


@dataclass(frozen=True)
class Setting:
    """One way to train one network; two arms of a part differ in `gates`, `ramp` and `arm` alone.

    Attributes:
        part: Which experiment it belongs to.
        arm: Its name there.
        net: "lite0" with ImageNet weights, or a network of `recipes/models` with random ones.
        data: "fashion" or "emoji".
        pixels: Of an image's edge.
        images: How many to train on, drawn by the seed.
        epochs: How often each is seen.
        batch: Images of a step.
        optimizer: "adamw" or "sgd".
        rate: Peak learning rate.
        gates: Arguments of `surgeon.apply`; None leaves the network without gates.
        ramp: Shape of a `surgeon.Ramp` over the training, "" for a rate that stays.
        classes: Which are learnt; none named means all.
        test: How many test images, from the first.
        start: What the network was trained to before; its head is exchanged.
        shuffled: Whether the training labels are exchanged at random.
    """

    part: str
    arm: str
    net: str
    data: str
    pixels: int
    images: int
    epochs: int
    batch: int
    optimizer: str
    rate: float
    gates: Mapping[str, Any] | None = None
    ramp: str = ""
    classes: tuple[int, ...] = ()
    test: int = 2000
    start: "Setting | None" = None
    shuffled: bool = False

    @property
    def hash(self) -> str:
        """Of everything that decides what a run gives, but for the seed."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """One row of the table: a setting with a seed, and what is done with it."""

    kind: Kind
    setting: Setting
    seed: int
    quick: bool = field(default=False, compare=False)

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells its row from all others."""
        return self.kind, self.setting.part, self.setting.arm, self.seed

    def __str__(self) -> str:
        return f"{self.kind} {self.setting.part}, {self.setting.arm}, seed {self.seed}"


def _linear(rate: float) -> dict[str, Any]:
    return {"drop_rate": rate}


def _batch(rate: float) -> dict[str, Any]:
    return {"drop_rate": rate, "unit": "batch", "scaling": "paper"}


KEPT = _batch(0.5) | {"keep_eval": True}
NONE = "none"

_FASHION = Setting("fashion", NONE, "lite0", "fashion", 48, 300, 5, 32, "adamw", 0.001)
_EMOJI = replace(_FASHION, part="emoji", data="emoji", images=400)
_DEEP = Setting("deep", NONE, "resnet56", "fashion", 14, 600, 10, 64, "sgd", 0.05)
_FIRST = replace(_DEEP, part="first", images=3000, epochs=4, classes=(0, 1, 2, 3, 4))
_AGAIN = replace(_DEEP, part="again", images=200, rate=0.02, classes=(5, 6, 7, 8, 9), start=_FIRST)
_SMALL = {str(rate): _linear(rate) for rate in (0.1, 0.2, 0.4)}
_TUNED = {NONE: None, **{f"linear {rate}": gates for rate, gates in _SMALL.items()}, "paper 0.5": KEPT}


def _arms(setting: Setting, arms: Mapping[str, Mapping[str, Any] | None]) -> list[Setting]:
    return [replace(setting, arm=arm, gates=gates) for arm, gates in arms.items()]


FASHION, EMOJI = _arms(_FASHION, _TUNED), _arms(_EMOJI, _TUNED)
DEEP = _arms(
    _DEEP, {NONE: None, "batch 0.5": _batch(0.5), "sample 0.5": _linear(0.5), "sample 0.2": _linear(0.2)}
)
AGAIN = _arms(_AGAIN, {NONE: None, "sample 0.2": _linear(0.2), "paper 0.5": KEPT})
MAP = [
    replace(
        _DEEP,
        part="map",
        arm=f"resnet{depth}, {rate}",
        net=f"resnet{depth}",
        images=500,
        gates=_batch(rate) if rate else None,
    )
    for depth in (20, 32, 44)
    for rate in (0.0, 0.2, 0.5, 0.8)
]
SIZES = [
    replace(one, part=f"fashion-{images}", images=images)
    for images in (100, 1000)
    for one in FASHION
    if one.arm in (NONE, "linear 0.2", "linear 0.4")
]
RAMPS = [
    replace(_EMOJI, part="emoji-ramps", arm=arm, gates=_linear(0.4), ramp=arm)
    for arm in ("early", "late", "plateau-decay-recovery")
]
CONTROLS = [
    replace(DEEP[0], part="control", arm="never drawn", images=200, epochs=2, gates=_linear(0.0)),
    replace(FASHION[0], part="control", arm="lite0, never drawn", images=100, epochs=1, gates=_linear(0.0)),
    replace(DEEP[0], part="control", arm="shuffled labels", images=300, epochs=6, shuffled=True),
    replace(DEEP[1], part="control", arm="repeated", images=200, epochs=2),
]


def plan() -> Iterator[Run]:
    """Every run, those first whose table is wanted first; seed by seed, so that pairs are whole."""
    yield from _seeds(FASHION, range(AFTER_SEEDS))
    yield from (Run("control", setting, 0) for setting in CONTROLS)
    for seed in range(AFTER_SEEDS):
        yield from (Run("train", setting, seed) for setting in DEEP[:2])
        yield from (Run("lesion", setting, seed) for setting in DEEP[:2])
    yield Run("time", DEEP[1], 0)
    yield from _seeds(EMOJI[::2], range(AFTER_SEEDS))
    yield from (Run("sample", setting, seed) for seed in range(AFTER_SEEDS) for setting in DEEP[:2])
    yield from _seeds(EMOJI[1::2], range(AFTER_SEEDS))
    yield from _seeds((*DEEP[2:], *AGAIN, *MAP), range(AFTER_SEEDS))
    yield from _seeds((*FASHION, *EMOJI, *DEEP, *AGAIN), range(AFTER_SEEDS, SEEDS))
    yield from _seeds((*RAMPS, *SIZES), range(SEEDS))


def _seeds(settings: Sequence[Setting], seeds: range) -> Iterator[Run]:
    for seed in seeds:
        for setting in settings:
            yield Run("train", setting, seed, quick=seed < 2 and setting.part in ("fashion", "emoji"))
