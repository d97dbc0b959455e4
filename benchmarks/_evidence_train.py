"""One training run of `benchmarks.evidence`, and what it was worth on test images."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import surgeon
from benchmarks._evidence_plan import Setting
from benchmarks._evidence_sources import Images, Sources
from surgeon._recipes import models

Row = dict[str, Any]
Network = Callable[[Setting, int], nn.Module]
HELD = 50_000  # training images of Fashion-MNIST from here on are for choices, and in no training set
CURVE = 300  # test images of the curve by epoch


@dataclass(frozen=True)
class Data:
    """What a run sees: network inputs and classes.

    Attributes:
        train: The seed's training images.
        tests: Test sets by name, "test" the first.
        held: Images for choices, in no other set.
    """

    train: tuple[Tensor, Tensor]
    tests: dict[str, tuple[Tensor, Tensor]]
    held: tuple[Tensor, Tensor]
    classes: int


def prepare(setting: Setting, seed: int, sources: Sources) -> Data:
    """The images of one run."""
    sets = sources.fashion() if setting.data == "fashion" else sources.emoji()
    only = {name: _only(images, setting.classes) for name, images in sets.items()}
    pool, count = only.pop("train"), len(setting.classes) or 1 + int(sets["train"].y.max())
    draw = torch.Generator().manual_seed(seed)
    taken = int((pool.y[:HELD]).numel())
    order = torch.randperm(taken, generator=draw)
    if setting.data == "fashion":  # the same number of each class
        each = setting.images // count
        order = torch.cat([order[pool.y[order] == label][:each] for label in range(count)])
    order = order[: setting.images]
    y = pool.y[order]
    if setting.shuffled:
        y = y[torch.randperm(len(y), generator=draw)]
    return Data(
        (_seen(pool.x[order], setting.pixels), y),
        {name: (_seen(i.x[: setting.test], setting.pixels), i.y[: setting.test]) for name, i in only.items()},
        (_seen(pool.x[HELD : HELD + 500], setting.pixels), pool.y[HELD : HELD + 500]),
        count,
    )


def _only(images: Images, classes: tuple[int, ...]) -> Images:
    if not classes:
        return images
    new = torch.full((256,), -1)
    new[list(classes)] = torch.arange(len(classes))
    kept = new[images.y] >= 0
    return Images(images.x[kept], new[images.y[kept]])


def _seen(x: Tensor, pixels: int) -> Tensor:
    """Numbers in [-1, 1] of the size that the network gets; grey stays one channel, to save memory."""
    values = x.float() / 127.5 - 1
    if not len(x) or x.shape[-1] == pixels:
        return values
    if x.shape[-1] % pixels == 0:
        return functional.avg_pool2d(values, x.shape[-1] // pixels)
    return functional.interpolate(values, size=(pixels, pixels), mode="bilinear", antialias=True)


def channels(x: Tensor) -> Tensor:
    """Three channels, last in memory, which convolutions on CPUs take faster."""
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def build(setting: Setting, seed: int, classes: int, sources: Sources, network: Network) -> nn.Module:
    """The network as its training finds it, without gates; the head's weights are the seed's."""
    if setting.start is not None:
        model = network(setting.start, 0)
        torch.manual_seed(seed)
        model.fc = nn.Linear(64, classes)
    elif setting.net == "lite0":
        model = timm.create_model("tf_efficientnet_lite0")
        weights = zip(model.state_dict(), sources.weights().values(), strict=True)
        model.load_state_dict(dict(weights))
        torch.manual_seed(seed)
        model.reset_classifier(classes)
    else:
        torch.manual_seed(seed)
        model = models()[setting.net](num_classes=classes)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def fit(setting: Setting, seed: int, sources: Sources, network: Network) -> tuple[nn.Module, Row]:
    """Trains; the network with its gates, and what the run gave. `network` gives what it starts from."""
    data = prepare(setting, seed, sources)
    model = build(setting, seed, data.classes, sources, network)
    return model, train(model, setting, seed, data)


def train(model: nn.Module, setting: Setting, seed: int, data: Data) -> Row:
    """Trains `model` in place, with the setting's gates, and measures it."""
    steps = -(-len(data.train[1]) // setting.batch) * setting.epochs
    if setting.gates is not None:
        example = channels(data.train[0][:2])
        surgeon.apply(model, **setting.gates, example=example)
    ramp = setting.ramp and surgeon.Ramp(
        model,
        setting.gates["drop_rate"],
        steps=steps // (1 if "plateau" in setting.ramp else 2),
        shape=setting.ramp,
    )
    torch.manual_seed(seed)  # the gates' draws; order and mirroring have a generator of their own
    optimizer, schedule = _optimizer(model, setting, steps)
    order = torch.Generator().manual_seed(seed)
    probe, losses, errors, seconds = Gradients(model), list[float](), list[float](), 0.0
    for _ in range(setting.epochs):
        total, start = 0.0, time.process_time()
        for x, y in batches(data.train, setting.batch, order):
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(model.train()(x), y)
            loss.backward()
            probe.look()
            optimizer.step()
            schedule.step()
            if ramp:
                ramp.step()
            total += float(loss.detach()) * len(y)
        seconds += time.process_time() - start
        losses.append(round(total / len(data.train[1]), 5))
        probe.close()
        if setting.net != "lite0":
            x, y = next(iter(data.tests.values()))
            errors.append(
                round(1 - float((answers(model, x[:CURVE]).argmax(1) == y[:CURVE]).double().mean()), 4)
            )
    found: Row = {"loss": losses, "seconds": round(seconds, 2)}
    if errors:
        found |= {"error": errors, "gradients": probe.epochs}
    return found | {name: worth(answers(model, x), y) for name, (x, y) in data.tests.items()}


def _optimizer(model: nn.Module, setting: Setting, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer: torch.optim.Optimizer
    if setting.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), setting.rate, weight_decay=0.01, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), setting.rate, momentum=0.9, weight_decay=1e-4)
    warm = max(1, steps // setting.epochs)

    def share(step: int) -> float:
        rest = (step - warm) / max(1, steps - warm)
        return (step + 1) / (warm + 1) if step < warm else (1 + math.cos(math.pi * rest)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def batches(
    train: tuple[Tensor, Tensor], size: int, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's batches, mirrored at random; what is left over is a batch unless it is one image alone."""
    x, y = train
    for rows in torch.randperm(len(y), generator=order).split(size):
        mirrored = torch.rand(len(rows), 1, 1, 1, generator=order) < 0.5
        if len(rows) > 1:  # batch norm takes no single image
            yield channels(torch.where(mirrored, x[rows].flip(-1), x[rows])), y[rows]


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of evaluation."""
    model.eval()
    return torch.cat([model(channels(part)) for part in x.split(250)])


def worth(logits: Tensor, y: Tensor) -> Row:
    """Accuracy and calibration, and which answers were right, as the hexadecimal digits of a bit each."""
    found = surgeon.calibration(logits.softmax(1), y)
    right = (logits.argmax(1) == y).numpy()
    return {
        **{name: round(value, 6) for name, value in found.to_dict().items()},
        "right": np.packbits(right).tobytes().hex(),
        "of": len(y),
    }


class Gradients:
    """Mean magnitude of the gradient of each block's first convolution (Huang et al. 2016, figure 7).

    By epoch, over the steps that had one.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = getattr(model, "blocks", ())
        self.weights = [block.conv1.weight for block in blocks if hasattr(block, "conv1")]
        self.epochs: list[list[float]] = []
        self._now: list[list[float]] = [[] for _ in self.weights]

    def look(self) -> None:
        """After a backward."""
        for kept, weight in zip(self._now, self.weights, strict=True):
            if weight.grad is not None:
                kept.append(float(weight.grad.abs().mean()))

    def close(self) -> None:
        """After an epoch."""
        self.epochs.append([float(f"{sum(one) / max(1, len(one)):.4g}") for one in self._now])
        self._now = [[] for _ in self.weights]
