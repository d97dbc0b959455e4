"""Random draws in evaluation are noticed and named, and what only training draws is not taken for one."""

import pytest
import torch
from click.testing import CliRunner
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from surgeon._audit import audit
from surgeon.cli.main import main

EXAMPLE = torch.zeros(2, 4)


class Forgetful(nn.Module):
    """Drops values in evaluation too: ``training`` is not handed on."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(size, size), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.dropout(self.layer(x), 0.1))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_draws_in_evaluation_are_named() -> None:
    report = audit(Net(nn.Linear(4, 4), Forgetful(), Forgetful()), EXAMPLE)
    assert report.random == ("blocks.1", "blocks.2")
    assert not report.ok
    assert "also in evaluation: blocks.1, blocks.2" in str(report)


def test_the_generators_of_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded = list[int]()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    assert [site.rate for site in audit(Net(DropPath(0.25)), EXAMPLE)] == [0.25]
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_that_knows_its_mode_is_none() -> None:
    report = audit(Net(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))), EXAMPLE)
    assert report.random == () and report.ok


def restless() -> nn.Module:
    """An image model for the command line."""
    return Net(Forgetful(224))


def test_the_command_fails_on_it() -> None:
    done = CliRunner().invoke(main, ["audit", f"{__name__}:restless"])
    assert done.exit_code == 1
    assert "draws random numbers also in evaluation: blocks.0" in done.stdout
