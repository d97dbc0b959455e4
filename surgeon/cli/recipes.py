"""``surgeon recipes``: the files of the recipes, to look at and to take away."""

import shutil
from pathlib import Path

import click

from surgeon._meant import did_you_mean, nearest
from surgeon.cli._complete import recipes
from surgeon.cli._run import Output
from surgeon.cli._run import command as surgeon_command
from surgeon.errors import UsageError

_EXAMPLES = """
surgeon recipes ls
surgeon recipes cat imagefolder > mine.yaml
surgeon recipes cp finetune ~/recipes
"""


@surgeon_command("recipes", "List, show or copy the recipes and their configs.", examples=_EXAMPLES)
@click.argument("action", type=click.Choice(["ls", "cat", "cp"]))
@click.argument("name", required=False, shell_complete=recipes)
@click.argument("dest", required=False, type=click.Path())
def command(out: Output, action: str, name: str | None, dest: str | None) -> None:
    """Lists the recipes (ls), prints one (cat NAME) or copies it (cp NAME DEST).

    NAME is a config or a file as ls shows it. The recipe itself, finetune, is copied with its parts and
    configs, as it runs from wherever they lie together.
    """
    from surgeon._recipes import contents, locate
    from surgeon._text import Part

    held = contents()
    if action == "ls":
        lines = tuple(f"{key:28} {about}".rstrip() for key, about in held.items())
        out.result({"recipes": held}, [Part(lines=lines)])
        return
    if name is None or (action == "cp") != (dest is not None):
        raise UsageError(
            "write surgeon recipes cat NAME, or surgeon recipes cp NAME DEST; ls lists the names"
        )
    source = _file(locate(), name, list(held))
    if action == "cat":
        out.stream.write(source.read_text(encoding="utf-8"))
        return
    made = _copied(source, Path(str(dest)).expanduser())
    out.result({"wrote": str(made)}, [Part(lines=(f"wrote {made}",))])


def _file(folder: Path, name: str, known: list[str]) -> Path:
    for place in (folder / "configs" / f"{name}.yaml", folder / f"{name}.py", folder / name):
        if place.is_file() and place.resolve().is_relative_to(folder.resolve()):
            return place
    hint = did_you_mean(nearest(name, known))
    raise UsageError(f"there is no recipe {name!r}. {hint}surgeon recipes ls lists them")


def _copied(source: Path, dest: Path) -> Path:
    """Copies a file, or for finetune.py the folder that it needs; what is there already is left alone."""
    if source.name == "finetune.py":
        if dest.exists():
            raise UsageError(f"{dest} exists; name a new folder")
        shutil.copytree(source.parent, dest, ignore=shutil.ignore_patterns("__pycache__"))
        return dest
    place = dest / source.name if dest.is_dir() else dest
    if place.exists():
        raise UsageError(f"{place} exists; name another file")
    try:
        shutil.copyfile(source, place)
    except OSError as error:
        raise UsageError(f"cannot write {place}: {error.strerror}") from error
    return place
