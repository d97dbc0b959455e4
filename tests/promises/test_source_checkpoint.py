"""Checkpoints: read whatever they are nested in, refused before anything changes, written in one step."""

import math
import os
import pickle

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import surgeon
from surgeon import _checkpoint
from surgeon._checkpoint import load_checkpoint, save_checkpoint
from surgeon._container import read_metadata, read_stores
from surgeon.errors import CheckpointError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.bn(self.conv(x).relu())


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.module = Block()  # a child of a name that wrappers use
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.module(self.stem(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def trained():
    torch.manual_seed(1)
    return Net()


def test_round_trip_with_metadata(trained, tmp_path):
    path = save_checkpoint(
        trained, tmp_path / "m.safetensors", {"model": "x:y", "drop_rate": 0.5, "mean": [1, 2], "no": None}
    )
    assert same(safetensors.torch.load_file(path), trained.state_dict())
    metadata = read_metadata(path)
    assert metadata["model"] == "x:y"
    assert metadata["drop_rate"] == "0.5"
    assert metadata["mean"] == "[1, 2]"
    assert metadata["surgeon"] == surgeon.__version__
    assert "no" not in metadata
    model = Net()
    assert load_checkpoint(model, path).metadata == metadata
    assert same(model.state_dict(), trained.state_dict())


def test_tied_weights_keep_every_key(tmp_path):
    tied = Tied()
    (store,) = read_stores(save_checkpoint(tied, tmp_path / "m.safetensors"))
    assert same(store.tensors, tied.state_dict())


def test_gated_weights_say_so(trained, tmp_path):
    plain = save_checkpoint(trained, tmp_path / "plain.safetensors")
    surgeon.apply(trained, example=torch.zeros(2, 3, 8, 8))
    gated = save_checkpoint(trained, tmp_path / "gated.safetensors")
    assert read_metadata(plain)["weights"] == "plain"
    assert read_metadata(gated)["weights"] == "gated"
    assert read_stores(plain)[0].tensors.keys() == read_stores(gated)[0].tensors.keys()


def test_write_replaces_in_one_step(trained, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_checkpoint(Net(), path, {"epoch": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint, "settle", full)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint.*No space left"):
        save_checkpoint(trained, path, {"epoch": 2})
    assert read_metadata(path)["epoch"] == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_safetensors_is_one_of_writing(trained, tmp_path, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint.*No space left"):
        save_checkpoint(trained, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_umask_decides_who_may_read(trained, tmp_path):
    before = os.umask(0o027)
    try:
        path = save_checkpoint(trained, tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


class Remembering(nn.Linear):
    """A module whose state holds more than tensors."""

    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def test_a_state_of_more_than_tensors_is_named(tmp_path):
    model = nn.Sequential(Remembering(2, 2))
    with pytest.raises(CheckpointError, match=r"tensors only.*Sequential.*: 0\._extra_state\. torch\.save"):
        save_checkpoint(model, tmp_path / "m.safetensors")
    plain = save_checkpoint(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: 0\._extra_state"):
        load_checkpoint(model, plain)


def test_unwritable_directory(trained, tmp_path):
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save_checkpoint(trained, tmp_path / "none" / "m.safetensors")


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_torch_files_are_unwrapped(trained, tmp_path, nest, prefix):
    state = {prefix + key: value for key, value in trained.state_dict().items()}
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / "m.pt")
    model = Net()
    assert load_checkpoint(model, tmp_path / "m.pt").metadata == {}
    assert same(model.state_dict(), trained.state_dict())


def test_averaged_weights_win(trained, tmp_path):
    torch.save({"state_dict": Net().state_dict(), "state_dict_ema": trained.state_dict()}, tmp_path / "m.pt")
    model = Net()
    load_checkpoint(model, tmp_path / "m.pt")
    assert same(model.state_dict(), trained.state_dict())


def test_old_files_without_batch_counters(trained, tmp_path):
    state = {key: value for key, value in trained.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "m.pt")
    model = Net()
    load_checkpoint(model, tmp_path / "m.pt")
    assert torch.equal(model.stem.weight, trained.stem.weight)


class Versioned(nn.Linear):
    """A module whose weights once meant something else."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self.found = local_metadata["version"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("load", [load_checkpoint, surgeon.load])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_modules_are_told_their_version(tmp_path, load, prefix):
    trained, model = nn.Sequential(Versioned(2, 2)), nn.Sequential(Versioned(2, 2))
    of_file = torch.nn.ModuleDict({"module": trained}) if prefix == "module." else trained
    state = of_file.state_dict()
    if prefix == "module._orig_mod.":
        state = {prefix + key: value for key, value in state.items()}  # and no versions
    else:
        state._metadata[f"{prefix}0"]["version"] = 1
    torch.save(state, tmp_path / "m.pt")
    load(model, tmp_path / "m.pt")
    assert model[0].found == (2 if prefix == "module._orig_mod." else 1)
    load(model, save_checkpoint(trained, tmp_path / "m.safetensors"))
    assert model[0].found == 2
    assert same(model.state_dict(), trained.state_dict())


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def with_value(key, value):
    return lambda state: {**state, key: value}


def poisoned(state):
    broken = state["stem.weight"].clone()
    broken.view(-1)[:2] = torch.tensor([math.nan, math.inf])
    return {**state, "stem.weight": broken}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("fc.bias"), "does not fit Net: 1 missing: fc.bias. Nothing was loaded"),
        (with_value("head.bias", torch.zeros(3)), "does not fit Net: 1 unexpected: head.bias. Nothing"),
        (
            lambda s: {**s, "fc.weight": torch.zeros(7, 4), "fc.bias": torch.zeros(7)},
            r"2 of another shape: fc.weight is 7x4, the model's is 3x4, .* Make the model with num_classes=7",
        ),
        (
            lambda s: {f"net_{k}": v for k, v in s.items()},
            "missing: .* and 5 more; 10 unexpected.*another arch",
        ),
        (poisoned, r"values that are not finite: stem.weight \(2 of 108\). Nothing was loaded"),
        (lambda s: {**s, "epoch": 3}, "not all of it are tensors: epoch"),
        (lambda s: [1, 2], "it holds no tensors by name"),
        (lambda s: {"epoch": 3}, "it holds no tensors by name"),
    ],
)
def test_what_does_not_fit_changes_nothing(trained, tmp_path, change, message):
    torch.save(change(trained.state_dict()), tmp_path / "m.pt")
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path / "m.pt")
    assert same(model.state_dict(), before)


def test_the_other_architecture_is_named(trained, tmp_path):
    path = save_checkpoint(nn.Linear(2, 2), tmp_path / "m.safetensors", {"model": "timm:other"})
    with pytest.raises(CheckpointError, match="It holds the model timm:other"):
        load_checkpoint(trained, path)


class Code:
    def __reduce__(self):
        return print, ("code of the checkpoint ran",)


def test_code_is_never_run(trained, tmp_path, capsys):
    torch.save({"state_dict": trained.state_dict(), "extra": Code()}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"a": Code()}))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=r"will not read .* it holds more than tensors"):
            load_checkpoint(Net(), tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:5], "cannot read the checkpoint"),
        (b"this is no checkpoint, it is a text".__add__, "cannot read the checkpoint"),
    ],
)
def test_spoiled_files(trained, tmp_path, name, spoil, message):
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(trained.state_dict(), path)
    else:
        save_checkpoint(trained, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Net(), path)


@pytest.mark.timeout(20)
def test_a_file_without_tensors(trained, tmp_path):
    safetensors.torch.save_file({}, tmp_path / "m.safetensors", {"model": "timm:resnet18"})
    torch.save({"n_averaged": torch.tensor(3)}, tmp_path / "m.pt")
    for load in (load_checkpoint, surgeon.load):
        with pytest.raises(CheckpointError, match="it holds no tensors"):
            load(trained, tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError, match="1 unexpected: n_averaged"):
            load(trained, tmp_path / "m.pt")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(CheckpointError, match="it does not exist"):
        read_metadata(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"there are no weights in it, neither .*\.safetensors.*nor"):
        read_stores(tmp_path)
