"""What else can take a scale, as a last resort, where no parameter as such can.

* A parameter that the model reads only through an invertible function: ``sigmoid(alpha)``, ``exp(log_gain)``.
  No factor on ``alpha`` scales ``sigmoid(alpha)``; but that value is as good as a parameter. The fold
  multiplies it, and ``alpha`` becomes ``logit(s * sigmoid(alpha))``. A scale above 1 may lead out of the
  function's range, and then nothing is folded.
* The running mean of a batch norm, which is all that keeps ``w (x - m) / sqrt(v + eps) + b`` from being
  linear: with ``x`` and ``m`` times ``s`` and ``w`` times ``t``, the result is ``s t`` times what it was if
  ``b`` takes ``s t`` too. In GhostNetV3 a norm alone is the cheap path beside convolutions.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from surgeon._folding.flat import Flat, Source
from surgeon._folding.recorder import OpCall, Value
from surgeon._tracing.aten import Family, families, family_of, named

Function = Callable[[Tensor], Tensor]

INVERTIBLE: dict[str, tuple[Function, Function]] = {
    "sigmoid": (torch.sigmoid, torch.logit),
    "tanh": (torch.tanh, torch.atanh),
    "exp": (torch.exp, torch.log),
}
"""Functions and their inverses, entry by entry."""

_SAME_ENTRIES = families("FORMS AXES DIMS COPIES CATS")


def freed(flat: Flat) -> Flat:
    """The same model with such values in place of their parameters; the argument is not changed."""
    readers = Counter(value for call in flat.calls for value in call.inputs)
    return _moving_means(_functions(flat, readers), readers)


def _functions(flat: Flat, readers: Counter[Value]) -> Flat:
    """Functions of parameters as parameters."""
    alone = {v: v for v in flat.parameters if readers[v] == 1 and v not in flat.outputs}
    sources: dict[Value, Source] = dict(flat.parameters)
    calls = []
    for call in flat.calls:
        origin = alone.get(call.inputs[0]) if len(call.inputs) == len(call.outputs) == 1 else None
        function = named(call.name)
        if origin is not None and function in INVERTIBLE:
            sources[call.outputs[0]] = replace(sources.pop(origin), through=function)
            continue
        if origin is not None and family_of(call.name) in _SAME_ENTRIES and readers[call.outputs[0]] == 1:
            alone[call.outputs[0]] = origin
        calls.append(call)
    return replace(flat, calls=tuple(calls), parameters=sources)


def _moving_means(flat: Flat, readers: Counter[Value]) -> Flat:
    """Running means that one evaluating batch norm reads as parameters, and that norm under its wider law."""
    sources, buffers = dict(flat.parameters), dict(flat.buffers)
    calls = []
    for call in flat.calls:
        norm = family_of(call.name) is Family.BATCH_NORMS
        mean = call.arguments.get("running_mean") if norm else None
        if isinstance(mean, Value) and mean in buffers and readers[mean] == 1 and not _trains(call):
            sources[mean] = Source((buffers.pop(mean),))
            calls.append(replace(call, name="surgeon.batch_norm"))
        else:
            calls.append(call)
    return replace(flat, calls=tuple(calls), parameters=sources, buffers=buffers)


def _trains(call: OpCall) -> bool:
    return bool(call.arguments.get("training", False)) or "_with_update" in call.name
