"""Parameters that a model reads only through an invertible function: ``sigmoid(alpha)``, ``exp(log_gain)``.

No factor on ``alpha`` scales ``sigmoid(alpha)``. But where nothing else reads ``alpha``, the value of
``sigmoid(alpha)`` is as good as a parameter: the fold multiplies that, and ``alpha`` becomes
``logit(s * sigmoid(alpha))``. This is the last resort, as a scale above 1 may lead out of the function's
range.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from surgeon._flat import Call, Flat, Source, Value

Function = Callable[[Tensor], Tensor]

INVERTIBLE: dict[str, tuple[Function, Function]] = {
    "sigmoid": (torch.sigmoid, torch.logit),
    "tanh": (torch.tanh, torch.atanh),
    "exp": (torch.exp, torch.log),
}
"""Functions and their inverses, entry by entry."""

_SAME_ENTRIES = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "expand", "squeeze"),
        *("unsqueeze", "clone", "alias", "detach", "cat"),
    )
)


def freed(flat: Flat) -> Flat:
    """The same model with such values in place of their parameters; the argument is not changed."""
    readers = Counter(value for call in flat.calls for value in call.inputs)
    alone = {v: v for v in flat.parameters if readers[v] == 1 and v not in flat.outputs}
    sources: dict[Value, Source] = dict(flat.parameters)
    calls = []
    for call in flat.calls:
        origin = alone.get(call.inputs[0]) if len(call.inputs) == len(call.outputs) == 1 else None
        function = call.name.removeprefix("aten.")
        if origin is not None and function in INVERTIBLE:
            sources[call.outputs[0]] = replace(sources.pop(origin), through=function)
            continue
        if origin is not None and _keeps_entries(call) and readers[call.outputs[0]] == 1:
            alone[call.outputs[0]] = origin
        calls.append(call)
    return replace(flat, calls=tuple(calls), parameters=sources)


def _keeps_entries(call: Call) -> bool:
    """Whether the result holds the same numbers in another form."""
    return call.name in _SAME_ENTRIES
