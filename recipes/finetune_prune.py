"""Shortens the network of `finetune.py` before it is trained: the branches go that it misses least.

What is missed is measured on training images, never on those held out. Where the head fits the classes, the
labels count; a network that is to get a new head has to go on giving what it gave at its full depth.
"""

import json

import torch
from accelerate import Accelerator
from finetune_data import Images
from finetune_files import write_text
from finetune_settings import Config
from torch import nn
from torch.utils.data import DataLoader, Subset

import surgeon


def shortened(
    settings: Config, model: nn.Module, images: Images, accelerator: Accelerator, *, fresh: bool
) -> list[str]:
    """Deletes branches of the model, in place, and returns their names; a run that goes on deletes the same.

    Args:
        settings: Of the run, with `prune`.
        model: The whole network, before it gets a new head.
        images: To choose by.
        accelerator: All processes delete what the main one has chosen.
        fresh: The run starts: what an earlier one left in the folder does not count.
    """
    place, example = settings.output / "pruned.json", torch.zeros(2, *images.input_size)
    if accelerator.is_main_process and (fresh or not place.exists()):
        write_text(place, json.dumps(_chosen(settings, model, images, example), indent=2) + "\n")
    accelerator.wait_for_everyone()
    names: list[str] = json.loads(place.read_text(encoding="utf-8"))
    surgeon.prune(model.cpu(), names, example=example, inplace=True)
    return names


def _chosen(settings: Config, model: nn.Module, images: Images, example: torch.Tensor) -> list[str]:
    assert settings.prune is not None
    every = max(1, len(images.train) // settings.prune.images)
    some = Subset(images.train, range(0, len(images.train), every))
    batches = list(DataLoader(some, 2 * settings.train.batch_size))
    labelled = settings.model.keep_head
    data = batches if labelled else [inputs for inputs, _ in batches]
    before = {residual.name for residual in surgeon.find(model, example)}
    pruned = surgeon.prune(model, depth=settings.prune.depth, data=data, example=example)
    left = {residual.name for residual in surgeon.find(pruned, example)}
    return sorted(before - left)
