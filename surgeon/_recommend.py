"""Drop rates that others have published, by model, size of data and length of training.

The table holds what was written down by those who trained the models; the rule over it is short, as the
evidence is: the one paired, seeded ablation in fine-tuning that we know of is docs/evidence.md, and it,
fairseq's authors and others saw no gain. What is recommended is where to start, with the rates worth
trying beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon._text import Listed, Part
from surgeon.errors import UsageError


@dataclass(frozen=True, slots=True)
class Published:
    """One published drop rate.

    Attributes:
        family: How names of such models begin.
        model: Its name in words.
        millions: Its parameters, in millions.
        setting: ``"scratch"``, ``"pretraining"``, ``"fine-tuning"`` or ``"again"``, as in `SETTINGS`.
        images: Millions of training images.
        rate: The final drop rate.
        source: Where that is written.
    """

    family: str
    model: str
    millions: float
    setting: str
    images: float
    rate: float
    source: str


SETTINGS = {
    "scratch": "from random weights",
    "pretraining": "pre-training on many images",
    "fine-tuning": "fine-tuning weights that were pre-trained on other or unlabelled images",
    "again": "fine-tuning on the images of the pre-training, larger",
}

_CONVNEXT, _MAE = "ConvNeXt, TRAINING.md", "MAE, FINETUNE.md"
_CONVNEXT_V2 = "ConvNeXt V2, TRAINING.md"
_COMPOSER = "Composer's documentation, stochastic depth"
_IN1K, _IN22K = 1.28, 14.2

PUBLISHED = (
    *(
        Published("convnext", f"ConvNeXt-{size}", millions, "scratch", _IN1K, rate, _CONVNEXT)
        for size, millions, rate in (("T", 29, 0.1), ("S", 50, 0.4), ("B", 89, 0.5), ("L", 198, 0.5))
    ),
    *(
        Published("convnext", f"ConvNeXt-{size}", millions, "pretraining", _IN22K, rate, _CONVNEXT)
        for size, millions, rate in (("B", 89, 0.1), ("L", 198, 0.1), ("XL", 350, 0.2))
    ),
    *(
        Published("convnext", f"ConvNeXt-{size}", millions, "fine-tuning", _IN1K, rate, _CONVNEXT)
        for size, millions, rate in (("B", 89, 0.2), ("L", 198, 0.3), ("XL", 350, 0.4))
    ),
    *(
        Published("convnext", f"ConvNeXt-{size}, 384 pixels", millions, "again", _IN1K, rate, _CONVNEXT)
        for size, millions, rate in (("B", 89, 0.8), ("L", 198, 0.95))
    ),
    *(
        Published(
            "convnextv2",
            f"ConvNeXt V2-{size}",
            millions,
            "fine-tuning",
            _IN1K,
            rate,
            "ConvNeXt V2, TRAINING.md",
        )
        for size, millions, rate in (("atto", 3.7, 0.1), ("tiny", 29, 0.2), ("base", 89, 0.1))
    ),
    *(
        Published("vit", f"MAE ViT-{size}", millions, "fine-tuning", _IN1K, rate, _MAE)
        for size, millions, rate in (("B", 86, 0.1), ("L", 304, 0.2), ("H", 632, 0.3))
    ),
    *(
        Published("deit3", f"DeiT III-{size}", millions, "pretraining", _IN22K, rate, "deit, issue 176")
        for size, millions, rate in (("S", 22, 0.0), ("B", 87, 0.1), ("L", 304, 0.3), ("H", 632, 0.5))
    ),
    Published("transnext", "TransNeXt-B", 90, "again", _IN1K, 0.8, "TransNeXt, configs/finetune"),
    Published("resnet", "ResNet-50", 25.6, "scratch", _IN1K, 0.2, _COMPOSER),
    Published("resnet", "ResNet-101", 44.5, "scratch", _IN1K, 0.4, _COMPOSER),
)


@dataclass(frozen=True, slots=True)
class Recommendation(Listed[Published]):
    """Where to start; iterating gives the published rates.

    Attributes:
        rate: The final drop rate of a linear schedule.
        tries: Rates worth a run each, 0 among them.
        nearest: The published rate that it follows.
        others: Further published rates of the family.
        notes: What the rule did, and what speaks against it.
    """

    rate: float
    tries: tuple[float, ...]
    nearest: Published
    others: tuple[Published, ...]
    notes: tuple[str, ...]

    def _entries(self) -> Sequence[Published]:
        return (self.nearest, *self.others)

    def parts(self) -> Sequence[Part]:
        """Where to start, the published rates, and what speaks against them."""
        tries = ", ".join(f"{rate:g}" for rate in self.tries)
        head = ("published", "millions", "setting", "images", "rate", "source")
        rows = tuple(
            (
                one.model,
                f"{one.millions:g}",
                one.setting,
                f"{one.images:g} million",
                f"{one.rate:g}",
                one.source,
            )
            for one in self
        )
        start = f"drop rate {self.rate:g}, linear; worth a run each: {tries}"
        return Part(lines=(start,)), Part(head=head, rows=rows), Part(lines=self.notes)


def recommend(
    name: str, millions: float, *, images: int, epochs: int, scratch: bool = False
) -> Recommendation:
    """Where to start with the drop rate of a model.

    The nearest published rate counts: of the model's family where there is one, else of any, in the same
    setting, by the logarithm of the number of parameters. A hundred epochs of few images raise it by .05, as
    DeiT III did for a longer training.

    Args:
        name: The model's name without its library; the family is read off its beginning.
        millions: Its parameters, in millions, above 0.
        images: Images to train on, at least 1.
        epochs: How often each is seen, at least 1.
        scratch: Whether it begins with random weights.

    Raises:
        UsageError: A number is out of range.
    """
    for what, value in (("images", images), ("epochs", epochs), ("parameters", millions)):
        if value <= 0:
            raise UsageError(f"{what} is {value}; it has to be above 0")
    setting = "scratch" if scratch else "fine-tuning"
    family = _family(name)
    there = [one for one in PUBLISHED if one.setting == setting and one.family == family]
    pool = there or [one for one in PUBLISHED if one.setting == setting]
    nearest = min(pool, key=lambda one: abs(math.log(one.millions / millions)))
    others = tuple(one for one in PUBLISHED if one.family == (family or nearest.family) and one != nearest)
    rate, notes = nearest.rate, []
    if not there:
        where = f"the family {family}" if family else f"models named {name}"
        notes.append(
            f"Nothing is published of {where} in this setting; the nearest size of another one counts."
        )
    if images < 1e5 and epochs >= 100:
        rate = round(rate + 0.05, 2)
        notes.append(
            f"{epochs} epochs of {images:,} images see each often: .05 more, as DeiT III did at 240."
        )
    if images < 1e5:
        notes.append(
            f"No published rate is for so few images as {images:,}; this one is for {nearest.images:g} "
            "million. Let held-out images decide."
        )
    notes.append("Rates .05 apart do alike (UniFormer, issue 48); MAE's four seeds differ by .07 to .08 %.")
    if not scratch:
        notes.append(
            "Against it: paired runs on a few hundred images (docs/evidence.md) saw no gain in accuracy, and "
            "fairseq's authors saw none. compare=true trains the same network without gates beside yours."
        )
    elif images < 10_000:
        notes.append(
            "Against it: a ResNet-56 trained from scratch for ten epochs on 600 images (docs/evidence.md) "
            "lost accuracy by drop rates that rise to 0.5. compare=true shows what they do to yours."
        )
    tries = tuple(sorted({0.0, round(rate / 2, 3), rate, min(0.95, round(2 * rate, 2))}))
    return Recommendation(rate, tries, nearest, others, tuple(notes))


def _family(name: str) -> str | None:
    """The longest beginning of the name that is in the table."""
    found = sorted({one.family for one in PUBLISHED if name.startswith(one.family)}, key=len)
    return found[-1] if found else None
