"""What a forward keeps outside of its module: in the globals of its files, in the caches of their functions.

Masks and grids of positions are often made once for each size, by a function under `functools.lru_cache` or
with a dict of the file. A run on fake tensors must leave none there: the real model would get it ever after.
"""

import functools
import gc
import operator
import sys
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from surgeon._torch import FakeTensor
from surgeon._tracing.holders import contents, stand_in
from surgeon._tracing.state import is_iterator, is_library

Namespace = Mapping[str, Any]
_CACHED: Any = functools._lru_cache_wrapper
_HOLDERS = {dict, OrderedDict, defaultdict, list, set, _CACHED}
_FAKES = (FakeTensor, fx.Proxy)
_MANY, _FEW = 10_000, 100  # a nest of more is data and no cache; one of more holds no caches of its own
_wrapped: dict[int, tuple[int, list[types.CellType]]] = {}
_places: weakref.WeakKeyDictionary[type, tuple[Namespace, ...]] = weakref.WeakKeyDictionary()


@contextmanager
def nothing_left_outside(model: nn.Module, left: list[str] | None = None) -> Iterator[None]:
    """Takes the fakes and proxies that come into the globals of the model's files out of them again.

    Iterators there are exchanged for others meanwhile, so that nothing is taken from them.

    Args:
        model: A model or a block.
        left: A list for what has held a proxy, in words.
    """
    with _iterators_lent(model):
        yield from _cleaned(namespaces(model), [] if left is None else left)


def _cleaned(places: list[Namespace], left: list[str]) -> Iterator[None]:
    values = [(place, dict(place)) for place in places if isinstance(place, dict)]
    holders = [holder for place in places for holder in _holders(place.values())]
    before = {id(holder): _items(holder) for holder in holders}  # which `holders` keeps alive
    try:
        yield
    finally:
        for place in places:
            unclean = [h for h in _holders(place.values()) if _clean(h, before.get(id(h), []))]
            left += [f"a {type(holder).__name__} that is not its own" for holder in unclean]
        for globals_, old in values:
            new = [name for name, value in globals_.items() if value is not old.get(name)]
            for name in new:
                if not isinstance(globals_[name], _FAKES):
                    continue
                if isinstance(globals_[name], fx.Proxy):
                    left.append(f"{name}, which is not its own")
                if name in old:
                    globals_[name] = old[name]
                else:
                    del globals_[name]


@contextmanager
def _iterators_lent(model: nn.Module) -> Iterator[None]:
    """Inside, the iterators in the files, classes and closures of a model are others that go on alike."""
    lent: list[tuple[Callable[[Any], None], Any]] = []
    try:
        for name, value, put in _iterators(model):
            put(stand_in(name, value))
            lent.append((put, value))
        yield
    finally:
        for put, value in lent:
            put(value)


def _iterators(model: nn.Module) -> list[tuple[str, Any, Callable[[Any], None]]]:
    """Name, iterator, and what puts another one in its place."""
    classes = {base for cls in set(map(type, model.modules())) for base in cls.__mro__}
    own = [cls for cls in classes if not is_library(cls.__module__)]
    files = {id(place): place for cls in own for place in _of_class(cls) if isinstance(place, dict)}
    found: list[tuple[str, Any, Callable[[Any], None]]] = [
        (name, value, functools.partial(file.__setitem__, name))
        for file in files.values()
        for name, value in file.items()
        if is_iterator(value)
    ]
    for cls in own:
        for name, value in vars(cls).items():
            if is_iterator(value):
                found.append((f"{cls.__name__}.{name}", value, functools.partial(setattr, cls, name)))
            closure = value.__closure__ or () if isinstance(value, types.FunctionType) else ()
            for cell in closure:
                if any(map(is_iterator, contents(cell))):
                    put = functools.partial(setattr, cell, "cell_contents")
                    found.append((f"a closure of {name}", cell.cell_contents, put))
    return found


def cached_functions(model: nn.Module) -> list[tuple[Any, Callable[[Any], None]]]:
    """The functions of the model's files that keep their results, each with what replaces it there."""
    files = [place for place in namespaces(model) if isinstance(place, dict)]
    found = [
        (value, functools.partial(file.__setitem__, name))
        for file in files
        for name, value in file.items()
        if type(value) is _CACHED
    ]
    cells = [cell for file in files for cell in _cells(file)]
    return found + [(cell.cell_contents, functools.partial(setattr, cell, "cell_contents")) for cell in cells]


def namespaces(model: nn.Module) -> list[Namespace]:
    """The globals of the files that a model's code is in and of what they import, and its classes' own."""
    modules = list(model.modules())
    held = (value for module in modules for value in vars(module).values())
    functions = {value for value in held if isinstance(value, types.FunctionType)}
    places = [place for cls in set(map(type, modules)) for place in _of_class(cls)]
    places += [value.__globals__ for value in functions if not is_library(value.__module__)]
    places = list({id(place): place for place in places}.values())
    cells = [cell for place in places if isinstance(place, dict) for cell in _cells(place)]
    return [*places, MappingProxyType({str(i): cell.cell_contents for i, cell in enumerate(cells)})]


def _of_class(cls: type) -> tuple[Namespace, ...]:
    if cls not in _places:
        own = [base for base in cls.__mro__ if not is_library(base.__module__)]
        files = [vars(sys.modules[base.__module__]) for base in own if base.__module__ in sys.modules]
        imported = [_from(value, cls) for file in files for value in list(file.values())]
        found = [*map(vars, own), *files, *(place for place in imported if place is not None)]
        _places[cls] = tuple({id(place): place for place in found}.values())
    return _places[cls]


def _from(value: Any, cls: type) -> Namespace | None:
    """The globals of the file that an imported function or module comes from, unless it is a library's."""
    if isinstance(value, types.ModuleType):
        return vars(value) if value.__name__.split(".")[0] == cls.__module__.split(".")[0] else None
    function = value.__wrapped__ if type(value) is _CACHED else value
    if isinstance(function, types.FunctionType) and not is_library(function.__module__):
        return function.__globals__
    return None


def _cells(file: dict[str, Any]) -> list[types.CellType]:
    """Where the functions of a file that wrap another one have it, if that keeps its results."""
    size, cells = _wrapped.get(id(file), (0, []))
    if size != len(file):
        functions = [value for value in list(file.values()) if isinstance(value, types.FunctionType)]
        every = [cell for function in functions for cell in function.__closure__ or ()]
        cells = [cell for cell in every for held in contents(cell) if type(held) is _CACHED]
        _wrapped[id(file)] = len(file), cells
    return cells


def _holders(values: Iterable[Any]) -> list[Any]:
    """The nests and cached functions among some values, and the nests in these."""
    found = [value for value in list(values) if type(value) in _HOLDERS]
    few = (value for value in found if type(value) is not _CACHED and 0 < len(value) <= _FEW)
    return found + [item for value in few for item in _items(value) if type(item) in _HOLDERS]


def _items(holder: Any) -> list[Any]:
    """What a nest holds, or a cached function (of which a bounded one has its results, another a dict)."""
    if type(holder) is _CACHED:
        kept = gc.get_referents(holder) if holder.cache_info().currsize else []
        return [item for one in kept for item in (_items(one) if type(one) is dict else [one])]
    if not isinstance(holder, (dict, list, set, tuple)) or len(holder) > _MANY:
        return []
    return [*holder.keys(), *holder.values()] if isinstance(holder, dict) else list(holder)


def _clean(holder: Any, before: list[Any]) -> bool:
    """Takes out what came in and holds something fake; whether a proxy was in it."""
    items = _items(holder)
    if len(items) == len(before) and all(map(operator.is_, items, before)) and type(holder) is not _CACHED:
        return False
    known = set(map(id, before))
    new = [item for item in items if id(item) not in known and _holds(item, _FAKES)]
    for held in new:
        _take_out(holder, held)
    return any(_holds(item, (fx.Proxy,)) for item in new)


def _holds(value: Any, kinds: tuple[type, ...], depth: int = 3) -> bool:
    return isinstance(value, kinds) or (
        depth > 0 and any(_holds(item, kinds, depth - 1) for item in _items(value))
    )


def _take_out(holder: Any, held: Any) -> None:
    if isinstance(holder, dict):
        for key in [key for key, value in holder.items() if value is held or key is held]:
            del holder[key]
    elif isinstance(holder, list):
        holder[:] = [item for item in holder if item is not held]
    elif isinstance(holder, set):
        holder.discard(held)
    else:
        holder.cache_clear()
