"""Where the samples lie: sequence-first models are dropped sample by sample, not position by position."""

from typing import Any

import pytest
import torch
from blocks import Branch, Plain, coins, randomise, same
from scipy.stats import binomtest
from torch import Tensor, nn

import surgeon
from surgeon._gating.gate import Gate
from surgeon._gating.gated import gates_of
from surgeon._gating.samples import Samples, dimensions

ALARM = 1e-7


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attend(y, y, y, need_weights=False)[0]


class Encoder(nn.Module):
    """Attention and a layer per token, twice."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(block for _ in range(2) for block in (Attention(batch_first=batch_first), Plain()))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


FORMS = [True, "auto", False]


@pytest.mark.parametrize("skip", FORMS)
def test_a_sequence_first_model_drops_samples_and_says_so(skip: Any) -> None:
    """Every column of the batch is kept or dropped as one, by each gate; binomial at 1e-7."""
    model = surgeon.apply(
        randomise(Encoder(batch_first=False)),
        "uniform",
        drop_rate=0.4,
        skip=skip,
        example=torch.zeros(7, 3, 4),
    )
    status = surgeon.status(model)
    assert [g.branch.dim for g in gates_of(model)] == [1] * 4
    assert not any(g.skips for g in status.gates)
    assert all("its samples lie along dimension 1 of [7, 3, 4]" in g.note for g in status.gates)
    block, x = model.blocks[1], torch.randn(5, 3000, 4)
    kept = (block(x) - x).abs().sum(-1) > 0
    assert bool((kept == kept[:1]).all())
    assert binomtest(int(kept[0].sum()), 3000, 0.6).pvalue > ALARM


@pytest.mark.parametrize("skip", FORMS)
def test_a_sequence_first_model_trains_as_its_batch_first_twin(skip: Any) -> None:
    """Under the same fate of each sample at each gate."""
    x, sides = torch.randn(3, 7, 4), []
    fates = torch.rand(4, 3).gt(0.4) / 0.6
    for batch_first in (True, False):
        model = randomise(Encoder(batch_first=batch_first))
        example = torch.zeros(3, 7, 4) if batch_first else torch.zeros(7, 3, 4)
        surgeon.apply(model, "uniform", drop_rate=0.4, skip=False if batch_first else skip, example=example)

        gates = gates_of(model)

        def mask(gate: Gate, branch: Tensor, gates: list[Gate] = gates) -> Tensor:
            shape = [3 if d == gate.branch.dim else 1 for d in range(3)]
            return fates[gates.index(gate)].view(shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gate, "mask", mask)
            out = model(x) if batch_first else model(x.transpose(0, 1)).transpose(0, 1)
        sides.append(out)
    torch.testing.assert_close(*sides)
    assert not same(sides[0], model.eval()(x.transpose(0, 1)).transpose(0, 1))


def test_a_batch_first_model_is_left_alone() -> None:
    model = surgeon.apply(randomise(Encoder(batch_first=True)), skip=True, example=torch.zeros(3, 7, 4))
    assert [g.branch.dim for g in gates_of(model)] == [0] * 4
    assert all(g.skips and not g.note for g in surgeon.status(model).gates)


def test_torchs_own_encoder_layer_in_its_default_layout() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    surgeon.apply(layer, "uniform", drop_rate=0.5, example=torch.zeros(7, 3, 4))
    assert [g.branch.dim for g in gates_of(layer)] == [1, 1]
    with coins(True):
        layer(torch.randn(7, 3, 4))


class MeanOfAll(Branch):
    """Mixes the samples on purpose, and keeps the tokens apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x - x.mean(0, keepdim=True))


def test_one_branch_that_mixes_samples_turns_no_model_that_mixes_tokens_elsewhere() -> None:
    model = nn.Sequential(Attention(batch_first=True), MeanOfAll())
    surgeon.apply(model, skip=True, example=torch.zeros(3, 7, 4))
    first, second = gates_of(model)
    assert [(g.branch.dim, g.branch.skips) for g in (first, second)] == [(0, True), (0, False)]


def test_dimensions() -> None:
    def dimensions_of(found: list[Samples], batch: int, along: int | None = None) -> list[int]:
        return dimensions(found, batch, [along] * len(found))

    def sums(*given: tuple[tuple[int, ...], bool, bool]) -> list[Samples]:
        return [Samples(shape, mixes, lambda _, apart=apart: apart) for shape, mixes, apart in given]

    tokens = (7, 3, 4)
    assert dimensions_of(sums((tokens, True, True), (tokens, False, True), ((7, 4), False, True)), 7) == [
        1,
        1,
        0,
    ]
    assert dimensions_of(sums((tokens, True, True), (tokens, False, False)), 7) == [0, 0]
    assert dimensions_of(sums((tokens, True, False)), 7) == [0]  # mixes both: nothing is known
    assert dimensions_of(sums(((7, 3, 4), False, False), ((3, 7, 4), False, False)), 3) == [1, 0]
    assert dimensions_of(sums(((6, 3, 4), False, True), ((5, 3, 3), False, True), ((), False, True)), 3) == [
        0,
        0,
        0,
    ]
    assert dimensions_of(sums(((16, 2, 4), False, True)), 2) == [0]
    assert dimensions_of(sums(((16, 2, 4), False, True)), 2, along=1) == [1]
