"""Runs a script in several processes, as `torchrun` does, with a time limit: a hang is a failure."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT = 240  # seconds


def launch(script: str, tmp_path: Path, ranks: int = 2, *arguments: str) -> str:
    """Runs a script (its text, or a file) in that many processes; returns what they printed."""
    path = Path(script)
    if "\n" in script:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(script))
    paths = (HERE.parents[1], HERE.parent, HERE, os.environ.get("PYTHONPATH", ""))
    ran = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *ran, str(path), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=LIMIT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
