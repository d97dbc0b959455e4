"""What is done with trained networks: branches deleted, gates drawn at evaluation, steps timed, controls."""

import copy
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.functional import rotate

import surgeon
from benchmarks._evidence_plan import DEEP, NONE, Run, Setting
from benchmarks._evidence_sources import Sources
from benchmarks._evidence_train import Data, Row, answers, batches, build, channels, fit, prepare, worth
from surgeon._sample import Samples

SHARES = (0.1, 0.25, 0.375, 0.5)  # of the branches, deleted together
DRAWS = 8
_ROUNDS = 12
_KEPT = {("first", NONE), *((one.part, one.arm) for one in DEEP[:2])}


@dataclass(frozen=True)
class Trained:
    """Trained networks, kept in a folder by settings and seed; what is not there is trained anew.

    Attributes:
        sources: Where the images come from.
        cache: The folder.
    """

    sources: Sources
    cache: Path

    def fit(self, setting: Setting, seed: int) -> tuple[nn.Module, Row]:
        """Trains, and keeps the network where others build on it."""
        model, found = fit(setting, seed, self.sources, self.network)
        if (setting.part, setting.arm) in _KEPT:
            self.cache.mkdir(parents=True, exist_ok=True)
            part = self._path(setting, seed).with_suffix(".part")
            torch.save(model.state_dict(), part)
            part.rename(self._path(setting, seed))
        return model, found

    def network(self, setting: Setting, seed: int) -> nn.Module:
        """The network as its training left it, with its gates."""
        path = self._path(setting, seed)
        if not path.exists():
            return self.fit(setting, seed)[0]
        data = prepare(setting, seed, self.sources)
        model = build(setting, seed, data.classes, self.sources, self.network)
        if setting.gates is not None:
            surgeon.apply(model, **setting.gates, example=channels(data.train[0][:2]))
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def _path(self, setting: Setting, seed: int) -> Path:
        return self.cache / f"{setting.part}-{setting.hash}-{seed}.pt"


def carry_out(run: Run, trained: Trained) -> Row:
    """What one run gives."""
    if run.kind == "train":
        return trained.fit(run.setting, run.seed)[1]
    does = {"lesion": lesion, "sample": sample, "time": step_time, "control": control}
    return does[run.kind](run.setting, run.seed, trained)


def lesion(setting: Setting, seed: int, trained: Trained) -> Row:
    """The network without each branch and without several, at once, after an epoch, and distilled.

    On images held back: which branches are chosen, each one alone, random ones and the last ones. The network
    without those that were chosen is measured on the first 1,000 test images.
    """
    model = trained.network(setting, seed)
    data = prepare(replace(setting, test=1000), seed, trained.sources)
    full = (model if setting.gates is None else surgeon.fold(model)).eval()
    tests, held = data.tests["test"], [(channels(data.held[0]), data.held[1])]
    names = [one.name for one in surgeon.find(full, held[0][0][:2]) if one.kind in ("identity", "projection")]
    counts = sorted({round(share * len(names)) for share in SHARES})
    found = surgeon.lesion(full, held, counts=counts, draws=3, candidates=2, seed=seed)
    depths = []
    for one in found.curve:
        chosen = surgeon.prune(full, one.chosen)
        depths.append(
            {
                "deleted": one.deleted,
                "chosen": list(one.chosen),
                "at once": _accuracy(chosen, tests),
                "at random": [worth.accuracy for worth in one.at_random],
                "the last ones": one.tail.accuracy,
                "after an epoch": _accuracy(epoch(copy.deepcopy(chosen), data, seed), tests),
                "distilled": _accuracy(epoch(chosen, data, seed, full), tests),
            }
        )
    alone = {one.name: one.worth.accuracy for one in found.single}
    return {"full": _accuracy(full, tests), "held": found.full.accuracy, "alone": alone, "depths": depths}


def _accuracy(model: nn.Module, tests: tuple[Tensor, Tensor]) -> float:
    x, y = tests
    return round(float((answers(model, x).argmax(1) == y).double().mean()), 4)


def epoch(model: nn.Module, data: Data, seed: int, teacher: nn.Module | None = None) -> nn.Module:
    """One epoch more on the training images, in place; with a teacher half of the loss is its answer.

    Hinton et al. 2015 (arXiv:1503.02531), temperature 2.
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    for x, y in batches(data.train, 64, torch.Generator().manual_seed(seed)):
        optimizer.zero_grad(set_to_none=True)
        logits = model.train()(x)
        loss = functional.cross_entropy(logits, y)
        if teacher is not None:
            with torch.no_grad():
                told = (teacher.eval()(x) / 2).softmax(1)
            loss = loss / 2 + 2 * functional.kl_div((logits / 2).log_softmax(1), told, reduction="batchmean")
        loss.backward()
        optimizer.step()
    return model


def sample(setting: Setting, seed: int, trained: Trained) -> Row:
    """Calibration of one answer and of the mean over networks that the gates draw, also on turned images.

    A network that was trained without gates gets them for the drawing alone (linear, 0.5).
    """
    model = trained.network(setting, seed)
    data = prepare(replace(setting, test=1000), seed, trained.sources)
    x, y = data.tests["test"]
    if setting.gates is None:
        surgeon.apply(model, drop_rate=0.5, unit="batch", example=channels(x[:2]))
    found: Row = {}
    for name, images in {"upright": x, "turned": rotate(x, 30.0, fill=[-1.0])}.items():
        torch.manual_seed(seed)
        drawn = torch.cat(
            [surgeon.sample(model, channels(part), DRAWS).outputs for part in images.split(250)], 1
        )
        logits = answers(model, images)
        right = (logits.argmax(1) == y).numpy()
        found[name] = worth(logits, y)
        found[f"{name}, drawn"] = worth(drawn.softmax(-1).mean(0).log(), y)
        found[f"{name}, disagreement"] = _finds_errors(Samples(drawn).disagreement, right)
    return found


def _finds_errors(doubt: Tensor, right: Any) -> float:
    """How likely a wrong answer has more doubt than a right one (the area under the ROC curve)."""
    good, bad = doubt[torch.from_numpy(right)], doubt[~torch.from_numpy(right)]
    above = (bad[:, None] > good).double() + (bad[:, None] == good).double() / 2
    return round(float(above.mean()), 4)


def step_time(setting: Setting, seed: int, trained: Trained) -> Row:
    """Processor time of training steps of all arms, taken in turns on the same batch."""
    data = prepare(setting, seed, trained.sources)
    x, y = next(batches(data.train, setting.batch, torch.Generator().manual_seed(seed)))
    models = {}
    for one in DEEP:
        models[one.arm] = build(one, seed, data.classes, trained.sources, trained.network)
        if one.gates is not None:
            surgeon.apply(models[one.arm], **one.gates, example=x[:2])
    flops = {
        arm: 1.0 if arm == NONE else surgeon.status(model).expected_flops for arm, model in models.items()
    }
    taken: dict[str, list[float]] = {arm: [] for arm in models}
    for _ in range(_ROUNDS + 1):
        for arm, model in models.items():
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            functional.cross_entropy(model.train()(x), y).backward()
            taken[arm].append(time.process_time() - start)
    steps = {arm: times[1:] for arm, times in taken.items()}  # the first one warms up
    return {
        arm: {
            "seconds": [round(t, 4) for t in times],
            "ratio": round(statistics.fmean(times) / statistics.fmean(steps[NONE]), 4),
            "flops": round(flops[arm], 4),
        }
        for arm, times in steps.items()
    }


def control(setting: Setting, seed: int, trained: Trained) -> Row:
    """A run whose outcome is known beforehand: `holds` says whether it came."""
    first, second = _controlled(setting, seed, trained)
    if setting.shuffled:
        accuracy = first["test"]["accuracy"]
        # Answers of one network are right or wrong together by class, so this is wider than the binomial's.
        return {"accuracy": accuracy, "holds": 0.05 <= accuracy <= 0.15}
    for row in (first, second):
        del row["seconds"]
    return {"accuracy": first["test"]["accuracy"], "holds": first == second}


def _controlled(setting: Setting, seed: int, trained: Trained) -> tuple[Row, Row]:
    other = setting if setting.arm == "repeated" else replace(setting, gates=None)
    first = trained.fit(setting, seed)[1]
    return first, first if setting.shuffled else trained.fit(other, seed)[1]
