"""Gates in loops over accelerate: ramp, logs, resume, accumulation, delivery, two processes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launch import launch

import surgeon
from surgeon.errors import CheckpointError, NotGatedError, UsageError

pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState
from loop import RAMP, X, gated, network, outputs, train


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """One process is one run for accelerate, and keeps its precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_ramp_and_the_numbers_for_logs() -> None:
    _, logs = train(gated())
    assert [one["gates/drop_rate"] for one in logs] == pytest.approx([k / 16 for k in range(1, 9)])
    assert [one["gates/expected_depth"] for one in logs] == pytest.approx(
        [4 - k / 16 * 2.5 for k in range(1, 9)]  # linear: (1 + 2 + 3 + 4) / 4
    )
    assert "gates/depth" not in logs[0]  # at a rate of 0 nothing was drawn
    assert {one["gates/depth"] for one in logs[1:]} <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_accumulated_batches_are_one_step() -> None:
    gates, logs = train(gated(), steps=2, accumulate=2)
    assert gates.done == 2 and len(logs) == 4
    assert [one["gates/drop_rate"] for one in logs] == pytest.approx([0, 1 / 16, 1 / 16, 2 / 16])


def test_a_resumed_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, resumed, without = gated(), gated(), gated()
    train(whole, tmp_path)
    gates, logs = train(resumed, resume=tmp_path / "state")
    first = whole.state_dict()
    assert gates.done == 8 and len(logs) == 4
    assert all(torch.equal(first[name], value) for name, value in resumed.state_dict().items())
    train(without, resume=tmp_path / "state", ramp={"drop_rate": 0.5, "steps": 1})
    assert any(not torch.equal(first[name], value) for name, value in without.state_dict().items())


def test_a_training_with_other_scales_is_not_resumed(tmp_path: Path) -> None:
    train(gated(), tmp_path)
    with pytest.raises(CheckpointError, match=r"scale 0\.875 at layer1\.0\.add, this model has 0\.95"):
        train(gated(0.2), resume=tmp_path / "state", ramp=None)


def test_a_saved_state_brings_its_scales(tmp_path: Path) -> None:
    train(gated(), tmp_path, steps=4)
    trained, stock = gated(), network()
    trained.load_state_dict(torch.load(saved_by_torch(tmp_path), weights_only=True))
    assert surgeon.load(stock, tmp_path / "state" / "model.safetensors", example=X).found == "gated"
    torch.testing.assert_close(outputs(stock), outputs(trained), rtol=1e-4, atol=1e-5)
    (tmp_path / "state" / "config.json").unlink()
    assert surgeon.load(network(), tmp_path / "state" / "model.safetensors").found == "unknown"


def saved_by_torch(folder: Path) -> Path:
    """The same weights as a file without any note."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "state" / "model.safetensors"), folder / "same.pt")
    return folder / "same.pt"


def test_under_the_default_scaling_there_is_nothing_to_note(tmp_path: Path) -> None:
    train(gated(scaling="inverted"), tmp_path, steps=4)
    assert not (tmp_path / "state" / "config.json").exists()


def test_a_configuration_that_is_there_keeps_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "config.json").write_text('{"mine": 1}')
    train(gated(), tmp_path, steps=4)
    told = json.loads((tmp_path / "state" / "config.json").read_text())
    assert told["mine"] == 1 and told["surgeon_scales"]["layer4.0.add"] == 0.5


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_delivered_is_stock_and_evaluates_as_the_gated_model(precision: str, tmp_path: Path) -> None:
    model = gated()
    train(model, steps=2, precision=precision, deliver=tmp_path / "plain", onnx=precision == "no")
    plain = network()
    assert surgeon.load(plain, tmp_path / "plain" / "model.safetensors").found == "stock"
    near = 1e-5 if precision == "no" else 0.02
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=near, atol=near)
    unfolded = network()
    unfolded.load_state_dict(model.state_dict())
    assert not torch.allclose(outputs(unfolded), outputs(model), atol=0.02)
    if precision == "no":
        assert surgeon.verify(plain, tmp_path / "plain" / "model.onnx", example=X).ok


def test_two_processes(tmp_path: Path) -> None:
    """DDP: the same weights on both, resumed to the same bits; one of them delivers."""
    launch(
        """
        import torch, torch.distributed as dist
        from pathlib import Path
        from loop import *

        model, again = gated(), gated()
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        gates, _ = train(model, Path("."), deliver="plain")
        assert dist.get_world_size() == 2
        assert (gates.plain is not None) == (dist.get_rank() == 0)
        train(again, resume=Path("state"))
        for value, other in zip(model.parameters(), again.parameters()):
            every = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(every, value.detach())
            assert torch.equal(*every) and torch.equal(value, other)
        dist.barrier()
        import os; os._exit(0)
        """,
        tmp_path,
    )
    stock = network()
    surgeon.load(stock, tmp_path / "plain" / "model.safetensors")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(NotGatedError, match=r"ResNet has no gates; call surgeon\.apply"):
        train(network())
    with pytest.raises(UsageError, match=r"how many steps .* is not known; .* ramp=\{'steps': \.\.\.\}"):
        train(gated(), ramp={"drop_rate": 0.5})
    with pytest.raises(UsageError, match=r"onnx=True needs a folder for the file: deliver="):
        train(gated(), onnx=True)
    assert RAMP["steps"] == 8
