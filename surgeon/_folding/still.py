"""Looking at a model's forward as it evaluates."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgeon._tracing.example import generators_kept, mode


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
