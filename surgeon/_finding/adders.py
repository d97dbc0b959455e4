"""Modules that only add what they are given: their sum is a line of the block that calls them.

``self.add(self.attn(x), x)`` is ``self.attn(x) + x``, whatever else `add` does to the two: a weight for each,
a norm of the sum.
"""

from torch import Tensor, nn

from surgeon._finding.opgraph import operators
from surgeon._finding.residual import additions
from surgeon._tracing.example import tensors
from surgeon._tracing.operators import is_linear
from surgeon._tracing.record import Call, Recording


def adders(recording: Recording) -> dict[int, int]:
    """The place of each call that adds two of its arguments, unrelated in it, with that of its caller.

    A module that has layers of its own, or hooks, which a trace through it would pass by, is none.
    """
    calls = (call for call in recording.calls if call.parent >= 0)
    return {call.place: call.parent for call in calls if _adds(recording, call)}


def _adds(recording: Recording, call: Call) -> bool:
    if not call.additions or recording.children(call) or len(tensors((call.args, call.kwargs))) < 2:
        return False
    ops = recording.log.ops[call.first_op : call.last_op]
    if any(op.flops for op in ops) or _hooked(call.module):
        return False
    if all(is_linear(op) and not op.weighted for op in ops) and _of_one_shape(call):
        return True  # a mean of a stack, say
    found = additions(operators(recording.log, call), regions=False)
    return any(addition.code == "no-shortcut" and not addition.kind for addition in found)


def _of_one_shape(call: Call) -> bool:
    """Whether a call gave one tensor of the shape that all its arguments have."""
    given = tensors((call.args, call.kwargs))
    return isinstance(call.output, Tensor) and all(t.shape == call.output.shape for t in given)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
