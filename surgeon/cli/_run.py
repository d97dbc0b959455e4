"""What all commands share: options, where output goes, and how an error becomes an exit code."""

import contextlib
import functools
import gc
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

import click

from surgeon.errors import NoResidualsError, ParityError, SurgeonError, UsageError

if TYPE_CHECKING:
    from surgeon._text import Part

Body = Callable[..., int | None]

DONE, FAILED, USAGE, PARITY, NOTHING = range(5)
INTERRUPTED = 130  # as shells say it of Ctrl-C

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

EXIT_CODES = """\b
Exit codes:
  0    done
  1    failed, or what was looked at is wrong
  2    usage: an argument is unknown, out of range or does not fit
  3    two forms of a network that must agree do not
  4    nothing to do: no residual add, no stochastic depth, nothing to fold
  130  interrupted (Ctrl-C)"""

MODEL_HELP = (
    "MODEL is timm:NAME, torchvision:NAME, recipes:NAME, package.module:callable, or a bare name that only "
    "one of the first three has."
)


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command's words go: the result to stdout, the rest to stderr.

    Attributes:
        as_json: The result is one JSON object.
        quiet: Nothing but errors on stderr.
        verbose: Warnings of the libraries are shown too, and what is otherwise grouped is listed.
        debug: Errors come with their traceback.
        stream: The real stdout; what libraries print meanwhile goes to stderr.
    """

    as_json: bool
    quiet: bool
    verbose: bool
    debug: bool
    stream: IO[str] = field(default_factory=lambda: sys.stdout)

    def result(self, found: dict[str, Any], shown: "Sequence[Part]" = (), of: str = "") -> None:
        """Prints the result: the dict as JSON, or else what is shown of it.

        Args:
            found: The result as plain values.
            shown: The result as it draws itself; where nobody watches, it comes out as ``str`` gives it.
            of: What the result is of, in front of its first title.
        """
        if self.as_json:
            self.stream.write(json.dumps(found, indent=2, default=str) + "\n")
            return
        if not shown:
            return
        from surgeon._text import as_text
        from surgeon.cli._draw import draw

        first = shown[0]
        title = ": ".join(filter(None, (of, first.title)))
        parts = [replace(first, title=title), *shown[1:]]
        fits = not self.stream.isatty() and "COLUMNS" not in os.environ
        self.stream.write(f"{as_text(parts) if fits else draw(parts, self.stream)}\n")

    def note(self, text: str) -> None:
        """Says something that is not the result."""
        if not self.quiet:
            click.echo(text, err=True)

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Shows that work goes on, where somebody watches."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True, highlight=False).status(text):
            yield

    @contextlib.contextmanager
    def counting(self, text: str) -> Iterator[Callable[[int], object]]:
        """As `working`, with a number that it yields a function to set."""
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        if self.quiet or not console.is_terminal:
            yield lambda _: None
            return
        with console.status(text) as status:
            yield lambda number: status.update(f"{text}: {number}")


def command(
    name: str, short: str, *, examples: str, more: str = "", kind: type[click.Command] = click.Command
) -> Callable[[Body], click.Command]:
    """Makes a command of a function ``(out, **arguments) -> exit code``.

    It gets the options that all commands share, and a help page of the function's docstring, ``more``, the
    examples and the exit codes.
    """

    def wrap(body: Body) -> click.Command:
        @functools.wraps(body)
        def call(*, as_json: bool, quiet: bool, verbose: bool, debug: bool, **arguments: Any) -> None:
            out = Output(as_json, quiet, verbose, debug)
            sys.exit(_guarded(out, lambda: body(out, **arguments)))

        made = click.command(
            name,
            kind,
            context_settings=SETTINGS,
            help=f"{inspect.cleandoc(body.__doc__ or '')}\n\n{more}",
            short_help=short,
            epilog=f"{example_block(examples)}\n\n{EXIT_CODES}",
        )(call)
        made.params.extend(_shared_options())
        return made

    return wrap


def example_block(examples: str) -> str:
    """Examples as click keeps them: line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines())


def _shared_options() -> list[click.Option]:
    return [
        click.Option(["--json", "as_json"], is_flag=True, help="Print the result as one JSON object."),
        click.Option(["-q", "--quiet"], is_flag=True, help="Nothing but errors on stderr."),
        click.Option(["-v", "--verbose"], is_flag=True, help="Show warnings; list what is grouped else."),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
    ]


def _guarded(out: Output, body: Callable[[], int | None]) -> int:
    """Runs a command's body; says what went wrong and returns the exit code."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not out.verbose:
            warnings.simplefilter("ignore")
        try:
            return body() or DONE
        except SurgeonError as error:
            return _failed(out, error, str(error))
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("surgeon: interrupted", err=True)
            return INTERRUPTED
        except Exception as error:  # noqa: BLE001 - the last resort: a bug, said in one line.
            return _failed(out, error, f"unexpected {type(error).__name__}: {error}; --debug shows where")
        finally:
            gc.unfreeze()  # what `load_subject` kept from the collector


def _failed(out: Output, error: Exception, message: str) -> int:
    code = _exit_code(error)
    if out.debug:
        traceback.print_exception(error)
    click.echo(f"surgeon: {message}", err=True)
    if out.as_json:
        report = getattr(error, "report", None)
        found = {"error": {"type": type(error).__name__, "message": message}, "exit_code": code}
        out.result(found if report is None else {**found, "report": report.to_dict()})
    return code


def _exit_code(error: Exception) -> int:
    kinds = {NoResidualsError: NOTHING, ParityError: PARITY, UsageError: USAGE}
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), FAILED)
