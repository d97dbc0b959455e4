"""``surgeon finetune``: the training recipe, run from here."""

import contextlib
import sys
from typing import Any

import click

from surgeon.cli._run import Output
from surgeon.cli._run import command as surgeon_command
from surgeon.errors import UsageError

_EXAMPLES = """
surgeon finetune digits
surgeon finetune digits gates.drop_rate=0.2 output=runs/gentle
surgeon finetune my_config.yaml data.root=~/flowers train.epochs=30
"""


@surgeon_command("finetune", "Fine-tune with gates, fold, export, verify.", examples=_EXAMPLES)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def command(out: Output, config: str, overrides: tuple[str, ...]) -> None:
    """Fine-tunes a network with gates, folds them, exports and verifies, as CONFIG says.

    CONFIG is the name of a configuration that comes with surgeon, or a YAML file of yours. KEY=VALUE changes
    one setting of it, dots leading inwards.
    """
    wrong = [text for text in overrides if not text.partition("=")[1] or text.startswith(("=", "-"))]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is no setting; write KEY=VALUE, as train.epochs=5")
    from surgeon import _recipes

    shown = sys.stderr if out.as_json or out.quiet else out.stream
    with contextlib.redirect_stdout(shown):
        found: dict[str, Any] = _recipes.load("finetune").main(config, list(overrides))
    if out.as_json:
        out.result(found)
