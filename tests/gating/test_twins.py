"""The two classes of a gated block: one that trains, and one that evaluates as if nothing had been done."""

import copy
import pickle

import pytest
import torch
from blocks import Plain
from torch import Tensor, nn
from torch.nn.utils import parametrize

import surgeon

X = torch.zeros(2, 4)


def gated(**options: object) -> nn.Module:
    return surgeon.apply(Plain(), "uniform", drop_rate=0.5, skip=True, example=X, **options)  # type: ignore[arg-type]


def bare(block: nn.Module) -> bool:
    """Whether a call goes straight to the block's own forward."""
    return type(block).forward is Plain.forward


def draws(block: nn.Module) -> bool:
    with torch.no_grad():
        return len({tuple(block(torch.ones(4, 4)).flatten().tolist()) for _ in range(20)}) > 1


def test_the_class_follows_training_however_it_is_set() -> None:
    block = gated()
    assert not bare(block)
    assert bare(block.eval())
    assert not bare(block.train())
    block.training = False
    assert bare(block)
    assert (type(block).__name__, isinstance(block, Plain)) == ("Plain", True)
    block.training = True
    assert not bare(block)
    assert draws(block)


def test_a_model_gated_while_it_evaluates_trains_later() -> None:
    block = surgeon.apply(Plain().eval(), "uniform", drop_rate=0.5, skip=True, example=X)
    assert bare(block)
    assert draws(block.train())


def test_an_evaluation_scale_keeps_the_gate_in_evaluation() -> None:
    block = gated(scaling="paper").eval()
    assert not bare(block)
    x = torch.ones(2, 4)
    torch.testing.assert_close(block(x), x + 0.5 * block.f(x))


@pytest.mark.parametrize("training", [True, False])
def test_copies_have_the_class_of_their_mode(training: bool) -> None:
    block = gated().train(training)
    revived = pickle.loads(pickle.dumps(block))  # noqa: S301 - what was pickled a moment ago
    for twin in (copy.deepcopy(block), copy.copy(block), revived):
        assert bare(twin) == (not training)
        assert draws(twin.train())


class Twofold(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("before", [True, False])
def test_classes_that_others_make_of_it_train_and_come_off(before: bool) -> None:
    """Parametrised while it evaluates or trains, taken off in the other mode."""
    block = gated().train(before)
    block.weight = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(block, "weight", Twofold())
    made = type(block)
    for training in (True, False, before, not before):
        block.train(training)
        assert type(block) is made
        assert draws(block) == training
    parametrize.remove_parametrizations(block, "weight")
    assert bare(block) == before
    assert draws(block.train())


def test_a_fold_finds_the_marks_of_a_block_that_evaluates() -> None:
    block = gated(scaling="paper").eval()
    x = torch.randn(2, 4)
    expected = block(x)
    folded = surgeon.fold(block, example=x)
    torch.testing.assert_close(folded(x), expected)
    assert type(folded) is Plain
