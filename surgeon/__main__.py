"""``python -m surgeon`` is the command line."""

import sys

from surgeon._needs import need
from surgeon.errors import MissingPackageError


def main() -> None:
    """Runs the command, if what it is made with is installed."""
    try:
        need("the surgeon command", "click", "rich")
    except MissingPackageError as error:
        sys.exit(f"surgeon: {error}")
    from surgeon.cli.main import main as command

    command(prog_name="surgeon")


if __name__ == "__main__":
    main()
