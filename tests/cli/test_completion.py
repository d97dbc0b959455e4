"""Completion, in the shells themselves where they are installed."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgeon._gating.schedule import NAMES
from surgeon._recipes import contents
from surgeon._source import names
from surgeon.cli._complete import models, registered, schedules
from surgeon.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """An environment whose ``surgeon`` is the one under test."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "surgeon"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT}:$PYTHONPATH exec {sys.executable} -W ignore -m surgeon "$@"\n'
    )
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}


def shell(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def script(name):
    done = CliRunner().invoke(main, ["completion", name])
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_names_that_the_files_tell_are_those_of_the_library(library):
    assert registered(library) == sorted(names(library))


def test_schedules_are_those_there_are():
    assert tuple(schedules(None, None, "")) == NAMES
    assert schedules(None, None, "u") == ["uniform"]


def test_models_are_spelt_with_their_library_or_alone_where_one_has_them():
    assert models(None, None, "timm:resnet10t") == ["timm:resnet10t"]
    assert models(None, None, "resnet10t") == ["resnet10t"]
    assert "resnet18" not in models(None, None, "resnet18")
    assert models(None, None, "recipes:rir") == ["recipes:rir18"]
    assert models(None, None, "nothing") == []
    assert not [one for one in models(None, None, "") if ":" not in one]


CASES = [
    ("surgeon ins", ["inspect"]),
    ("surgeon inspect timm:resnet10t", ["timm:resnet10t"]),
    ("surgeon inspect resnet10t", ["resnet10t"]),
    ("surgeon inspect x --schedule u", ["uniform"]),
    ("surgeon fold --model timm:resnet10t", ["timm:resnet10t"]),
    ("surgeon recipes cat paper/rir", []),
    ("surgeon recipes cat models/rir", ["models/rir.py"]),
    ("surgeon finetune digi", ["digits"]),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash(env, line, expected):
    """As readline calls it: the words are parted at colons, and what is given replaces the last part."""
    part = line.split()[-1].rpartition(":")[0]
    code = (
        f"{script('bash')}\nCOMP_LINE=$1 COMP_POINT=${{#1}}\n_surgeon_completion surgeon\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        [shell("bash"), "-c", code, "bash", line], capture_output=True, text=True, env=env, check=True
    )
    given = [f"{part}:{one}" if part else one for one in done.stdout.split()]
    assert given == expected
    assert "complete -o nosort -F _surgeon_completion surgeon" in script("bash")


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_fish(env, line, expected):
    code = f"{script('fish')}\ncomplete -C '{line}'"
    done = subprocess.run([shell("fish"), "-c", code], capture_output=True, text=True, env=env, check=True)
    assert [one.split("\t")[0] for one in done.stdout.splitlines()] == expected


def test_zsh(env, tmp_path):
    """In a terminal: what stands on the line after Tab."""
    program = shell("zsh")
    (tmp_path / "script").write_text(script("zsh"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(program, [program, "-d", "-i"], {**env, "TERM": "dumb", "PS1": "> "})  # noqa: S606

    def said(keys, until, seconds=100):
        os.write(terminal, keys)
        heard, end = b"", time.monotonic() + seconds
        while until not in heard and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                heard += os.read(terminal, 4096)
        return heard

    try:
        ready = f"autoload -Uz compinit; compinit -u -D; source {tmp_path}/script; echo re''ady\n"
        assert b"ready" in said(ready.encode(), b"ready")
        assert b"inspect" in said(b"surgeon ins\t", b"inspect ")
        assert b"timm:resnet10t" in said(b"timm:resnet10\t", b"resnet10t").replace(b"\\", b"")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def test_every_recipe_can_be_completed():
    asked = {"_SURGEON_COMPLETE": "bash_complete", "COMP_LINE": "surgeon recipes cat "}
    done = CliRunner().invoke(main, env=asked, prog_name="surgeon")
    assert {line.partition(",")[2] for line in done.stdout.split()} == set(contents())


def test_an_unknown_shell_is_refused():
    done = CliRunner().invoke(main, ["completion", "csh"])
    assert done.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in done.stderr
