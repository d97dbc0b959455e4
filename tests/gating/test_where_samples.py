"""Where the samples of a batch lie, if sizes do not tell: twice as many samples do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon._gating.gated import gates_of


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Inside(nn.Module):
    """Given its batch first, it works with its sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.layers = nn.MultiheadAttention(4, 2), layers()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = x + self.layers(x)
        return x.transpose(0, 1)


@pytest.mark.parametrize("sizes", [(2, 15), (2, 16), (4, 16), (3, 9), (4, 4), (2, 4), (1, 6)])
def test_a_model_that_turns_its_batch_drops_samples(sizes: tuple[int, int]) -> None:
    batch, steps = sizes
    model = surgeon.apply(Inside(), "uniform", drop_rate=0.4, example=torch.zeros(batch, steps, 4))
    assert [gate.branch.dim for gate in gates_of(model)] == [1, 1]
    x = torch.randn(5, steps, 4)
    model.attend.out_proj.weight.data.zero_()
    changed = [((model(x) - x).abs().sum(-1) > 0) for _ in range(8)]
    assert all(bool((one == one[:, :1]).all()) for one in changed)
    assert len({tuple(one[:, 0].tolist()) for one in changed}) > 1


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        return x + mask.mean() * self.layers(x)


def test_a_mask_over_positions_is_no_batch() -> None:
    model = surgeon.apply(Masked(), skip=True, example=(torch.ones(5, 5), torch.zeros(4, 5, 4)))
    (gate,) = gates_of(model)
    assert (gate.branch.dim, gate.branch.skips, gate.branch.note) == (0, True, "")


class Windows(nn.Module):
    """Parts of each sample along the first dimension; as many entries in each as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, 2, 4)
        return (y + self.layers(y)).view(x.shape)


def test_parts_of_samples_are_told_from_samples_that_were_turned() -> None:
    model = surgeon.apply(Windows(), skip=True, example=torch.zeros(2, 6, 4))
    (gate,) = gates_of(model)
    assert gate.branch.dim == 0
    assert "its result has the shape [6, 2, 4], the batch 2 entries" in gate.branch.note


class Fixed(Inside):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 2:
            raise ValueError("two samples, please")
        return super().forward(x)


@pytest.mark.parametrize("skip", [False, True])
def test_where_no_other_batch_runs_the_status_says_what_is_assumed(skip: bool) -> None:
    model = surgeon.apply(Fixed(), skip=skip, example=torch.zeros(2, 16, 4))
    said = "its samples are taken to lie along the first dimension of [16, 2, 4]"
    for gate in surgeon.status(model).gates:
        assert gate.note.endswith(said)
        assert gate.note.startswith("computed also when dropped") == skip


class Recurrent(nn.Module):
    def __init__(self, kind: Any, *, batch_first: bool) -> None:
        super().__init__()
        self.layer = kind(4, 4, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)
        return x + y


@pytest.mark.parametrize("skip", [True, "auto"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrence_tells_its_layout(kind: Any, skip: Any) -> None:
    turned = surgeon.apply(Recurrent(kind, batch_first=False), skip=skip, example=torch.zeros(7, 3, 4))
    assert [gate.branch.dim for gate in gates_of(turned)] == [1]
    assert "its samples lie along dimension 1 of [7, 3, 4]" in surgeon.status(turned).gates[0].note
    model = surgeon.apply(Recurrent(kind, batch_first=True), skip=skip, example=torch.zeros(3, 7, 4))
    assert [(gate.branch.dim, gate.branch.note) for gate in gates_of(model)] == [(0, "")]
    assert surgeon.status(model).gates[0].skips or skip == "auto"
