"""What a shell may complete: MODEL, configs and schedules. Nothing heavy is imported for it."""

import os
import re
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

# How timm and torchvision register a model: the name may be told, else it is the function's.
_REGISTERED = re.compile(
    r"^@register_model(?:\((?:name=\"(\w+)\")?\))?\n(?:@.*\n|    .*\n|\)\n)*def (\w+)", re.MULTILINE
)
_SCHEDULES = ("linear", "linear-from-zero", "uniform")


def registered(library: str) -> list[str]:
    """The models of ``"timm"`` or ``"torchvision"``, read from its files: to import it takes seconds."""
    found = find_spec(library)
    if found is None or found.origin is None:
        return []
    names = set()
    for path in (Path(found.origin).parent / "models").rglob("*.py"):
        names |= {told or own for told, own in _REGISTERED.findall(path.read_text(encoding="utf-8"))}
    return sorted(names)


def models(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Spellings of MODEL: with its library, or alone where one library has the name."""
    library, colon, _ = incomplete.partition(":")
    if colon and library == "recipes":
        from surgeon._recipes import models as of_papers

        found = [f"recipes:{name}" for name in of_papers()]
        return [one for one in found if one.startswith(incomplete)]
    homes = {home: registered(home) for home in ("timm", "torchvision")}
    full = [f"{home}:{name}" for home, names in homes.items() for name in names]
    both = set.intersection(*map(set, homes.values()))
    bare = [name for name in chain(*homes.values()) if name not in both] if incomplete else []
    return [one for one in (*full, "recipes:", *bare) if one.startswith(incomplete)]


def configs(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Configs that come with surgeon, else files."""
    from surgeon._recipes import locate

    folder = locate() / "configs"
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.yaml"))]
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def recipes(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """What `surgeon recipes cat` and `cp` take."""
    from surgeon._recipes import contents

    return [name for name in contents() if name.startswith(incomplete)]


def schedules(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The schedules that have a name."""
    return [name for name in _SCHEDULES if name.startswith(incomplete)]


@add_completion_class
class Bash(BashComplete):
    """As click's, for words with a colon, at which bash parts them."""

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' line=${COMP_LINE:0:COMP_POINT} cut="" type value completion
    local last=${line##*[[:space:]]}
    [[ $COMP_WORDBREAKS == *:* && $last == *:* ]] && cut=${last%%:*}:
    COMPREPLY=()
    for completion in $(env COMP_LINE="$line" %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$cut"}") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    @staticmethod
    def _check_version() -> None:
        """The version is checked by the shell that reads the script: ``-o nosort`` is of bash 4.4."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words of the line, the last of which is not complete."""
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)[1:]
        incomplete = "" if not words or line[-1:].isspace() else words.pop()
        return words, incomplete
