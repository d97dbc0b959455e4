"""What an analysis changes for a while, and puts back."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import surgeon
from surgeon._tracing.undisturbed import collected_later, replaced


class Base:
    name = "inherited"


class Heir(Base):
    own = "own"


def test_attributes_are_put_back_where_they_were() -> None:
    place = SimpleNamespace(a=1)

    def run() -> None:
        with replaced((Heir, "name", "other"), (Heir, "own", 2), (place, "a", 3)):
            assert (Heir.name, Heir.own, place.a) == ("other", 2, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert (Heir.name, Heir.own, place.a) == ("inherited", "own", 1)
    assert "name" not in vars(Heir)


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_runs_again_only_where_it_did(running: bool) -> None:
    seen: list[bool] = []

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(gc.isenabled())
            return x + x.relu()

    (gc.enable if running else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), collected_later():
            raise ZeroDivisionError
        assert gc.isenabled() is running
        surgeon.find(Looks(), torch.zeros(2, 2))
        assert gc.isenabled() is running
    finally:
        gc.enable()
    assert not any(seen)


@pytest.mark.parametrize("on", [True, False])
def test_gradients_are_on_afterwards_where_they_were(on: bool) -> None:
    class TurnsOff(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.set_grad_enabled(not on)
            return x + x.relu()

    with torch.set_grad_enabled(on):
        surgeon.find(nn.Sequential(TurnsOff(), nn.Linear(2, 2)), torch.zeros(2, 2))
        assert torch.is_grad_enabled() is on
