"""What a probe says of activations and gradients, against the same by hand; the model computes as before."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from blocks import Plain, Twice, randomise
from torch import Tensor, nn
from torch.nn import functional

import surgeon
from surgeon.errors import NotGatedError, UsageError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
WAYS = [{"unit": "batch"}, {"skip": True}, {"skip": False}]


def gated(rate: float = 0.0, **options) -> nn.Module:
    model = randomise(nn.Sequential(Plain(), Twice(), Plain()))
    return surgeon.apply(model, drop_rate=rate, example=X, **options)


def rms(tensor: Tensor) -> float:
    return tensor.detach().square().mean().sqrt().item()


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_sides_and_gradients_are_those_by_hand(options) -> None:
    model = gated(**options)
    probe = surgeon.Probe(model.train())
    functional.cross_entropy(model(X), Y).backward()
    probe.step()
    found = probe.take()
    assert [one.name for one in found] == ["0.add", "1.add", "1.add_1", "2.add"] and len(found) == 4
    first, second, third, last = found
    x = X
    for one, side in ((first, model[0].f), (second, model[1].f), (third, model[1].g), (last, model[2].f)):
        assert one.shortcut == pytest.approx(rms(x), rel=1e-5)
        assert one.branch == pytest.approx(rms(side(x)), rel=1e-5)
        assert one.ratio == pytest.approx(rms(side(x)) / rms(x), rel=1e-5)
        x = x + side(x)
    grads = [p.grad for p in model[2].parameters() if p.ndim > 1]
    by_hand = sum(g.abs().sum() for g in grads) / sum(g.numel() for g in grads)
    assert last.gradient == pytest.approx(by_hand.item(), rel=1e-5)
    assert second.gradient == third.gradient != first.gradient
    assert "ratio" in str(found) and found.to_dict()["gates"][0]["name"] == "0.add"


def test_rows_that_run_are_seen_and_those_that_do_not_are_not() -> None:
    """Of rows 1 to 6, all alike but for their size, the mean square tells which ones were looked at."""
    torch.manual_seed(0)
    model = gated(0.5, skip=True, schedule="uniform").train()
    probe, sizes = surgeon.Probe(model), torch.arange(1.0, 7.0)[:, None].expand(6, 4)
    seen = []
    model[0].f.register_forward_pre_hook(lambda _, given: seen.append(rms(given[0])))
    for _ in range(10):
        model(sizes)
    assert probe.take().gates[0].shortcut == pytest.approx(sum(seen) / len(seen), rel=1e-5)
    assert len({round(one, 3) for one in seen}) > 1


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_model_computes_as_before(options) -> None:
    outputs = []
    for watched in (False, True):
        model = gated(0.5, **options).train()
        if watched:
            surgeon.Probe(model)
        torch.manual_seed(1)
        out = model(X)
        out.sum().backward()
        outputs.append((out, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(outputs[0]) == len(outputs[1]) and all(map(torch.equal, *outputs))


def test_what_never_ran_says_nothing() -> None:
    probe = surgeon.Probe(gated())
    assert [(one.shortcut, one.ratio, one.gradient) for one in probe.take()] == [(None, None, None)] * 4


def test_copies_of_a_watched_model_and_its_end() -> None:
    model = gated().train()
    probe = surgeon.Probe(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - own bytes
        copied(X)
    assert probe.take().gates[0].shortcut is None
    probe.close()
    model(X)
    assert probe.take().gates[0].shortcut is None


def test_the_plot_and_what_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = gated().train()
    probe = surgeon.Probe(model)
    with pytest.raises(UsageError, match="nothing to draw yet; call take"):
        probe.plot(tmp_path / "p.png")
    for _ in range(3):
        functional.cross_entropy(model(X), Y).backward()
        probe.step()
        probe.take()
    assert probe.plot(tmp_path / "p.png").stat().st_size > 10_000
    with pytest.raises(NotGatedError, match=r"surgeon.apply\(model, drop_rate=0\)"):
        surgeon.Probe(nn.Linear(2, 2))
