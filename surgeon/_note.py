"""The note of evaluation scales on the model itself, where other libraries' savers take it along.

Hugging Face's ``save_pretrained`` writes ``model.config``, timm's ``save_for_hf`` ``model.pretrained_cfg``,
each to the ``config.json`` in which `surgeon.load` looks for it.
"""

from typing import Any

from torch import nn

from surgeon._gating.block import NOTE
from surgeon._gating.gated import scales_by_name


def put_note(model: nn.Module) -> None:
    """Notes the evaluation scales of ``model`` in its configuration, if it has one and there are any."""
    scales = scales_by_name(model)
    for home in _homes(model) if scales else ():
        home[NOTE] = scales


def renew_note(model: nn.Module) -> None:
    """Puts right what is noted on a model whose gates have been folded or removed."""
    noted = any(home.pop(NOTE, None) is not None for home in _homes(model))
    if noted:
        put_note(model)


def _homes(model: nn.Module) -> list[dict[str, Any]]:
    """What is written as a configuration: an object that becomes a dict for that, or a dict."""
    found = [getattr(model, name, None) for name in ("config", "pretrained_cfg")]
    objects = [vars(home) for home in found if hasattr(home, "to_dict") and hasattr(home, "__dict__")]
    return [*objects, *(home for home in found if type(home) is dict)]
