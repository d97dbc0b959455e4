"""The sum of two kinds of attention scores is no residual add, though both come from one input."""

import pytest
import timm
import torch
from torch import Tensor, nn

import surgeon

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Without a shortcut around it; scores by content and, by another way, by place, as in Halo attention."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.query, self.kv, self.place = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 5)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        key, value = self.kv(x).chunk(2, -1)
        scores = query @ key.transpose(-1, -2) + self.place(query)
        if self.spelling == "masked":
            scores = (scores / 8).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e4) + torch.ones(5)
        if self.spelling == "measured":
            value = value + torch.zeros(scores.shape[0], 1, 1)
        if self.spelling == "read twice":
            return scores.softmax(-1) @ value + scores.mean()
        if self.spelling == "layered":
            return self.query(torch.nn.functional.pad(scores, (0, 3))).softmax(-1)
        return scores.softmax(-1) @ value


@pytest.mark.parametrize("spelling", ["plain", "masked", "measured"])
def test_scores(spelling: str) -> None:
    found = surgeon.find(Attention(spelling), X)
    assert not found.residuals
    assert ("add", "scores") in {(r.name, r.code) for r in found.refused}


@pytest.mark.parametrize("spelling", ["read twice", "layered"])
def test_a_sum_that_is_read_otherwise_is_none_of_them(spelling: str) -> None:
    assert "add" in {r.name for r in surgeon.find(Attention(spelling), X)}


def test_a_stream_is_none_of_them_though_a_softmax_reads_it() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.f(x)).softmax(-1)

    assert len(surgeon.find(Head(), X)) == 1


def test_a_stream_that_an_attention_alone_reads_is_none_of_them() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            self.project, self.attention = nn.Linear(8, 8), Attention("plain")

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.project(x) + self.f(x))

    assert [(r.name, r.kind) for r in surgeon.find(Stage(), X)] == [("add", "projection")]


def test_a_block_without_a_shortcut_in_the_zoo() -> None:
    """The last stage of haloregnetz_b begins with one; the attentions of the others lie inside branches."""
    found = surgeon.find(timm.create_model("haloregnetz_b"), torch.zeros(1, 3, 224, 224))
    assert [r.name for r in found.refused if r.code == "scores"] == ["stages.3.0.self_attn.add"]
    assert len(found) == 18
