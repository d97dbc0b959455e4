"""Files and folders that other libraries write, with their own savers: which weights are taken, and said so.

Where a library is not installed its layout is written by hand, after its documentation.
"""

import argparse
import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import surgeon
from surgeon.cli.main import main
from surgeon.errors import CheckpointError


def network(seed: int = 0, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("resnet18", num_classes=4, layers=[1, 1, 1, 1], channels=[8] * 4, **more)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer


def holds(model: nn.Module, other: nn.Module) -> bool:
    own, theirs = model.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)


@pytest.fixture
def raw() -> nn.Module:
    return network(1)


@pytest.fixture
def average(raw: nn.Module) -> nn.Module:
    return network(2)


def timm_file(folder: Path, raw: nn.Module, average: nn.Module | None) -> Path:
    ema = None
    if average is not None:
        ema = ModelEmaV3(raw)
        ema.module.load_state_dict(average.state_dict())
    settings = argparse.Namespace(
        model="resnet18", num_classes=4, model_kwargs={"layers": [1, 1, 1, 1], "channels": [8] * 4}, lr=0.1
    )
    saver = CheckpointSaver(raw, trained(copy.deepcopy(raw)), settings, ema, checkpoint_dir=folder)
    saver.save_checkpoint(3, 0.5)
    return folder / "last.pth.tar"


def torchvision_file(folder: Path, raw: nn.Module, average: nn.Module | None) -> Path:
    """As references/classification/train.py writes it, from a model in DistributedDataParallel."""
    optimizer = trained(copy.deepcopy(raw))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    held = {
        "model": raw.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="resnet18", data_path="/data", device="cuda", lr=0.1, weights=None),
    }
    if average is not None:
        held["model_ema"] = AveragedModel(nn.ModuleDict({"module": average})["module"]).state_dict()
    torch.save(held, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def lightning_file(folder: Path, raw: nn.Module, average: nn.Module | None) -> Path:
    """As ModelCheckpoint writes it, with WeightAveraging for an average; a loss has weights, too."""
    state = {"loss.weight": torch.ones(4), **{f"model.{key}": held for key, held in raw.state_dict().items()}}
    held = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}},
        "optimizer_states": [trained(copy.deepcopy(raw)).state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "settings": SimpleNamespace(width=8), "root": Path("data")},
    }
    if average is not None:
        held["current_model_state"] = state
        held["state_dict"] = {f"model.{key}": held for key, held in average.state_dict().items()}
        held["averaging_state"] = {"n_averaged": torch.tensor(3)}
    torch.save(held, folder / "last.ckpt")
    return folder / "last.ckpt"


def distributed_folder(folder: Path, raw: nn.Module, average: nn.Module | None) -> Path:
    import torch.distributed.checkpoint as dcp

    optimizer = trained(copy.deepcopy(raw))
    held = {"app": {"model": raw.state_dict(), "optim": optimizer.state_dict(), "epoch": 3}}
    if average is not None:
        held["app"]["ema"] = average.state_dict()
    dcp.save(held, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


WRITERS = [timm_file, torchvision_file, lightning_file, distributed_folder]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_weights_are_found_and_named(write: Any, raw: nn.Module, tmp_path: Path) -> None:
    model = network(3)
    report = surgeon.load(model, write(tmp_path, raw, None))
    assert holds(model, raw)
    named = {
        "timm_file": ("state_dict", ()),
        "torchvision_file": ("model", ()),
        "lightning_file": ("state_dict.model", ("state_dict.loss",)),
        "distributed_folder": ("app.model", ("app",)),
    }
    assert (report.entry, report.others) == named[write.__name__]
    assert f"taken from {report.entry}" in str(report)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_average_is_taken_unless_another_is_asked_for(
    write: Any, raw: nn.Module, average: nn.Module, tmp_path: Path
) -> None:
    path, model = write(tmp_path, raw, average), network(3)
    names = {
        "timm_file": ("state_dict_ema", "state_dict"),
        "torchvision_file": ("model_ema.module", "model"),
        "lightning_file": ("state_dict.model", "current_model_state.model"),
        "distributed_folder": ("app.ema", "app.model"),
    }
    ema, plain = names[write.__name__]
    report = surgeon.load(model, path)
    assert holds(model, average)
    assert report.entry == ema
    assert plain in report.others
    assert f"taken from {ema}; there is also {plain}" in str(report)
    assert surgeon.load(model, path, entry=plain).entry == plain
    assert holds(model, raw)
    asked = "ema" if "ema" in ema else "state_dict.model"
    assert surgeon.load(model, path, entry=asked).entry == ema
    assert holds(model, average)


def test_what_is_not_there_or_in_doubt_is_named(raw: nn.Module, average: nn.Module, tmp_path: Path) -> None:
    path, model = tmp_path / "m.pt", network(3)
    before = copy.deepcopy(model)
    torch.save({"student": raw.state_dict(), "teacher": average.state_dict()}, path)
    with pytest.raises(
        CheckpointError, match=r"2 entries that fit alike.*: student, teacher\. .*--entry stud"
    ):
        surgeon.load(model, path)
    with pytest.raises(CheckpointError, match=r"no entry 'ema' with weights of this model: student, teacher"):
        surgeon.load(model, path, entry="ema")
    with pytest.raises(CheckpointError, match=r"several entries 't' .*: student, teacher"):
        surgeon.load(model, path, entry="t")
    assert holds(model, before)
    surgeon.load(model, path, entry="teacher")
    assert holds(model, average)
    torch.save({"first": raw.state_dict(), "second": copy.deepcopy(raw.state_dict())}, path)
    surgeon.load(model, path)  # no doubt: the same numbers
    assert holds(model, raw)


@pytest.mark.parametrize(
    ("name", "average"),
    [
        *(("ema", True), ("model_ema", True), ("state_dict_ema", True), ("ema_model", True), ("swa", True)),
        *(("net.ema", True), ("averaged_model", True), ("weight-average", True), ("EMA", True)),
        *(("schema", False), ("semantic", False), ("cinema_net", False), ("leverage", False)),
    ],
)
def test_what_counts_as_an_average(name: str, average: bool, raw: nn.Module, tmp_path: Path) -> None:
    other, model = network(2), network(3)
    torch.save({"state_dict": raw.state_dict(), name: other.state_dict()}, tmp_path / "m.pt")
    surgeon.load(model, tmp_path / "m.pt")
    assert holds(model, other if average else raw)


def test_an_optimizer_is_no_model(tmp_path: Path) -> None:
    """Its state has the shapes of the weights, and, kept by name, their names before its own."""
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    state = {f"state.{name}.exp_avg": held + 1 for name, held in model.named_parameters()}
    torch.save({"optim": state, "weights": model.state_dict()}, tmp_path / "m.pt")
    assert surgeon.load(other, tmp_path / "m.pt").entry == "weights"
    assert holds(other, model)


def test_a_part_of_a_larger_network_fits_where_all_of_it_is_there(raw: nn.Module, tmp_path: Path) -> None:
    detector = nn.ModuleDict({"backbone": nn.ModuleDict({"body": raw}), "head": nn.Linear(3, 3)})
    torch.save({"net": detector.state_dict()}, tmp_path / "m.pt")
    model = network(3)
    report = surgeon.load(model, tmp_path / "m.pt")
    assert holds(model, raw)
    assert (report.entry, report.others) == ("net.backbone.body", ("net.head",))
    held = detector.state_dict()
    del held["backbone.body.fc.bias"]
    torch.save({"net": held}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: fc\.bias\. Nothing was loaded"):
        surgeon.load(model, tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_folders_of_accelerate(raw: nn.Module, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, _ = accelerator.prepare(raw, trained(raw))
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(model, str(tmp_path / "shards"), max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    accelerator.save_state(str(tmp_path / "pickled"), safe_serialization=False)
    for name in ("state", "shards", "pickled"):
        other = network(3)
        report = surgeon.load(other, tmp_path / name)
        assert holds(other, raw), name
        assert report.entry.startswith(("model.safetensors", "pytorch_model.bin"))
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"does not fit ResNet: \d+ missing"):
        surgeon.load(network(3), tmp_path / "shards")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sharded_state_of_accelerate(raw: nn.Module, tmp_path: Path) -> None:
    """As FSDP leaves it: a checkpoint of torch.distributed for the model, another for the optimizer."""
    import torch.distributed.checkpoint as dcp

    optimizer = trained(copy.deepcopy(raw)).state_dict()
    dcp.save({"model": raw.state_dict()}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"optimizer": optimizer}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    (tmp_path / "random_states_0.pkl").write_bytes(pickle.dumps(1))
    model = network(3)
    assert surgeon.load(model, tmp_path).entry == "pytorch_model_fsdp_0.model"
    assert holds(model, raw)
    next((tmp_path / "pytorch_model_fsdp_0").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*fsdp_0: a file of it is missing or damaged"):
        surgeon.load(model, tmp_path)


class Renamed(nn.Module):
    """A class whose weights have had other names, which it reads as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    @classmethod
    def from_pretrained(cls, folder: str, *, output_loading_info: bool) -> Any:
        from safetensors.torch import load_file

        model, held = cls(), load_file(Path(folder) / "model.safetensors")
        state = {key.replace("old.", "new."): value for key, value in held.items()}
        told = model.load_state_dict(state, strict=False)
        assert output_loading_info
        return model, {"missing_keys": told.missing_keys, "mismatched_keys": set()}


def test_a_class_reads_its_older_names(tmp_path: Path) -> None:
    trained, model = Renamed(), Renamed()
    state = {key.replace("new.", "old."): value for key, value in trained.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 missing: new\.weight, new\.bias; 2 unexpected: old\.bias"):
        surgeon.load(model, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = Renamed()
        report = surgeon.load(model, path)
        assert holds(model, trained)
        assert report.entry == "model.safetensors, renamed by Renamed.from_pretrained"
    del state["head.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit Renamed: 1 missing: head\.bias\. Nothing"):
        surgeon.load(model, tmp_path)


def test_a_vit_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    trained, model = (transformers.ViTForImageClassification(config) for _ in range(2))
    trained.save_pretrained(tmp_path)
    surgeon.apply(model, example=torch.zeros(2, 3, 32, 32))
    surgeon.load(model, tmp_path)
    assert holds(model, trained)


def test_lightnings_own_file(raw: nn.Module, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.network = network(1)

    trainer = lightning.Trainer(max_epochs=0, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Module())
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    model = network(3)
    assert surgeon.load(model, tmp_path / "last.ckpt").entry == "state_dict.network"
    assert holds(model, raw)


class Code:
    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> Any:
        return print, self.args or ("code of the checkpoint ran",)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (argparse.Namespace(call=Code()), "print"),
        (argparse.Namespace(function=getattr), "getattr"),
        (argparse.Namespace(run=__import__("os").system), "system"),
        (SimpleNamespace(x=Code(1)), "print"),
        (Renamed, "Renamed"),
    ],
)
def test_code_in_settings_is_refused_by_name(
    settings: Any, named: str, raw: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": raw.state_dict(), "args": settings}, tmp_path / "m.pth.tar")
    with pytest.raises(
        CheckpointError, match=rf"will not read .* more than tensors \([\w.]*{named}\).*safe_gl"
    ):
        surgeon.load(network(3), tmp_path / "m.pth.tar")
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_in_the_index_of_a_folder_is_refused_by_name(
    raw: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch.distributed.checkpoint as dcp

    held = {"model": raw.state_dict(), "note": Code()}
    dcp.save(held, checkpoint_id=tmp_path, no_dist=True)
    model = network(3)
    surgeon.load(model, tmp_path)  # what is no tensor is not read
    assert holds(model, raw)
    index = tmp_path / ".metadata"
    whole = index.read_bytes()
    index.write_bytes(pickle.dumps({"state_dict_metadata": Code()}))
    with pytest.raises(CheckpointError, match=r"will not read .*\.metadata: .* \(builtins\.print\)"):
        surgeon.load(model, tmp_path)
    index.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cannot read .*\.metadata: it is damaged"):
        surgeon.load(model, tmp_path)
    assert capsys.readouterr().out == ""


def test_the_real_classes_are_not_imported(raw: nn.Module, tmp_path: Path) -> None:
    """A stand-in holds what a class that is not even installed would."""
    import sys
    import types

    module = types.ModuleType("omegaconf.dictconfig")
    kind = type("DictConfig", (), {"__module__": module.__name__})
    module.DictConfig = kind  # type: ignore[attr-defined]
    parent = types.ModuleType("omegaconf")
    sys.modules |= {"omegaconf": parent, module.__name__: module}
    try:
        torch.save({"state_dict": raw.state_dict(), "hyper_parameters": kind()}, tmp_path / "m.ckpt")
    finally:
        del sys.modules["omegaconf"], sys.modules[module.__name__]
    model = network(3)
    surgeon.load(model, tmp_path / "m.ckpt")
    assert holds(model, raw)
    assert "omegaconf" not in sys.modules


def test_an_index_of_shards_that_is_none(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(CheckpointError, match=r"cannot read .*index\.json: it is no index of shards"):
        surgeon.load(nn.Linear(2, 2), tmp_path)


def test_the_command_says_what_it_took(raw: nn.Module, average: nn.Module, tmp_path: Path) -> None:
    """timm's file knows its model; of two libraries that have one of that name the user says which."""
    path, out = timm_file(tmp_path, raw, average), tmp_path / "m.safetensors"
    line = ["fold", str(path), "--drop-rate", "0.5", "-o", str(out)]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 2
    assert "says that its model is 'resnet18'; name it with --model" in done.stderr
    done = CliRunner().invoke(main, [*line, "--model", "timm:resnet18"])
    assert done.exit_code == 0, done.stderr
    assert "weights taken from state_dict_ema; there is also state_dict" in done.stderr
    surgeon.load(network(4), out)
    done = CliRunner().invoke(main, [*line, "--model", "timm:resnet18", "--entry", "x", "--overwrite"])
    assert done.exit_code == 1
    assert "no entry 'x' with weights of this model: state_dict, state_dict_ema" in done.stderr
    raw_line = [*line, "--model", "timm:resnet18", "--entry", "state_dict", "--overwrite"]
    assert CliRunner().invoke(main, raw_line).exit_code == 0
    folded = surgeon.apply(network(1), scaling="paper", unit="batch", example=torch.zeros(2, 3, 224, 224))
    folded = surgeon.fold(folded, inplace=True)
    stock = network(4)
    surgeon.load(stock, out)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(stock.eval()(x), folded.eval()(x), atol=1e-5)


def test_safetensors_under_another_ending(tmp_path: Path) -> None:
    model = network()
    path = surgeon.save_checkpoint(model, tmp_path / "weights.pt")
    other = network(seed=2)
    surgeon.load(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
