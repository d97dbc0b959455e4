"""kill -9 at any moment, and on to the same bits; disks that are full, folders that two want to write."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgeon import SurgeonError, _recipes
from surgeon.errors import UsageError

SMALL = {
    "model": {"name": "timm:resnet18", "kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}},
    "data": {"kind": "fake", "samples": 32, "image_size": 32},
    "gates": {"unit": "batch", "scaling": "paper", "ramp_epochs": 3},
    "optimizer": {"lr": 0.05, "warmup_epochs": 1},
    "train": {"epochs": 5, "batch_size": 4, "ema": 0.9},
    "deliver": {"onnx": False, "plot": False, "weights": "best"},
    "log": {"every": 2},
    "device": "cpu",
    "threads": 1,
}
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def log() -> ModuleType:
    return _recipes.load("finetune_log")


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL | {"output": str(tmp_path / "run")}))
    return str(path)


def fresh(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), **more}


@pytest.mark.parametrize(
    ("kills", "processes"),
    [
        (3, 1),
        (3, 2),
        pytest.param(20, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
        pytest.param(20, 2, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_killed_at_random_points_it_goes_on_to_the_same_bits(
    small: str, tmp_path: Path, kills: int, processes: int
) -> None:
    script = [sys.executable, str(HERE / "kills.py"), small, str(tmp_path), str(kills), str(processes), "0"]
    ran = subprocess.run(script, capture_output=True, text=True, check=False, env=fresh(), timeout=3000)
    assert ran.returncode == 0, ran.stderr[-2000:] + ran.stdout[-500:]
    assert ran.stdout.count("killed ") == kills
    assert re.search(r"after epoch [1-4]", ran.stdout), "no kill came between two epochs"
    ends = sorted(tmp_path.glob("parts*"))
    for parts in ends:
        left_the_same(tmp_path / "whole", parts)


def left_the_same(whole: Path, parts: Path) -> None:
    for file in ("last.pt", "best.pt"):
        one, other = tensors(whole / file), tensors(parts / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)
    numbers = [
        [
            {key: value for key, value in json.loads(line).items() if "second" not in key}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, parts)
    ]
    assert numbers[0] == numbers[1]
    assert not list(parts.glob(".*"))  # no drafts, no lock


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, below in value.items():
                walk(f"{name}.{key}", below)

    walk("", torch.load(path, weights_only=True))
    return found


def test_ctrl_c_says_how_to_go_on(small: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "surgeon", "finetune", small, "train.epochs=5000"]
    # Where the tests run in the background, the shell has them ignore it.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=fresh())
    finally:
        signal.signal(signal.SIGINT, heard)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    told = running.communicate(timeout=120)[1]
    assert running.returncode == 130, told[-2000:]
    assert "stopped; this goes on after the last finished epoch:" in told
    assert f"finetune {small} train.epochs=5000 resume=true" in told
    assert "Traceback" not in told


def config(tmp_path: Path, *given: str) -> Any:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL | {"output": str(tmp_path / "run")}))
    return _recipes.load("finetune_config").load_config(str(path), list(given))


@pytest.mark.parametrize(
    "tail",
    [
        *(b'{"kind": "ste', b"\0\0\0\0", b'\0\0{"kind": "step", "epoch": 1, "step": 3}', b"[1, 2]", b"7"),
        *(b"null", b"{}", b'{"kind": "step", "epoch": "1"}', b'{"epoch": 1}', b'"epoch"', b"\xff\xfe\x00"),
        *(b"NaN", b'{"kind": "epoch", "epoch": 1}trailing'),
    ],
)
def test_torn_metrics_are_mended_and_named(
    log: ModuleType, tmp_path: Path, tail: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sound = [{"kind": "step", "epoch": 1, "step": 1}, {"kind": "epoch", "epoch": 1, "step": 2}]
    lines = [json.dumps(line).encode() for line in sound]
    (run / "metrics.jsonl").write_bytes(lines[0] + b"\n" + tail + b"\n" + lines[1] + b"\n" + tail)
    held = log.RunLog(config(tmp_path), 1, active=True)
    assert [json.loads(line) for line in held.path.read_text().splitlines()] == sound
    told = capsys.readouterr().err
    for number in (2, 4):
        assert f"metrics.jsonl: line {number} is damaged and left out" in told
    held.write("epoch", 2, 4, loss=1.0)
    assert [line["epoch"] for line in log.epochs_of(held.path)] == [1, 2]


def test_a_last_line_without_its_end_is_kept(log: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 1, "step": 2}')
    held = log.RunLog(config(tmp_path), 1, active=True)
    held.write("epoch", 2, 4)
    assert [line["epoch"] for line in log.epochs_of(held.path)] == [1, 2]


def state(tmp_path: Path, **more: Any) -> dict[str, Any]:
    settings = json.dumps(config(tmp_path).model_dump(mode="json"))
    names = ("epoch", "step", "best", "before", "processes", "images", "model", "optimizer")
    return {"config": settings, **dict.fromkeys(names, 1), **more}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(5000)),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + bytes(500)),
        lambda path: path.write_text("not a state"),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save(torch.zeros(2), path),
        lambda path: torch.save({"config": "not json", "epoch": 1, "model": {}}, path),
        lambda path: torch.save({**torch.load(path), "config": "not json"}, path),
        lambda path: torch.save({**torch.load(path), "config": 7}, path),
        lambda path: torch.save({**torch.load(path), "config": "[1]"}, path),
        lambda path: torch.save({**torch.load(path), "config": '{"seed": 1}'}, path),
    ],
)
def test_a_torn_state_is_named(log: ModuleType, tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    torch.save(state(tmp_path), path)
    resumed = config(tmp_path, "resume=true")
    assert log.prepare_folder(resumed)["epoch"] == 1  # the control: sound, it is taken
    spoil(path)
    with pytest.raises(
        SurgeonError, match=r"last\.pt (cannot be read: it is damaged|is no state|was left by)"
    ):
        log.prepare_folder(resumed)


def test_two_runs_do_not_write_into_one_folder(log: ModuleType, tmp_path: Path) -> None:
    here = config(tmp_path)
    with log.occupied(here, fresh=True, active=True):
        message = rf"run: another run \(process {os.getpid()}\) writes there now; .*output=PATH"
        with pytest.raises(UsageError, match=message), log.occupied(here, fresh=True, active=True):
            pass
        with log.occupied(here, fresh=True, active=False):  # further processes of this run
            pass
    with log.occupied(here, fresh=True, active=True):
        pass


def test_a_replaced_run_leaves_nothing_to_go_on_from(log: ModuleType, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "ungated").mkdir(parents=True)
    for name in ("last.pt", "best.pt", "ungated/last.pt", "notes.txt"):
        (run / name).write_text("of the run before")
    with log.occupied(config(tmp_path), fresh=True, active=True) as there:
        assert there == {run / "notes.txt", run / ".lock"}
        assert not (run / "last.pt").exists()


def test_a_folder_that_cannot_be_written_is_named(log: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output: .*/file is a file, not a folder; give output=PATH"):
        log.prepare_folder(config(tmp_path, f"output={tmp_path / 'file' / 'run'}"))
    unwritable = config(tmp_path, "output=/proc/nowhere/run")
    with pytest.raises(SurgeonError, match=r"/proc.*"), log.occupied(unwritable, fresh=True, active=True):
        pass


def test_a_read_only_folder_is_named(
    log: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UsageError, match=r"output: .* is read-only, and .*run is to be written; give"):
        log.prepare_folder(config(tmp_path))


def test_a_full_disk_keeps_the_state_before(log: ModuleType, tmp_path: Path) -> None:
    """A limit of the size of files stands in for a disk that has so much space left."""
    held = log.RunLog(config(tmp_path), None, active=True)
    held.save("last.pt", torch.nn.Linear(4, 4), epoch=1)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = rf"cannot write .*last\.pt: {os.strerror(errno.EFBIG)}\. The state before .*resume"
        with pytest.raises(SurgeonError, match=message):
            held.save("last.pt", torch.nn.Linear(400, 400), epoch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir()] in (
        ["last.pt", "metrics.jsonl"],
        ["metrics.jsonl", "last.pt"],
    )


def test_what_is_written_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _recipes.load("finetune_files")
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino) or sync(handle))
    path = files.write_text(tmp_path / "a", "text")
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    files.append_line(path, "more")
    assert synced[-1] == path.stat().st_ino
    assert path.read_text() == "textmore\n"
