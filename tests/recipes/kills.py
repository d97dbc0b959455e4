"""Trains in processes that are killed at random moments and started anew; run by `test_recipe_kills.py`.

    kills.py CONFIG FOLDER KILLS PROCESSES SEED

A run that comes to its end is kept, in `parts0`, `parts1` and so on, and another one begins, until there have
been so many kills. Each attempt is forked from this one, which has imported everything, so that it costs
little but its work.
"""

import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from surgeon import _recipes

RECIPE = _recipes.load("finetune")


def start(options: list[str], processes: int) -> list[int]:
    """Forks the processes of one training; returns their numbers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                places = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": processes,
                    "LOCAL_WORLD_SIZE": processes,
                }
                os.environ.update({key: str(value) for key, value in places.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
            code = 1
            try:
                RECIPE.main(sys.argv[1], options, quiet=True)
                code = 0
            except BaseException:  # noqa: BLE001 - the process ends here
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def finish(children: list[int], seconds: float | None = None) -> bool:
    """Waits for the processes, or kills them after so long; whether they ended well, and by themselves."""
    began = time.monotonic()
    left = dict.fromkeys(children)
    ended = []
    while left:
        for child in list(left):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                del left[child]
                ended.append(status)
        if seconds is not None and time.monotonic() - began > seconds:
            for child in left:
                os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.01)
    if any(os.WIFEXITED(status) and os.WEXITSTATUS(status) for status in ended) and seconds is not None:
        sys.exit("a process failed by itself")
    return all(status == 0 for status in ended)


def main() -> None:
    folder, kills, processes = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(int(sys.argv[5]))  # noqa: S311 - no secret
    began = time.monotonic()
    if not finish(start([f"output={folder / 'whole'}"], processes), 10_000.0):
        sys.exit("the run without kills failed")
    whole, parts = time.monotonic() - began, folder / "parts"
    done = ended = 0
    while done < kills:
        resume = (parts / "last.pt").exists()
        options = [f"output={parts}", "resume=true" if resume else "overwrite=true"]
        if finish(start(options, processes), draw.uniform(0.05, 0.6) * whole):
            parts.rename(folder / f"parts{ended}")  # it came to its end; another one begins
            ended += 1
            continue
        done += 1
        epochs = sum('"epoch", "epoch"' in line for line in _lines(parts / "metrics.jsonl"))
        print(
            f"killed {done}, {'going on' if resume else 'from the start'}, after epoch {epochs}", flush=True
        )
    resume = "resume=true" if (parts / "last.pt").exists() else "overwrite=true"
    if not finish(start([f"output={parts}", resume], processes), 10_000.0):
        sys.exit("the run after the kills failed")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
