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
from collections.abc import Callable
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


def finish(children: list[int], due: Callable[[], bool] = lambda: False) -> bool:
    """Waits for the processes, or kills them once that is due; whether they ended well, and by themselves."""
    killed = False
    left = dict.fromkeys(children)
    ended = []
    while left:
        for child in list(left):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                del left[child]
                ended.append(status)
        if not killed and due():
            for child in left:
                os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    if any(os.WIFEXITED(status) and os.WEXITSTATUS(status) for status in ended) and not killed:
        sys.exit("a process failed by itself")
    return all(status == 0 for status in ended)


def after(epochs: int, seconds: float, metrics: Path) -> Callable[[], bool]:
    """Due so long after so many epochs are written: after the start, where they are written already."""
    since: list[float] = []

    def due() -> bool:
        if not since and written(metrics) >= epochs:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > seconds

    return due


def written(metrics: Path) -> int:
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    return text.count('"kind": "epoch"')


def main() -> None:
    folder, kills, processes = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(int(sys.argv[5]))  # noqa: S311 - no secret
    began = time.monotonic()
    if not finish(start([f"output={folder / 'whole'}"], processes)):
        sys.exit("the run without kills failed")
    whole, parts = time.monotonic() - began, folder / "parts"
    epochs, metrics = written(folder / "whole" / "metrics.jsonl"), parts / "metrics.jsonl"
    done = ended = 0
    while done < kills:
        resume = (parts / "last.pt").exists()
        options = [f"output={parts}", "resume=true" if resume else "overwrite=true"]
        reached = written(metrics) if resume else 0
        moment = after(
            draw.randint(min(reached, epochs - 1), epochs - 1), draw.uniform(0, 0.1) * whole, metrics
        )
        if finish(start(options, processes), moment):
            parts.rename(folder / f"parts{ended}")  # it came to its end; another one begins
            ended += 1
            continue
        done += 1
        how = "going on" if resume else "from the start"
        print(f"killed {done}, {how}, after epoch {written(metrics)}", flush=True)
    resume = "resume=true" if (parts / "last.pt").exists() else "overwrite=true"
    if not finish(start([f"output={parts}", resume], processes)):
        sys.exit("the run after the kills failed")


if __name__ == "__main__":
    main()
