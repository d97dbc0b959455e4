"""Which calls run the same code: alike blocks share a print; what may change the code tells them apart."""

import copy
from collections.abc import Callable, Hashable

import pytest
from blocks import Plain, X
from torch import nn

from surgeon._tracing.record import record
from surgeon._tracing.sharing import likeness


def prints(*blocks: nn.Module) -> list[Hashable]:
    """What decides whether the calls of some blocks, which run one after the other, share a trace."""
    recording = record(nn.Sequential(nn.Linear(4, 4), *blocks), (X,), {})
    calls = [call for call in recording.calls if call.module in blocks]
    return [
        likeness(
            call.module,
            call.args,
            call.kwargs,
            recording.log,
            [c for c in recording.calls if c.module is call.module.f],
        )
        for call in calls
    ]


def test_repeated_blocks_are_alike() -> None:
    first, second = prints(Plain(), Plain())
    assert first == second


def test_floats_of_their_own_do_not_tell_blocks_apart() -> None:
    blocks = [Plain(), Plain()]
    for number, block in enumerate(blocks):
        block.rate = 0.1 * number
    assert len(set(prints(*blocks))) == 1


def frozen(block: nn.Module) -> None:
    block.f[0].weight.requires_grad_(False)


def tied(block: nn.Module) -> None:
    block.again = block.f


def hooked(block: nn.Module) -> None:
    block.f.register_forward_hook(lambda *_: None)


def flagged(block: nn.Module) -> None:
    block.flag = True


def doubled(block: nn.Module) -> None:
    block.double()
    block.f.register_forward_pre_hook(lambda _, args: (args[0].double(),))


@pytest.mark.parametrize("change", [frozen, tied, hooked, flagged, doubled])
def test_what_may_change_the_code_tells_them_apart(change: Callable[[nn.Module], None]) -> None:
    other = copy.deepcopy(block := Plain())
    assert len(set(prints(block, other))) == 1
    change(other)
    first, second = prints(block, other)
    assert first != second


def test_arguments_tell_calls_apart() -> None:
    block = Plain()
    recording = record(block, (X,), {})
    call = recording.calls[0]
    ways = [((call.args[0],), {}), ((), {"x": call.args[0]}), ((call.args[0], call.args[0]), {})]
    assert len({likeness(block, args, kwargs, recording.log, ()) for args, kwargs in ways}) == 3
    assert likeness(block, *ways[0], recording.log, ()) == likeness(block, *ways[0], recording.log, ())
