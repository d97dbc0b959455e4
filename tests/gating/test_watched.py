"""Gated models looked at as they evaluate: inside there are marks, notes, or no gates; afterwards nothing."""

import pytest
import torch
from blocks import Plain, Twice, X
from torch import nn

import surgeon
from surgeon._gating.block import gating_of
from surgeon._gating.gated import placed_gates
from surgeon._gating.watched import marking, ungated, watching
from surgeon._torch import TorchDispatchMode
from surgeon.errors import UnseenCallError


class Marks(TorchDispatchMode):
    """Notes the names of the marks that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.surgeon.mark.default:
            self.names.append(args[1])
        return func(*args, **(kwargs or {}))


def gated(scaling: str = "paper") -> nn.Sequential:
    model = nn.Sequential(Plain(), Twice())
    return surgeon.apply(model, scaling=scaling, drop_rate=0.5, example=X).eval()


@pytest.mark.parametrize("scaling", ["paper", "inverted"])
@torch.no_grad()
def test_marks_carry_the_names_of_their_gates_and_go(scaling: str) -> None:
    model = gated(scaling)
    classes, expected = [type(m) for m in model.modules()], model(X)
    with Marks() as marks, marking(model, placed_gates(model)[:2]):
        model(X)
    assert marks.names == ["0.add", "1.add"]
    with Marks() as marks:
        assert torch.equal(model(X), expected)
    assert marks.names == [] and classes == [type(m) for m in model.modules()]


def test_names_follow_the_blocks() -> None:
    model = nn.Sequential(*reversed(gated()))
    with Marks() as marks, marking(model, placed_gates(model)):
        model(X)
    assert sorted(marks.names) == ["0.add", "0.add_1", "1.add"]


def test_calls_are_noted_and_unknown_ones_refused() -> None:
    model = gated()
    gating = gating_of(model[0])
    assert gating is not None
    with watching(model, strict=True) as seen:
        model(X)
        with pytest.raises(UnseenCallError, match="0 has no forward for this call"):
            model[0](x=X)
    (form,) = seen[id(gating)].values()
    assert form is not None and form[0][0].shape == X.shape and len(seen) == 2
    with watching(model, strict=False) as seen:
        model[0](x=X)
    assert len(seen[id(gating)]) == 1
    model(X)
    assert "run" not in vars(gating) and len(seen[id(gating)]) == 1


@torch.no_grad()
def test_without_gates_blocks_run_their_own_forward() -> None:
    model = gated()
    expected = model(X)
    with ungated(model):
        assert [type(block) for block in model] == [Plain, Twice]
        assert torch.equal(model(X), model[1].forward(X + model[0].f(X)))
        assert not torch.equal(model(X), expected)
    assert torch.equal(model(X), expected) and len(placed_gates(model)) == 3
    with pytest.raises(ZeroDivisionError), ungated(model):
        1 / 0  # noqa: B018
    assert torch.equal(model(X), expected)
