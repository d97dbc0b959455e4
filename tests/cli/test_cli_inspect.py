"""What ``surgeon inspect`` shows: the very text, and the same as data."""

import json
import warnings

import pytest
from click.testing import CliRunner

from surgeon.cli.main import main

_TABLE = """\
timm:resnet10t: 4 residual adds
gate          block       kind        shortcut      p_l  FLOPs  dropped
layer1.0.add  BasicBlock  identity    identity    0.875  20.4%  skipped
layer2.0.add  BasicBlock  projection  downsample  0.750  15.3%  skipped
layer3.0.add  BasicBlock  projection  downsample  0.625  15.3%  skipped
layer4.0.add  BasicBlock  projection  downsample  0.500  18.2%  skipped

schedule           linear, last drop rate 0.5, unit sample, scaling inverted
expected depth     2.75 of 4 branches, 69%
expected training  78.8% of the plain network's FLOPs
"""


def surge(*arguments, env=None):
    return CliRunner(env=env).invoke(main, [str(argument) for argument in arguments])


def test_the_very_text(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    done = surge("inspect", "timm:resnet10t")
    assert done.stderr == ""
    assert done.stdout == _TABLE


def test_colours_are_for_terminals_only():
    for env in ({"NO_COLOR": "1"}, {"TERM": "xterm-256color"}):
        assert "\x1b" not in surge("inspect", "timm:resnet10t", env=env).stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_narrow_terminals_lose_nothing(columns):
    small = ("--model-arg", "depths=[1,1,1,1]", "--model-arg", "dims=[8,8,8,8]")
    done = surge("inspect", "timm:convnextv2_atto", "--img-size", 64, *small, env={"COLUMNS": str(columns)})
    assert done.exit_code == 0, done.stderr
    assert all(len(line) <= columns for line in done.stdout.splitlines())
    for name in ("stages.0.blocks.0.add", "stages.3.blocks.0.add", "ConvNeXtBlock", "left alone:"):
        assert name in done.stdout


def test_as_one_object():
    done = surge("inspect", "timm:resnet10t", "--unit", "batch", "--schedule", "0.1,0.2,0.3,0.4", "--json")
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert found["model"] == "timm:resnet10t"
    assert [gate["drop_rate"] for gate in found["gates"]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    first = found["gates"][0]
    assert (first["name"], first["kind"], first["shortcut"]) == ("layer1.0.add", "identity", "identity")
    assert first["branch"].split()[0] == "conv1"
    assert found["expected_depth"] == pytest.approx(3.0)
    saved = sum(gate["flops_share"] * gate["drop_rate"] for gate in found["gates"])
    assert found["expected_flops"] == pytest.approx(1 - saved)


def test_what_is_left_alone_is_grouped_or_listed():
    model = (
        "inspect",
        "timm:swin_tiny_patch4_window7_224",
        "--model-arg",
        "depths=[1,1]",
        "--model-arg",
        "embed_dim=12",
    )
    small = ("--model-arg", "num_heads=[1,2]", "--img-size", 56)
    grouped, listed = surge(*model, *small), surge(*model, *small, "-v")
    assert grouped.exit_code == 0, grouped.stderr
    assert "left alone: 2 additions" in grouped.stdout
    assert grouped.stdout.count("WindowAttention") == 1
    assert listed.stdout.count("WindowAttention") == 2
    refused = json.loads(surge(*model, *small, "--json").stdout)["refused"]
    assert len(refused) == 2
    assert refused[0]["code"]
    assert refused[0]["reason"] in " ".join(listed.stdout.split())


def test_verbose_shows_warnings(tmp_path, monkeypatch):
    lines = ("import warnings", "from torch import nn", "def net():", "    warnings.warn('beware')")
    (tmp_path / "nets_that_warn.py").write_text("\n".join([*lines, "    return nn.Sequential(nn.ReLU())"]))
    monkeypatch.syspath_prepend(tmp_path)
    for more in ((), ("-v",)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert surge("inspect", "nets_that_warn:net", *more).exit_code == 4
        assert ["beware" in str(one.message) for one in told] == [True] * len(more)
    assert "Show warnings" in surge("inspect", "--help").stdout


def test_nothing_to_gate():
    done = surge("inspect", "torchvision:alexnet")
    assert done.exit_code == 4
    assert done.stdout == ""
    assert done.stderr == "surgeon: torchvision:alexnet has no residual add, so there is nothing to gate\n"
    assert json.loads(surge("inspect", "torchvision:alexnet", "--json").stdout)["exit_code"] == 4
    assert surge("inspect", "torchvision:alexnet", "-q").stderr == ""


def test_selection():
    done = surge("inspect", "timm:resnet10t", "--exclude", "layer4*", "--json")
    assert [gate["name"] for gate in json.loads(done.stdout)["gates"]] == [
        f"layer{i}.0.add" for i in (1, 2, 3)
    ]
