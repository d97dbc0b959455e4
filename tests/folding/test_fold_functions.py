"""Functions that were put on a model and call it: in a folded copy they call the copy."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Plain, X
from torch import nn

import surgeon
from surgeon._copy import copied


def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return 2 * forward(*args, **kwargs)

    return run


class Keeper:
    """An object that is no module, with a function that closes over one."""

    def __init__(self, model: nn.Module) -> None:
        forward = model.forward
        self.run = lambda x: forward(x) * 2


def closure(model: Any) -> None:
    model.forward = doubled(model.forward)


def nested(model: Any) -> None:
    model.forward = doubled(doubled(model.forward))


def default(model: Any) -> None:
    model.forward = lambda x, forward=model.forward: forward(x) * 2


def compiled(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def block(model: Any) -> None:
    model[1].forward = doubled(model[1].forward)


def child(model: Any) -> None:
    model[1].f.forward = doubled(model[1].f.forward)


def held(model: Any) -> None:
    keeper = Keeper(model[1].f)
    model[1].f.keeper = keeper
    model[1].f.forward = functools.partial(lambda f, x: f.keeper.run(x), model[1].f)


@pytest.mark.parametrize("put", [closure, nested, default, compiled, block, child, held])
def test_a_folded_copy_calls_itself(put: Callable[[Any], None]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Plain(), Plain())
    surgeon.apply(model, scaling="paper", example=X)
    put(model.eval())
    gated = model(X).detach()
    plain = surgeon.fold(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(plain(X), gated)
    assert not torch.allclose(model(X), gated)


def test_other_functions_are_the_same() -> None:
    model: Any = nn.Sequential(Plain())
    model.close = torch.allclose
    model.told = lambda: 3
    model.late = later(model)
    twin = copied(model)
    assert twin.told is model.told and twin.close is model.close
    assert twin.late() is twin and model.late() is model


def later(model: nn.Module) -> Callable[[], Any]:
    """A function that calls itself, and whose variable is filled after it was made."""

    def run(*, again: bool = True) -> Any:
        return run(again=False) if again else model

    return run
