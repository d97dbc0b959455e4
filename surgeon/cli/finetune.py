"""``surgeon finetune``: the training recipe, run from here."""

import contextlib
import sys
from typing import Any

import click

from surgeon.cli._complete import configs
from surgeon.cli._run import INTERRUPTED, Output
from surgeon.cli._run import command as surgeon_command
from surgeon.errors import SurgeonError, UsageError

_EXAMPLES = """
surgeon finetune digits
surgeon finetune imagefolder data.root=~/flowers train.epochs=30
surgeon finetune imagefolder data.root=~/flowers resume=true
surgeon finetune my_config.yaml --print-config
surgeon finetune paper/resnet110_cifar10 --dry-run
"""


class _WithKeys(click.Command):
    """Its help lists the configs and keys, which the recipe knows."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from surgeon import _recipes

        formatter.write_paragraph()
        try:
            formatter.write(f"{_recipes.load('finetune_config').help_text()}\n")
        except SurgeonError as error:  # help is for those, too, who lack the packages
            formatter.write(f"{error}\n")
        super().format_epilog(ctx, formatter)


@surgeon_command(
    "finetune", "Fine-tune with gates, fold, export, verify.", examples=_EXAMPLES, kind=_WithKeys
)
@click.argument("config", shell_complete=configs)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--print-config", is_flag=True, help="Print every setting, and do nothing.")
@click.option("--dry-run", is_flag=True, help="The whole way in two steps on made-up images; nothing stays.")
def command(
    out: Output, config: str, overrides: tuple[str, ...], *, print_config: bool, dry_run: bool
) -> int | None:
    """Fine-tunes a network with gates, folds them, exports and verifies, as CONFIG says.

    CONFIG is the name of a configuration that comes with surgeon, or a YAML file of yours. KEY=VALUE changes
    one setting of it, dots leading inwards. Ctrl-C stops with exit code 130 and the line that goes on.
    """
    wrong = [text for text in overrides if not text.partition("=")[1] or text.startswith(("=", "-"))]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is no setting; write KEY=VALUE, as train.epochs=5")
    from surgeon import _recipes

    recipe = _recipes.load("finetune")
    if print_config:
        out.stream.write(recipe.dump_config(recipe.load_config(config, list(overrides))))
        return None
    try:
        with contextlib.redirect_stdout(sys.stderr if out.as_json else out.stream):
            found: dict[str, Any] = recipe.main(config, list(overrides), dry_run=dry_run, quiet=out.quiet)
    except KeyboardInterrupt:
        return INTERRUPTED
    if out.as_json:
        out.result(found)
    return None
