"""``surgeon completion``: what a shell needs to complete commands, options, models and configs."""

from typing import Literal

import click

from surgeon.cli._run import Output
from surgeon.cli._run import command as surgeon_command

_EXAMPLES = """
eval "$(surgeon completion bash)"      # in ~/.bashrc
eval "$(surgeon completion zsh)"       # in ~/.zshrc, behind compinit
surgeon completion fish > ~/.config/fish/completions/surgeon.fish
"""


@surgeon_command("completion", "Print the completion for a shell.", examples=_EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(out: Output, shell: Literal["bash", "zsh", "fish"]) -> None:
    """Prints what SHELL has to read, so that Tab completes commands, options, models and configs."""
    from click.shell_completion import get_completion_class

    from surgeon.cli.main import main

    made = get_completion_class(shell)
    assert made is not None
    out.stream.write(made(main, {}, "surgeon", "_SURGEON_COMPLETE").source().rstrip() + "\n")
