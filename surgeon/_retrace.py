"""Forgets what gated blocks have traced, for changes that they cannot see."""

from torch import nn

from surgeon._gating.gated import gated_blocks
from surgeon._meant import says_the_call


@says_the_call
def retrace(model: nn.Module) -> nn.Module:
    """Makes every gated block forget its traces, in place, and returns the model; weights and rates stay.

    A gated block runs a trace of its forward and follows what that reads (docs/training.md, "What may change
    after apply"). For what it cannot see, such as an environment variable, call this after the change: the
    next call of each kind is traced anew.

    Args:
        model: A gated model; one without gates is left as it is.

    Example:
        >>> import surgeon, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = surgeon.apply(model, drop_rate=0.5)
        >>> surgeon.retrace(model) is model
        True
    """
    for _, _, gating in gated_blocks(model):
        gating.forget()
    return model
