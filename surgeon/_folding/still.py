"""Looking at a model's forward without leaving a trace in it."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, without fused attention, and without a trace in the random state.

    The flag is written directly: an overridden ``train()`` may clear caches or return nothing. Writing it
    back is left to ``unchanged``.
    """
    state, plain = random.getstate(), torch.get_rng_state()
    for module in model.modules():
        module.__dict__["training"] = False
    try:
        with spelled_out():
            yield
    finally:
        random.setstate(state)
        torch.set_rng_state(plain)


@contextmanager
def spelled_out() -> Iterator[None]:
    """No gradients, and no fused attention: the surroundings in which a model is recorded."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, and every container in them its content.

    Modules keep things as they run: LeViT an attention bias per device, others their last attention map.
    After a run on fake tensors these would be poison.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    contents: dict[int, tuple[Any, Any]] = {}
    for _, saved in attributes:
        _keep(saved.values(), contents, depth=3)
    try:
        yield
    finally:
        for module, saved in attributes:
            module.__dict__.clear()
            module.__dict__.update(saved)
        for container, content in contents.values():
            _refill(container, content)


def _keep(items: Iterable[Any], contents: dict[int, tuple[Any, Any]], depth: int) -> None:
    for item in items:
        if isinstance(item, dict | list | set) and id(item) not in contents and depth:
            contents[id(item)] = (item, item.copy())
            _keep(list(item.values() if isinstance(item, dict) else item), contents, depth - 1)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
