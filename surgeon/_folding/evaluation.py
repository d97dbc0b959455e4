"""Looking at a model's forward as it evaluates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from surgeon._tracing.undisturbed import generators_kept, mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, without fused attention, and without a trace in the random state."""
    with mode(model, False), generators_kept(), spelled_out():
        yield


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
def noting(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Inside, ``running`` has the names of the modules that run, the innermost last, ``""`` for others."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        running.append(names.get(id(module), ""))

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        running.pop()

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
