"""Modules that are lines of the block which calls them: the sum is made of what they only take, or only give.

``self.add(self.attn(x), x)`` is ``self.attn(x) + x``, whatever else `add` does to the two: a weight for each,
a norm of the sum. And of ``paths = self.fractal(x)`` with ``sum(paths) / len(paths)`` behind it, what each
path runs shows inside of `fractal` alone.
"""

from collections import Counter

import torch
from torch import Tensor

from surgeon._finding.children import hooked
from surgeon._finding.opgraph import operators
from surgeon._finding.residual import additions
from surgeon._tracing.nests import tensors
from surgeon._tracing.operators import is_linear
from surgeon._tracing.record import Call, Recording


def adders(recording: Recording) -> dict[int, int]:
    """The place of each such call, with that of its caller; those further inside come first.

    They add two of their arguments, unrelated in them, and have no layers; or they give several values that
    one of their callers sums up. A module with hooks, which a trace through it would pass by, is none.
    """
    calls = (call for call in recording.calls if call.parent >= 0)
    found = {call.place: call.parent for call in calls if _adds(recording, call)} | _handing_out(recording)
    return dict(sorted(found.items(), reverse=True))


def _handing_out(recording: Recording) -> dict[int, int]:
    """The calls that give several values whose sum a caller makes, and all between the two."""
    calls, log = recording.calls, recording.log
    makers: dict[int, list[int]] = {}
    for call in calls:
        given = (
            {log.made_at(t) for t in tensors(call.output)} if not isinstance(call.output, Tensor) else set()
        )
        for made_at in given if len(given) > 1 else ():
            makers.setdefault(made_at, []).append(call.place)
    found: dict[int, int] = {}
    for step in log.steps if makers else ():
        if step.op < 0 or not (step.adds or log.ops[step.op].func.overloadpacket is torch.ops.aten.stack):
            continue
        made = set(step.sources)
        if any(log.between(a, b) for a in made for b in made if a in makers and b in makers):
            continue  # a stream and what was made of it, which are no paths side by side
        counts = Counter(place for source in made for place in makers.get(source, ()))
        for place in (place for place, count in counts.items() if count > 1):
            between = _between(recording, place, step.owner)
            if between and not any(hooked(calls[one].module) for one in between):
                found |= {one: calls[one].parent for one in between}
    for call in calls:  # what it takes its values from, if that is a list of one, say
        nest = isinstance(call.output, list | tuple) and bool(recording.children(call))
        if call.parent in found and nest and not hooked(call.module):
            found[call.place] = call.parent
    return found


def _between(recording: Recording, place: int, owner: int) -> list[int]:
    """A call and the calls around it, up to one of them; none if that is not around it."""
    way = list[int]()
    while place >= 0 and place != owner:
        way.append(place)
        place = recording.calls[place].parent
    return way if place == owner else []


def _adds(recording: Recording, call: Call) -> bool:
    if not call.additions or recording.children(call) or len(tensors((call.args, call.kwargs))) < 2:
        return False
    ops = recording.log.ops[call.first_op : call.last_op]
    if any(op.flops for op in ops) or hooked(call.module):
        return False
    if all(is_linear(op) and not op.weighted for op in ops) and _of_one_shape(call):
        return True  # a mean of a stack, say
    found = additions(operators(recording.log, call), regions=False)
    return any(addition.code == "no-shortcut" and not addition.kind for addition in found)


def _of_one_shape(call: Call) -> bool:
    """Whether a call gave one tensor of the shape that all its arguments have."""
    given = tensors((call.args, call.kwargs))
    return isinstance(call.output, Tensor) and all(t.shape == call.output.shape for t in given)
