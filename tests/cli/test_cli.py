"""The command line: which stream, which exit code, and the way from a checkpoint to a checked file."""

import json
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

import surgeon
from surgeon import _recipes
from surgeon._checkpoint import save_checkpoint
from surgeon._source import load_model
from surgeon.cli.main import main
from surgeon.errors import SurgeonError

_NETWORKS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()

class Net(nn.Module):
    def __init__(self, num_classes=3, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))

def straight():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def noisy_maker(**kwargs):
    print("a library that talks")
    return Net(**kwargs)
"""
NET = "nets_for_commands:Net"
FRESH = {"capture_output": True, "text": True, "cwd": Path(__file__).parents[2]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "nets_for_commands.py").write_text(_NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_for_commands", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def delivered(tmp_path_factory):
    """A checkpoint of a net trained by the paper's rule, and the file that the command makes of it."""
    folder = tmp_path_factory.mktemp("delivered")
    (folder / "nets_for_commands.py").write_text(_NETWORKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = load_model(NET, num_classes=4)
        surgeon.apply(model, scaling="paper", unit="batch", example=torch.zeros(2, 3, 8, 8))
        noted = {
            "model": NET,
            "model_args": {"num_classes": 4},
            "input_size": [3, 8, 8],
            "classes": ["a", "b", "c", "d"],
        }
        noted |= {"scaling": "paper", "schedule": "linear", "drop_rate": 0.5, "unit": "batch"}
        checkpoint = save_checkpoint(model, folder / "gated.safetensors", noted)
        plain = save_checkpoint(surgeon.fold(model), folder / "plain.safetensors", noted)
        done = surge("export", NET, "--checkpoint", checkpoint, "-o", folder / "m.onnx", "--json")
    assert done.exit_code == 0, done.stderr
    return types.SimpleNamespace(checkpoint=checkpoint, plain=plain, file=folder / "m.onnx", done=done)


def surge(*arguments, **settings):
    return CliRunner(**settings).invoke(main, [str(argument) for argument in arguments])


def test_every_help_ends_with_examples_and_the_same_exit_codes():
    ends = set()
    for command in ((), *((name,) for name in main.list_commands(None))):
        done = surge(*command, "--help")
        assert done.exit_code == 0
        examples = done.stdout.index("  Examples:\n    ")
        codes = done.stdout.index("  Exit codes:\n    0    done\n    1    failed")
        assert 0 < examples < codes
        ends.add(done.stdout[codes:])
    (same,) = ends
    assert [line.split()[0] for line in same.splitlines()[1:]] == ["0", "1", "2", "3", "4", "130"]
    assert len(main.list_commands(None)) == 10


def test_ctrl_c_is_130_of_every_command(monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(surgeon, "plan", stop)
    done = surge("inspect", NET, "--img-size", "8")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "surgeon: interrupted\n")


def _cpu_seconds(*arguments):
    """The least of three starts from cold: the machine may be busy."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "surgeon", *arguments], check=True, **FRESH)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def test_the_version_is_there_at_once():
    assert _cpu_seconds("--version") < 0.3


def test_help_is_quick_and_light():
    code = (
        "import sys; from surgeon.cli.main import main\n"
        "try: main(['export', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'rich', 'numpy'} & sys.modules.keys()\n"
        "print('heavy:', *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, **FRESH)
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "surgeon", "--version"], check=True, **FRESH)
    assert done.stdout == f"surgeon {surgeon.__version__}\n"


def test_without_arguments_it_helps():
    done = surge()
    assert "Commands:" in done.output


@pytest.mark.parametrize("arguments", [("cut",), ("export", NET), ("inspect", NET, "--scaling", "other")])
def test_usage_errors_of_the_line_itself(arguments):
    done = surge(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage: " in done.stderr


def test_export_says_what_it_did_in_one_object(delivered):
    found = json.loads(delivered.done.stdout)
    assert delivered.done.stderr == ""
    assert found["model"] == NET
    assert found["folded"] == ["blocks.0.add", "blocks.1.add"]
    assert found["kept"] == []
    assert found["parity"]["ok"] is True
    assert found["inputs"] == {"input": ["batch", 3, 8, 8]}
    expected = {"schedule": "linear", "drop_rate": "0.5", "scaling": "paper", "input_size": "[3, 8, 8]"}
    assert expected.items() <= found["metadata"].items()
    assert json.loads(found["metadata"]["labels"]) == ["a", "b", "c", "d"]
    assert set(found["nodes"]) == {"Conv", "Relu", "Add", "ReduceMean", "Gemm"}


@pytest.mark.parametrize("checkpoint", ["checkpoint", "plain"])
def test_verify_agrees_with_gated_and_folded_checkpoints(delivered, checkpoint):
    done = surge("verify", delivered.file, NET, "--checkpoint", getattr(delivered, checkpoint), "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert [(row["batch"], row["inputs"]) for row in found["rows"]] == [
        (1, "random"),
        (3, "random"),
        (3, "extreme"),
    ]


def test_verify_as_a_table(delivered, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # else a long path is folded at that width
    done = surge("verify", delivered.file, NET, "--checkpoint", delivered.plain, "--batch-size", 2)
    assert done.exit_code == 0
    title, head, row, _ = done.stdout.splitlines()
    assert title == f"{delivered.file}: agrees (tolerance 0.0001)"
    assert head.split() == ["output", "inputs", "batch", "max", "|d|", "relative", "top-1", "verdict"]
    assert row.split()[:3] == ["output", "random", "2"]
    assert row.split()[-2:] == ["100%", "ok"]


def test_other_weights_fail_parity(delivered):
    done = surge("verify", delivered.file, NET, "--num-classes", 4, "--input-size", "3x8x8")
    assert done.exit_code == 3
    assert "does not match" in done.stdout
    assert "FAIL" in done.stdout
    assert done.stderr.startswith("surgeon: output 'output' at batch ")
    assert "3 of 3 comparisons failed" in done.stderr
    assert "the two part at node" in done.stdout


def test_random_weights_are_those_of_a_library(delivered, here, monkeypatch):
    """A module's name may begin as a library's does."""
    (here / "timm_like.py").write_text(_NETWORKS)
    done = surge("verify", delivered.file, "timm_like:Net", "--num-classes", 4, "--input-size", "3x8x8")
    assert done.exit_code == 3
    assert "are random" not in done.stderr


def test_scaling_said_wrongly_fails_parity(delivered):
    arguments = ("verify", delivered.file, NET, "--checkpoint", delivered.checkpoint)
    assert surge(*arguments, "--scaling", "inverted").exit_code == 3
    assert surge(*arguments, "--drop-rate", "0.4").exit_code == 3
    assert surge(*arguments, "--drop-rate", "0.5").exit_code == 0


def test_export_that_computes_something_else(delivered, here, monkeypatch):
    from surgeon._onnx import parity, verify

    row = parity.ParityRow("output", 3, (3, 4), 0.5, 0.25, 0.0, "", ok=False)
    monkeypatch.setattr(verify, "compare", lambda *_, **__: [row])
    monkeypatch.setattr("surgeon._onnx.export.to_onnx", lambda *_, **__: _graph_of(delivered.file))
    arguments = ("export", NET, "--checkpoint", delivered.checkpoint, "-o", "bad.onnx")
    done = surge(*arguments)
    assert done.exit_code == 3
    assert done.stdout == ""
    assert "output 'output' at batch 3 differs by 0.5 (relative 0.25" in done.stderr
    assert "No file was written to bad.onnx" in done.stderr
    found = json.loads(surge(*arguments, "--json").stdout)
    assert found["exit_code"] == 3
    assert found["error"]["type"] == "OutputsDifferError"
    assert found["report"]["rows"][0]["relative"] == 0.25
    assert not (here / "bad.onnx").exists()


def _graph_of(path):
    import onnx_ir

    return onnx_ir.load(path)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "timm:resnt18"), 2, "timm has no model 'resnt18'. Did you mean timm:resnet18"),
        (("inspect", "resnet18"), 2, "write timm:resnet18 or torchvision:resnet18"),
        (("inspect", "nets_for_commands:Nat"), 2, "nets_for_commands has no 'Nat'. Did you mean Net"),
        (("inspect", NET, "--input-size", "8"), 2, "--input-size is '8'; give channels, height and width"),
        (("inspect", NET, "--input-size", "3x8x8", "--img-size", "8"), 2, "say the same thing"),
        (("inspect", NET, "--model-arg", "channels"), 2, "--model-arg is 'channels'; give KEY=VALUE"),
        (("inspect", NET, "--schedule", "0.1,x"), 2, "--schedule is '0.1,x'; give a name, or drop rates"),
        (("inspect", NET, "--img-size", "8", "--drop-rate", "1.5"), 2, "1.5"),
        (("inspect", NET, "--img-size", "8", "--include", "nothing*"), 2, "nothing*"),
        (("inspect", NET, "--checkpoint", "none.safetensors"), 1, "none.safetensors: it does not exist"),
        (("export", NET, "-o", "none/m.onnx"), 2, "there is no directory"),
        (("export", NET, "-o", "nets_for_commands.py"), 2, "exists; pass overwrite=True (--overwrite)"),
        (("export", NET, "-o", "m.onnx", "--labels", "none.txt"), 2, "cannot read the labels in none.txt"),
        (("export", NET, "-o", "m.onnx", "--opset", "99"), 2, "opset is 99"),
        (
            ("export", NET, "-o", "m.onnx", "--drop-rate", "0.5"),
            2,
            "--drop-rate without --scaling: give --scaling paper",
        ),
        (
            ("export", "nets_for_commands:straight", "-o", "m.onnx", "--scaling", "paper"),
            2,
            "nothing says with which survival probabilities the weights were trained",
        ),
        (
            (
                "export",
                NET,
                "-o",
                "m.onnx",
                "--scaling",
                "paper",
                "--schedule",
                "0,0.5",
                "--drop-rate",
                "0.5",
            ),
            2,
            "--schedule lists the drop rates themselves; leave --drop-rate out",
        ),
        (
            (
                *("export", "nets_for_commands:straight", "-o", "m.onnx"),
                *("--scaling", "paper", "--drop-rate", "0.5"),
            ),
            4,
            "no residual add to gate",
        ),
        (("verify", "none.onnx", NET), 1, "cannot read none.onnx: it does not exist"),
        (("verify", "nets_for_commands.py", NET), 1, "nets_for_commands.py is no valid ONNX model"),
        (("finetune", "digits", "epochs"), 2, "'epochs' is no setting; write KEY=VALUE"),
    ],
)
def test_errors_are_one_line_and_one_code(here, arguments, code, message):
    done = surge(*arguments)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("surgeon: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (here / "m.onnx").exists()
    told = json.loads(surge(*arguments, "--json").stdout)
    assert told["exit_code"] == code
    assert message in told["error"]["message"]


def test_folded_weights_are_not_folded_again(delivered):
    done = surge("export", NET, "--checkpoint", delivered.plain, "-o", "m.onnx", "--scaling", "paper")
    assert done.exit_code == 2
    assert "--scaling paper would apply them twice" in done.stderr


def test_debug_shows_where(here):
    assert "Traceback" not in surge("inspect", "timm:resnt18").stderr
    assert "Traceback (most recent call last)" in surge("inspect", "timm:resnt18", "--debug").stderr


def test_a_bug_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(surgeon, "plan", lambda *_, **__: 1 / 0)
    done = surge("inspect", NET, "--img-size", "8")
    assert done.exit_code == 1
    assert done.stderr == "surgeon: unexpected ZeroDivisionError: division by zero; --debug shows where\n"


def recipe(monkeypatch, main):
    monkeypatch.setattr(_recipes, "load", lambda name: types.SimpleNamespace(main=main))


def test_finetune_runs_the_recipe(monkeypatch):
    calls = []

    def main(config, overrides, *, dry_run, quiet):
        calls.append((config, overrides, dry_run, quiet))
        print("the gates, and so on")
        return {"after": 97.5}

    recipe(monkeypatch, main)
    done = surge("finetune", "digits", "train.epochs=2", "output=a=b")
    assert done.exit_code == 0
    assert done.stdout == "the gates, and so on\n"
    told = surge("finetune", "digits", "--json")
    assert json.loads(told.stdout) == {"after": 97.5}
    assert told.stderr == "the gates, and so on\n"
    assert surge("finetune", "digits", "--dry-run", "-q").stdout == "the gates, and so on\n"
    assert calls == [
        ("digits", ["train.epochs=2", "output=a=b"], False, False),
        ("digits", [], False, False),
        ("digits", [], True, True),
    ]


def test_finetune_prints_its_config_and_keys():
    done = surge("finetune", "digits", "train.epochs=7", "--print-config")
    assert done.exit_code == 0
    assert yaml.safe_load(done.stdout)["train"]["epochs"] == 7
    told = surge("finetune", "--help")
    assert "\n  imagefolder " in told.stdout
    assert "\n  gates.drop_rate " in told.stdout
    wrong = surge("finetune", "digits", "optimizer.name=adamww", "--print-config")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "did you mean adamw?" in wrong.stderr


def test_finetune_that_is_interrupted(monkeypatch):
    def main(config, overrides, **flags):
        raise KeyboardInterrupt

    recipe(monkeypatch, main)
    assert surge("finetune", "digits").exit_code == 130


def test_recipes_are_listed_shown_and_copied(tmp_path):
    held = json.loads(surge("recipes", "ls", "--json").stdout)["recipes"]
    assert {"finetune", "digits", "imagefolder", "paper/resnet110_cifar10", "models/resnet.py"} <= set(held)
    listed = surge("recipes", "ls").stdout  # in lines as wide as the terminal
    assert held["imagefolder"] in " ".join(listed.split())
    shown = surge("recipes", "cat", "imagefolder").stdout
    assert yaml.safe_load(shown)["data"]["kind"] == "folder"
    for name in held:
        assert surge("recipes", "cat", name).exit_code == 0
    assert surge("recipes", "cp", "imagefolder", str(tmp_path / "mine.yaml")).exit_code == 0
    assert (tmp_path / "mine.yaml").read_text() == shown
    again = surge("recipes", "cp", "imagefolder", str(tmp_path / "mine.yaml"))
    assert again.exit_code == 2
    assert "mine.yaml exists; name another file" in again.stderr
    assert surge("recipes", "cp", "digits", str(tmp_path)).exit_code == 0
    assert (tmp_path / "digits.yaml").is_file()


def test_the_recipe_runs_from_where_it_was_copied_to(tmp_path):
    assert surge("recipes", "cp", "finetune", str(tmp_path / "mine")).exit_code == 0
    done = subprocess.run(
        [sys.executable, str(tmp_path / "mine" / "finetune.py"), "digits", "--print-config"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["data"]["kind"] == "digits"
    assert surge("recipes", "cp", "finetune", str(tmp_path / "mine")).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("cat", "imagefoldr"), "there is no recipe 'imagefoldr'. Did you mean imagefolder?"),
        (("cat", "../pyproject.toml"), "there is no recipe '../pyproject.toml'"),
        (("cat",), "write surgeon recipes cat NAME"),
        (("cp", "digits"), "surgeon recipes cp NAME DEST"),
        (("cp", "digits", "/nowhere/at/all.yaml"), "cannot write /nowhere/at/all.yaml: No such file"),
    ],
)
def test_recipes_that_are_not_there(arguments, told):
    done = surge("recipes", *arguments)
    assert done.exit_code == 2
    assert told in done.stderr


def test_recommend_tells_its_sources():
    done = surge("recommend", "timm:resnet18", "--images", "4000", "--epochs", "30", "--scratch")
    assert done.stdout.startswith("drop rate 0.2, linear; worth a run each: 0, 0.1, 0.2, 0.4\n")
    assert "Composer's documentation" in done.stdout
    found = json.loads(surge("recommend", "resnet18d", "--images", "4000", "--epochs", "30", "--json").stdout)
    assert (found["model"], found["rate"]) == ("timm:resnet18d", 0.2)


def test_finetune_that_fails(monkeypatch):
    def main(config, overrides, **flags):
        raise SurgeonError("train.epoch is no setting; did you mean train.epochs?")

    recipe(monkeypatch, main)
    done = surge("finetune", "digits", "train.epoch=2")
    assert done.exit_code == 1
    assert done.stderr == "surgeon: train.epoch is no setting; did you mean train.epochs?\n"


def test_a_command_that_is_none_is_answered_with_the_nearest():
    assert "'inspekt'. Did you mean inspect?" in CliRunner().invoke(main, ["inspekt"]).stderr
    told = CliRunner().invoke(main, ["zzz"])
    assert told.exit_code == 2
    assert "Did you mean" not in told.stderr
