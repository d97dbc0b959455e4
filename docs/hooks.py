"""What pages of the site are filled with: the reference of Python and the command, the list of recipes.

A line ``<!-- fill: WHAT -->`` of a page becomes what the function of that name here returns.
"""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

_SECTION = re.compile(
    r"^(Args|Returns|Raises|Attributes|Example|Examples|Yields):\n((?:(?:    .*)?\n?)*)", re.MULTILINE
)
_ITEM = re.compile(r"^(\*{0,2}\w+(?:, \w+)*): (.*(?:\n    .*)*)", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the marked places of a page; hidden set-up code of its examples goes."""
    filled = re.sub(r"^<!-- fill: (\w+) -->$", lambda m: FILLS[m[1]](), markdown, flags=re.MULTILINE)
    return re.sub(r"<!-- before\n.*?-->\n", "", filled, flags=re.DOTALL)


def python() -> str:
    """Every public name of surgeon, in the order in which one meets them."""
    import surgeon

    groups = {
        "Look": ("find", "plan", "status"),
        "Gates": ("apply", "set_drop_rate", "Ramp", "DepthMeter", "remove", "retrace", "compile"),
        "Weights": ("fold", "save_checkpoint", "load", "load_model"),
        "ONNX": ("export", "verify"),
        "Shorter and many networks": ("lesion", "prune", "column", "sample", "calibration"),
        "Errors": ("SurgeonError",),
    }
    listed = {"__version__", *(name for names in groups.values() for name in names)}
    rest = tuple(name for name in surgeon.__all__ if name not in listed)
    parts = []
    for title, names in {**groups, **({"More": rest} if rest else {})}.items():
        parts.append(f"## {title}")
        parts += [_entry(name, getattr(surgeon, name)) for name in names]
    return "\n\n".join(parts)


def _entry(name: str, found: Any) -> str:
    """One name: heading, signature and text; of a class its public methods as well."""
    lines = [f"### {name}", _signature(f"surgeon.{name}", found), _text(found)]
    if inspect.isclass(found) and not issubclass(found, Exception):
        for key, member in vars(found).items():
            if not key.startswith("_") and (callable(member) or isinstance(member, property)):
                shown = member.fget if isinstance(member, property) else member
                kind = f"`{key}`" if isinstance(member, property) else f"`{key}{inspect.signature(shown)}`"
                lines += [f"**{kind}**", _text(shown)]
    return "\n\n".join(lines)


def _signature(name: str, found: Any) -> str:
    if inspect.isclass(found) and issubclass(found, Exception):
        return ""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(found).parameters.values()]
    inside, named = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            inside, named = [*inside, "*"], True
        inside.append(str(parameter))
    line = f"{name}({', '.join(inside)})"
    if len(line) > 90:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in inside) + ")"
    return f"```python {{ .signature }}\n{line}\n```"


def _text(found: Any) -> str:
    """A docstring of Google's form as Markdown."""
    text = inspect.getdoc(found) or ""
    return _SECTION.sub(_section, re.sub(r"``(.+?)``", r"`\1`", text) + "\n").strip()


def _section(match: re.Match[str]) -> str:
    title, body = match[1], textwrap.dedent(match[2]).strip("\n")
    if title.startswith("Example"):
        return f"**Example**\n\n```python\n{body}\n```\n"
    if title in ("Returns", "Yields"):
        return f"**{title}** {body}\n\n"
    names = "\n".join(f"- `{m[1]}`: {' '.join(m[2].split())}" for m in _ITEM.finditer(body))
    return f"**{'Arguments' if title == 'Args' else title}**\n\n{names or body}\n\n"


def command() -> str:
    """The help of every command, as the shell shows it."""
    import click

    from surgeon.cli.main import main

    context = click.Context(main, info_name="surgeon")
    parts = [f"```text\n{_help(main, context)}\n```"]
    for name in main.list_commands(context):
        made = main.get_command(context, name)
        assert made is not None
        inner = click.Context(made, info_name=name, parent=context)
        parts += [f"## surgeon {name}", f"```text\n{_help(made, inner)}\n```"]
    return "\n\n".join(parts)


def _help(made: Any, context: Any) -> str:
    context.max_content_width = context.terminal_width = 98
    return str(made.get_help(context)).strip()


def recipes() -> str:
    """The configs and files there are."""
    from surgeon._recipes import contents

    rows = "\n".join(f"| `{name}` | {about} |" for name, about in contents().items())
    return f"| name | what it is |\n|---|---|\n{rows}"


FILLS: dict[str, Callable[[], str]] = {"python": python, "command": command, "recipes": recipes}
