"""What skipping costs against masking: measured once, given by the user, without a trace in what trains."""

import pytest
import torch
from blocks import Plain

import surgeon
from surgeon._gating import cost
from surgeon._gating.cost import Cost, measured
from surgeon.errors import UsageError


@pytest.fixture
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_known", {})
    monkeypatch.delenv("SURGEON_COST", raising=False)


@pytest.mark.usefixtures("_unknown")
def test_a_cost_is_measured_once_and_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever mode the caller is; generators stay where they were, gradients are not asked for."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = measured("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(1e-16 < one < 1 for one in (found.per_call, found.per_byte, found.per_flop))
    monkeypatch.setattr(cost, "_measure", lambda _: pytest.fail("measured twice"))
    assert measured("cpu") is found
    assert measured("meta") == cost.ACCELERATOR


@pytest.mark.usefixtures("_unknown")
def test_a_cost_that_is_given_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_COST", "cuda:1,2,3; cpu:1e-9,0,1")
    assert measured("cuda") == Cost(1, 2, 3)
    block, rows = surgeon.apply(Plain(), "uniform", drop_rate=0.5, example=torch.zeros(2, 4)), list[int]()
    block.f.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    block(torch.zeros(8, 4))
    assert rows == [4]
    monkeypatch.setattr(cost, "_known", {"cpu": Cost(1, 1, 1e-15)})
    surgeon.set_drop_rate(block, 0.5)
    block(torch.zeros(8, 4))
    assert rows == [4, 8]


@pytest.mark.parametrize("text", ["cpu:1,2", "cpu", "cpu:a,b,c"])
@pytest.mark.usefixtures("_unknown")
def test_a_cost_that_cannot_be_read_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_COST", text)
    with pytest.raises(UsageError, match=f"SURGEON_COST is '{text}'; give seconds per call"):
        measured("cpu")
