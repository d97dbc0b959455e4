"""The ``surgeon`` command. Its subcommands are imported when they are called, torch when one works."""

import importlib

import click

from surgeon._meant import did_you_mean, nearest
from surgeon._version import __version__
from surgeon.cli import _complete  # noqa: F401 - its bash is asked for by name
from surgeon.cli._run import EXIT_CODES, SETTINGS, example_block

_COMMANDS = (
    *("inspect", "audit", "recommend", "finetune", "recipes"),
    *("fold", "lesion", "export", "verify", "completion"),
)

_EXAMPLES = """
surgeon inspect timm:resnet50
surgeon audit timm:efficientnet_b0 --drop-rate 0.3
surgeon recommend timm:convnext_tiny --images 4000 --epochs 30
surgeon finetune digits
surgeon fold gated.safetensors -o model.safetensors
surgeon export timm:resnet50 --checkpoint model.safetensors -o model.onnx
surgeon verify model.onnx timm:resnet50 --checkpoint model.safetensors
"""


class _Commands(click.Group):
    """The group of commands, each in the file of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature.
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"surgeon.cli.{cmd_name}").command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            told = f"{error.message} {did_you_mean(nearest(args[0], _COMMANDS))}"
            raise click.UsageError(told.rstrip(), ctx) from None


@click.group(
    cls=_Commands,
    context_settings=SETTINGS,
    epilog=f"{example_block(_EXAMPLES)}\n\n{EXIT_CODES}",
    no_args_is_help=True,
)
@click.version_option(__version__, message="surgeon %(version)s")
def main() -> None:
    """Puts stochastic depth into a network that already exists, and takes it out again.

    Gates go onto the residual adds of a pretrained model, the model is fine-tuned, and what leaves is a
    plain model and a plain ONNX file. Results go to stdout, everything else to stderr.
    """
