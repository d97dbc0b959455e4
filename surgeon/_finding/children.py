"""Which modules below a block are no plain leaves of its trace."""

from collections.abc import Container, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from surgeon._finding.addition import Addition
from surgeon._finding.flow import Flow
from surgeon._tracing.children import Below, StandIn
from surgeon._tracing.nests import tensors
from surgeon._tracing.operators import drops_rows
from surgeon._tracing.oplog import Op
from surgeon._tracing.record import Call, Recording
from surgeon._tracing.undisturbed import generators_kept


def below(recording: Recording, call: Call, adders: Container[int]) -> Below:
    """How a trace of ``call`` treats what it calls, while the model is in training mode.

    Traced through are the modules in ``adders``, without which its sums do not show, and those that hold
    stochastic depth but no addition: steps of its own branch, for which the gate on it stands in.
    """
    paths = {module: path for path, module in call.module.named_modules()}
    adding, todo = set[str](), [call]
    while todo:
        children = [one for one in recording.children(todo.pop()) if one.place in adders]
        adding.update(paths[one.module] for one in children)
        todo += children
    opened = frozenset(adding | _holding_drops(recording, call, paths))
    return Below(opened, {} if recording.training else _stand_ins(recording, call, paths))


def hand_out_both(recording: Recording, call: Call, flow: Flow, found: Sequence[Addition]) -> frozenset[str]:
    """The children that give both sides of a sum of their caller's, such as ``(y, preactivation)``.

    Only a trace through such a child shows what the one is of the other. One with sums of its own is none.
    """
    plain = {
        one.module
        for one in recording.below(call)
        if not one.additions and not one.wrote and not hooked(one.module)
    }
    opened: set[str] = set()
    for addition in found:
        if addition.code in (None, "bias") or not addition.shortcut:
            continue
        for node in flow.sources(addition.shortcut) & flow.sources(addition.branch):
            if node.op != "call_module" or len(tensors(flow.fact(node).value)) < 2:
                continue
            parts = [
                {n for n in flow.sources(s, itself=True) if node in n.all_input_nodes}
                for s in (addition.shortcut, addition.branch)
            ]
            if parts[0] != parts[1] and call.module.get_submodule(str(node.target)) in plain:
                opened.add(str(node.target))
    return frozenset(opened)


def _holding_drops(recording: Recording, call: Call, paths: Mapping[nn.Module, str]) -> set[str]:
    calls, log = recording.calls, recording.log
    opened: set[str] = set()
    for one in recording.below(call):
        rows = next((t.shape[0] for t in tensors(one.output) if t.ndim), 0)
        if not drops_rows(_ops_in_training(recording, one), rows):
            continue
        between, above = list[Call](), calls[one.parent]
        while above is not call:
            between.append(above)
            above = calls[above.parent]
        ops = [log.ops[each.first_op : each.last_op] for each in between]
        if not any(each.additions or drops_rows(o, rows) for each, o in zip(between, ops, strict=True)):
            opened.update(paths[each.module] for each in between)
    return opened


def _ops_in_training(recording: Recording, call: Call) -> Sequence[Op]:
    """The operators of a call; what only passed its input on in evaluation runs again, in training."""
    if recording.training or call.first_op != call.last_op or not isinstance(call.output, Tensor):
        return recording.log.ops[call.first_op : call.last_op]
    args, kwargs, log = recording.arguments(call)
    start = len(log.ops)
    with suppress(Exception), torch.no_grad(), generators_kept(), log.fake, log:
        call.module(*args, **kwargs)
    return log.ops[start:]


def hooked(module: nn.Module) -> bool:
    """Whether a trace through a module would pass hooks by."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _stand_ins(recording: Recording, call: Call, paths: Mapping[nn.Module, str]) -> dict[str, StandIn]:
    """For every module whose result looks like one of its arguments, each time it ran."""
    found: dict[str, StandIn | None] = {}
    for one in (each for each in recording.below(call) if each.module in paths):
        path, made = paths[one.module], _stand_in(recording, one)
        found[path] = made if found.get(path, made) == made else None
    return {path: made for path, made in found.items() if made is not None}


def _stand_in(recording: Recording, call: Call) -> StandIn | None:
    output = call.output
    if not isinstance(output, Tensor) or call.wrote:
        return None
    form = output.shape, output.dtype, output.device
    given = enumerate(tensors((call.args, call.kwargs)))
    place = next((place for place, t in given if (t.shape, t.dtype, t.device) == form), None)
    ops = tuple(recording.log.ops[call.first_op : call.last_op])
    return None if place is None else StandIn(place, ops, draws=recording.log.real)
