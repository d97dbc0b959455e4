"""Reads the settings of `finetune.py` from YAML and from the command line, and lists what can be set."""

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from finetune_settings import Config, section_of
from pydantic import BaseModel, ValidationError

from surgeon.errors import UsageError

CONFIGS = Path(__file__).resolve().parent / "configs"


def load_config(config: str, overrides: list[str]) -> Config:
    """Reads a YAML file, or one of `recipes/configs` by its bare name, and lays `key=value` on top.

    A file may say `base: NAME` of another, whose settings it changes.

    Raises:
        UsageError: If there is no such file, it is not YAML, or a key is unknown or ill-typed.
    """
    path = _find(config)
    tree = _read(path, ())
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems: dict[tuple[str, ...], str] = {}  # of each key the first
        for problem in error.errors():
            problems.setdefault(tuple(_place(problem["loc"])), _explain(problem))
        raise UsageError(f"{path.name}: {'; '.join(problems.values())}") from error


def dump_config(config: Config) -> str:
    """The settings as YAML, defaults and overrides included: what reproduces the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def rehearsal(config: Config, folder: Path, processes: int = 1) -> Config:
    """The same settings for two steps on made-up images: nothing is fetched; `folder` takes the output.

    A head that is kept is of weights and classes that are not there, so the rehearsal makes a new one.
    """
    train, classes = config.train, max(config.data.classes, config.pretrain.classes if config.pretrain else 2)
    samples = 2 * train.batch_size * train.accumulate * processes
    log = config.log.model_copy(update={"every": 1, "trackers": ()})
    changes: dict[str, Any] = {
        "output": folder,
        "resume": False,
        "overwrite": False,
        "model": config.model.model_copy(
            update={"pretrained": False, "checkpoint": None, "keep_head": False}
        ),
        "data": config.data.model_copy(update={"kind": "fake", "samples": samples, "classes": classes}),
        "train": train.model_copy(update={"epochs": 1}),
        "log": log,
    }
    if config.pretrain:
        changes["pretrain"] = config.pretrain.model_copy(update={"epochs": 1})
    return config.model_copy(update=changes)


def list_configs() -> list[tuple[str, str]]:
    """The shipped configs by name, each with the first sentence of its header."""
    found = []
    for path in sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        found.append((path.relative_to(CONFIGS).with_suffix("").as_posix(), first))
    return found


def list_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key by its full name, with its default ("" if it must be given) and its meaning."""
    found = []
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        if below is not None:
            found += list_keys(below, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else _spoken(field.default)
        choices = _choices(field.annotation)
        found.append((prefix + name, default, "; ".join(filter(None, (choices, field.description)))))
    return found


def help_text() -> str:
    """The configs and keys, as `finetune --help` shows them."""
    configs, keys = list_configs(), list_keys()
    wide, key_wide = (max(len(row[0]) for row in rows) for rows in (configs, keys))
    lines = ["Configs:", *(f"  {name:{wide}}  {first}" for name, first in configs), "", "Keys:"]
    for name, default, about in keys:
        lines.append(f"  {name:{key_wide}}  {f'[{default}] ' if default else ''}{about}".rstrip())
    return "\n".join(lines)


def _find(config: str) -> Path:
    for path in (Path(config), CONFIGS / f"{config}.yaml"):
        if path.is_file():
            return path
    known = [name for name, _ in list_configs()]
    close = difflib.get_close_matches(config, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(f"there is no config {config!r}: not a file, and not one of {', '.join(known)}.{hint}")


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise UsageError(f"{path}: base leads back to itself: {' -> '.join(map(str, (*seen, path)))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} holds no settings: expected sections such as `model:` and `train:`.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / f"{base}.yaml"
    return _merged(_read(beside if beside.is_file() else _find(str(base)), (*seen, path)), tree)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        held = merged.get(key)
        both = isinstance(held, dict) and isinstance(value, dict) and value  # {} empties
        merged[key] = _merged(held, value) if both else value  # type: ignore[arg-type]  # `both` narrows nothing
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    """Writes one `section.key=value` into the tree; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"cannot read the override {override!r}: write key=value, as in train.epochs=5.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: the value {text!r} is not YAML: {error}") from error
    *sections, last = key.split(".")
    for section in sections:
        below = tree.get(section)
        tree[section] = below = {} if below is None else below
        if not isinstance(below, dict):
            raise UsageError(f"{key}: {section} is a value, {below!r}, and has no keys below it.")
        tree = below
    tree[last] = value


def _explain(problem: Any) -> str:
    """One of pydantic's complaints in a line: the key's full name, what is wrong, what would do."""
    *sections, last = _place(problem["loc"])
    where = ".".join((*sections, last))
    match problem["type"]:
        case "extra_forbidden":
            known = _keys(sections)
            close = difflib.get_close_matches(last, known, n=1)
            hint = f"did you mean {'.'.join((*sections, close[0]))}? " if close else ""
            return f"{where}: unknown key; {hint}Keys here: {', '.join(known)}"
        case "missing":
            return f"{where}: missing; give it in the file or as {where}=VALUE"
        case "value_error":
            return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    known = re.findall("'(.+?)'", problem["msg"]) if problem["type"] == "literal_error" else []
    close = difflib.get_close_matches(str(problem["input"]), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, not {problem['input']!r}{hint}"


def _place(loc: tuple[Any, ...]) -> list[str]:
    """The key's name: pydantic adds which of several types of a value it has tried."""
    names: list[str] = []
    section: type[BaseModel] | None = Config
    for part in map(str, loc):
        names.append(part)
        field = section.model_fields.get(part) if section is not None else None
        section = section_of(field.annotation) if field else None
        if section is None:
            break
    return names or [""]


def _keys(sections: list[str]) -> list[str]:
    """The keys of the section at that place."""
    place: type[BaseModel] = Config
    for name in sections:
        place = section_of(place.model_fields[name].annotation) or place
    return list(place.model_fields)


def _choices(annotation: Any) -> str:
    """The values that a key may have, where they are few."""
    for kind in (annotation, *get_args(annotation)):
        values = get_args(kind)
        if values and all(isinstance(value, str) for value in values):
            return " | ".join(values)
    return ""


def _spoken(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[]" if value == () else str(value)
