"""Gates in Lightning's Trainer: ramp, logs, resume, averaged weights, delivery, two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from torch import Tensor, nn

import surgeon
from surgeon.errors import CheckpointError, NotGatedError, UsageError

pytest.importorskip("lightning")
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lit import Module, X, data, network, trainer

from surgeon.integrations.lightning import GateCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
RAMP = {"drop_rate": 0.5}


def trained(
    module: Module, folder: Path, *callbacks: Any, resume: Path | None = None, **how: Any
) -> GateCallback:
    gates = GateCallback(**({"ramp": RAMP} | how))
    trainer(folder, [gates, *callbacks, ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)]).fit(
        module, data(), ckpt_path=resume
    )
    return gates


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(X)
    return result


def test_the_ramp_covers_the_training_and_is_in_the_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, [GateCallback(ramp=RAMP)], logger=logger).fit(Module(), data())
    head, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().split()
    logged = [dict(zip(head.split(","), row.split(","), strict=True)) for row in rows]
    assert [float(one["gates/drop_rate"]) for one in logged] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert [float(one["gates/expected_depth"]) for one in logged] == pytest.approx(
        [4 - rate * 2.5 for rate in (0.125, 0.25, 0.375, 0.5)]  # linear: (1 + 2 + 3 + 4) / 4
    )
    assert all(0 <= float(one["gates/depth"]) <= 4 for one in logged)


def test_a_resumed_training_goes_on_where_the_ramp_was(tmp_path: Path) -> None:
    rates: list[float] = []
    module = Module()
    module.seen = rates
    trained(module, tmp_path)
    assert len(rates) == 8 and rates == sorted(rates)
    again = Module()
    again.seen = []
    trained(again, tmp_path, resume=tmp_path / "epoch=0-step=4.ckpt")
    assert again.seen == rates[4:]


def test_a_training_with_other_scales_is_not_resumed(tmp_path: Path) -> None:
    trained(Module(), tmp_path, WeightAveraging())
    with pytest.raises(CheckpointError, match=r"scale 0\.875 at network\.layer1.*, this model has 0\.95"):
        trained(Module(0.2), tmp_path, resume=tmp_path / "epoch=0-step=4.ckpt", ramp=None)


@pytest.mark.parametrize("average", [None, WeightAveraging, "swa"])
def test_what_is_delivered_is_stock_and_evaluates_as_the_gated_network(average: Any, tmp_path: Path) -> None:
    module = Module()
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    gates = trained(
        module,
        tmp_path,
        *([] if average is None else [swa if average == "swa" else average()]),
        deliver=tmp_path / "plain",
        onnx=average is None,
    )
    plain = network()
    assert surgeon.load(plain, tmp_path / "plain" / "model.safetensors").found == "stock"
    torch.testing.assert_close(outputs(plain), outputs(module.network), rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs(gates.training.plain), outputs(plain))
    if average is None:
        assert surgeon.verify(plain, tmp_path / "plain" / "model.onnx", example=X).ok


@pytest.mark.parametrize("average", [[], [WeightAveraging]])
def test_a_checkpoint_brings_its_scales(average: list[Any], tmp_path: Path) -> None:
    """Averaged weights are written without the note that PyTorch keeps; they still have one."""
    module = Module()
    trained(module, tmp_path, *(make() for make in average))
    saved = torch.load(tmp_path / "epoch=1-step=8.ckpt", weights_only=False)
    clean = {"state_dict": saved["state_dict"], "surgeon_scales": saved["surgeon_scales"]}
    torch.save(clean, tmp_path / "clean.ckpt")
    stock = network()
    report = surgeon.load(stock, tmp_path / "clean.ckpt", example=X)
    assert report.found == "gated"
    torch.testing.assert_close(outputs(stock), outputs(module.network), rtol=1e-4, atol=1e-5)


def test_two_processes(tmp_path: Path) -> None:
    launch(
        """
        import torch, torch.distributed as dist
        from pathlib import Path
        from lit import *
        from surgeon.integrations.lightning import GateCallback

        module = Module()
        gates = GateCallback(ramp={"drop_rate": 0.5}, deliver="plain")
        trainer(Path("."), [gates], strategy="ddp", devices=2).fit(module, data())
        assert dist.get_world_size() == 2 and gates.training.ramp.rate == 0.5
        for value in module.parameters():
            every = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(every, value.detach())
            assert torch.equal(*every)
        assert (gates.training.plain is not None) == (dist.get_rank() == 0)
        dist.barrier()
        import os; os._exit(0)
        """,
        tmp_path,
    )
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_bad_input(tmp_path: Path) -> None:
    bare = Module()
    surgeon.remove(bare.network)
    with pytest.raises(NotGatedError, match=r"Module has no gates; call surgeon\.apply\(network"):
        trained(bare, tmp_path)
    endless = trainer(tmp_path, [GateCallback(ramp=RAMP)], max_epochs=-1)
    with pytest.raises(UsageError, match=r"give the ramp its length: ramp=\{'steps': \.\.\.\}"):
        endless.fit(Module(), data())
