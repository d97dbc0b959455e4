"""What a user may have meant: the nearest name, the pattern that matches, the call that is right."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ParamSpec, TypeVar

from surgeon.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

_EMPTY = inspect.Parameter.empty
_OF_TORCHVISION = {"p": "drop_rate", "mode": "unit"}  # the arguments of its StochasticDepth


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names that are nearest to ``name``, whatever its case; longer ones count, too."""
    by_lower = {one.lower(): one for one in known}
    asked = name.lower()
    close = difflib.get_close_matches(asked, by_lower, n=most, cutoff=0.6)
    longer = sorted((one for one in by_lower if asked and one.startswith(asked)), key=len)
    return [by_lower[one] for one in dict.fromkeys((*close, *longer))][:most]


def did_you_mean(names: list[str]) -> str:
    """The question, with a space behind it; nothing without names."""
    return f"Did you mean {' or '.join(names)}? " if names else ""


def meant(pattern: str, known: Iterable[str]) -> str:
    """The question for a glob pattern that matches nothing."""
    found = matching(pattern, known)
    return did_you_mean([repr(found)] if found else [])


def matching(pattern: str, known: Iterable[str]) -> str:
    """A glob pattern near ``pattern`` that matches some of ``known``; ``""`` if there is none.

    Tried are the names below it (``layer1`` becomes ``layer1*``), the names around it, a regular expression
    written as a glob, and the nearest name.
    """
    texts = sorted(set(known))
    plain = re.sub(r"\\(.)", r"\1", re.sub(r"\.?\*+|\.\+", "*", pattern.strip("^$ ")))
    core = plain.strip("*.")
    if core:
        for tried in (plain, f"{core}*", f"*{core}*"):
            if any(fnmatchcase(text, tried) for text in texts):
                return tried
    return next(iter(nearest(pattern, texts)), "")


def says_the_call(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which answers a call of another form with one that has the right form.

    An argument too many, or one of another name, is a `UsageError`; nothing runs then.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(right_call(function, signature, args, kwargs, error)) from None
        return function(*args, **kwargs)

    return call


def right_call(
    function: Callable[..., Any],
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    problem: TypeError,
) -> str:
    """What is wrong with a call, and the line to write instead."""
    parameters = signature.parameters
    front = [p.name for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    behind = [p.name for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    known = [*front, *behind]
    free = [name for name in known[len(args) :] if name not in kwargs]
    named: dict[str, Any] = {}
    for key, value in kwargs.items():
        other = _OF_TORCHVISION.get(key, "")
        near = [other] if other in free else nearest(key, free)
        meant = key if key in known else next(iter(near), "")
        if not meant:
            return f"surgeon.{function.__name__}: {problem}; its arguments are {', '.join(known)}"
        named[meant] = value
    named |= dict(zip((name for name in behind if name not in named), args[len(front) :], strict=False))
    given = [*front[:1], *map(_short, args[1 : len(front)])] if args else []
    missing = [
        name for name in front[len(given) :] if name not in named and parameters[name].default is _EMPTY
    ]
    line = ", ".join((*given, *missing, *(f"{name}={_short(value)}" for name, value in named.items())))
    return f"surgeon.{function.__name__}: {problem}; write surgeon.{function.__name__}({line})"


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | bool | None) else "..."
