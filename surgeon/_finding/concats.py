"""Concat joins: new features that stand beside those they were computed from (Huang et al. 2017, DenseNet).

What ``torch.cat`` takes from a path that was computed from another of its paths are new features, and the
other path is their shortcut. They can be dropped: zeros of their size take their place. Whatever reads them
must read the shortcut along with them, as a layer would be given nothing but zeros otherwise.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from surgeon._finding.addition import Addition
from surgeon._finding.drops import drops
from surgeon._finding.findings import FEATURES, Code
from surgeon._finding.flow import Flow
from surgeon._finding.paths import ops_of, side, writes_to
from surgeon._tracing.nests import tensors
from surgeon._tracing.operators import is_layer
from surgeon._tracing.record import Recording

_CATS = {torch.cat, torch.concat, torch.concatenate, torch.hstack}


def concatenating(recording: Recording) -> set[int]:
    """The places of the calls whose own forward concatenates."""
    packets = {torch.ops.aten.cat}
    ops, steps = recording.log.ops, recording.log.steps
    return {step.owner for step in steps if step.op >= 0 and ops[step.op].func.overloadpacket in packets}


def concats(flow: Flow) -> list[Addition]:
    """The new features that a block concatenates, of the kind ``"concat"``, in the order they are made in.

    `Addition.node` and its branch are the new features, its shortcut the path beside which they stand.
    """
    if "concats" not in flow.shared:
        found = {new: old for cat, paths in _cats(flow) for new, old in _new(flow, cat, paths)}
        ordered = sorted(found, key=flow.position)
        flow.shared["concats"] = [
            _described(flow, FEATURES + i, new, found[new]) for i, new in enumerate(ordered)
        ]
    result: list[Addition] = flow.shared["concats"]
    return result


def _cats(flow: Flow) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """The concatenations of activations along another dimension than that of the samples, and what of."""
    for node in flow.order[:-1]:
        if node.target not in _CATS or not flow.fact(node).active:
            continue
        given: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        if isinstance(given, list | tuple) and all(isinstance(one, fx.Node) for one in given):
            paths = [one for one in given if isinstance(flow.fact(one).value, Tensor)]
            values = [flow.fact(one).value for one in paths]
            if len(paths) == len(given) > 1 and all(v.shape[:1] == values[0].shape[:1] for v in values):
                yield node, paths


def _new(flow: Flow, cat: fx.Node, paths: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each path that was computed from another, with the last of those that it was computed from."""
    if flow.fact(cat).value.shape[:1] != flow.fact(paths[0]).value.shape[:1]:
        return
    for path in paths:
        before = [other for other in paths if other is not path and flow.feeds(other, path)]
        if before and any(map(is_layer, ops_of(flow, side(flow, path, before[-1])))):
            yield path, max(before, key=flow.position)


def _described(flow: Flow, ordinal: int, new: fx.Node, old: fx.Node) -> Addition:
    region, work = _region(flow, new), side(flow, new, old)
    return Addition(
        new,
        ordinal,
        _code(flow, new, old),
        "concat",
        old,
        new,
        tuple(drops(flow, work)),
        region,
        sum(flow.fact(n).flops for n in work),
    )


def _code(flow: Flow, new: fx.Node, old: fx.Node) -> Code:
    """Whether everything that reads the new features reads their shortcut, too."""
    if writes_to(new) is not None:
        return "aliased"
    readers = [node for node in flow.order if new in flow.read_by(node)]
    together = all(old in reader.all_input_nodes for reader in readers)
    return "concat" if together and not _picked(flow, new) else "alone"


def _picked(flow: Flow, new: fx.Node) -> bool:
    """Whether something takes a part of what new features were concatenated to, by numbers of channels."""
    holding, dims = {new}, {cat: _dim(flow, cat) for cat, _ in _cats(flow)}
    holding |= {cat for cat in dims if flow.feeds(new, cat)}
    for cat in holding & dims.keys():
        whole = flow.fact(cat).value.shape
        for reader in (node for node in flow.order[:-1] if cat in flow.read_by(node)):
            fact = flow.fact(reader)
            views = bool(fact.ops) and all(op.func.is_view for op in fact.ops)
            if views and any(
                t.ndim == len(whole) and t.shape[dims[cat]] < whole[dims[cat]] for t in tensors(fact.value)
            ):
                return True
    return False


def _dim(flow: Flow, cat: fx.Node) -> int:
    given = [*cat.args[1:], *(cat.kwargs[name] for name in ("dim", "axis") if name in cat.kwargs)]
    dim = given[0] if given else int(cat.target is torch.hstack)
    return dim % flow.fact(cat).value.ndim if isinstance(dim, int) else 0


def _region(flow: Flow, end: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that run for a value alone, itself included; none if one writes to what was made outside."""
    inside = {end}
    for node in reversed(flow.order[: flow.position(end)]):
        users = flow.users(node)
        if node.op != "placeholder" and users and users <= inside:
            inside.add(node)
    made = {s for node in inside for s in flow.storages(node)}
    if any(flow.fact(node).writes - made for node in inside):
        return ()
    return tuple(node for node in flow.order if node in inside)
