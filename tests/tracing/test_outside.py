"""Forwards that keep things outside of their module: in caches of functions, in globals of their files."""

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blocks import Of, Plain, X, same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import surgeon

KEPT: dict[int, Tensor] = {}
SEEN: list[Any] = [{"first": 1}]
LAST: Any = None
FAKES: list[Tensor] = []


@functools.lru_cache
def grid(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32)


@functools.cache
def grid_and_size(size: int) -> tuple[Tensor, int]:
    return torch.arange(size, dtype=torch.float32), size


@functools.lru_cache
def doubled(number: int) -> int:
    return 2 * number


def keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers keeps tables of positions: the cache is in a cell of the wrapper."""
    cached = functools.lru_cache(32)(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return cached(*args, **kwargs)

    wrapper.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return wrapper


@keeping
def table(size: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(size, dtype=dtype)


def kept(size: int) -> Tensor:
    if size not in KEPT:
        KEPT[size] = torch.arange(size, dtype=torch.float32)
    return KEPT[size]


def rebound(x: Tensor) -> Tensor:
    global LAST  # noqa: PLW0603 - as people write it
    LAST = x
    return x


def noted(x: Tensor) -> Tensor:
    SEEN.append(x)
    SEEN[0]["last"] = x
    return x


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for function in (grid, grid_and_size, doubled, table):
        function.cache_clear()
    KEPT.clear()
    FAKES.clear()
    SEEN[:] = [{"first": 1}]


CACHED: dict[str, Callable[..., Tensor]] = {
    "by size": lambda self, x: x + self.f(x + grid(x.shape[1])),
    "by a constant": lambda self, x: x + self.f(x + grid(4)),
    "by a keyword": lambda self, x: x + self.f(x + grid(size=x.shape[-1])),
    "in a cell": lambda self, x: x + self.f(x * table(x.shape[1], torch.float32)),
    "in a tuple": lambda self, x: x + self.f(x * grid_and_size(x.shape[1])[0] + grid_and_size(4)[1]),
    "a number": lambda self, x: x + self.f(x * doubled(3) if doubled(3) > 5 else x),
    "a number by size": lambda self, x: x + self.f(x * doubled(x.shape[1])),
}


@pytest.mark.parametrize("ran", [False, True], ids=["new", "ran before"])
@pytest.mark.parametrize("forward", CACHED.values(), ids=CACHED)
def test_results_that_functions_keep_are_looked_up_in_each_run(
    forward: Callable[..., Tensor], ran: bool
) -> None:
    model = nn.Sequential(Plain(), Of(forward, f=Plain().f)).eval()
    expected = [model(x) for x in (X, X[:2])] if ran else []
    surgeon.apply(model, example=X, drop_rate=0.5, unit="batch", exclude="0.add")
    assert [gate.block for gate in surgeon.status(model).gates] == ["1"]
    expected = expected or [model(x) for x in (X, X[:2])]
    surgeon.set_drop_rate(model, 0.0)
    for training in (False, True):
        model.train(training)
        assert all(same(model(x), want) for x, want in zip((X, X[:2]), expected, strict=True))


OUTSIDE: dict[str, Callable[..., Tensor]] = {
    "a dict of the file": lambda self, x: x + self.f(x + kept(x.shape[1])),
    "a global": lambda self, x: rebound(x) + self.f(x),
    "a list of the file and a dict in it": lambda self, x: noted(x) + self.f(x),
}


@pytest.mark.parametrize("forward", [*CACHED.values(), *OUTSIDE.values()], ids=[*CACHED, *OUTSIDE])
def test_a_model_gives_tensors_after_an_analysis(forward: Callable[..., Tensor]) -> None:
    model = nn.Sequential(Of(forward, f=Plain().f), Plain())
    surgeon.find(model, X)
    assert LAST is None
    assert SEEN == [{"first": 1}]
    assert KEPT == {}
    assert type(model(X)) is Tensor
    surgeon.fold(surgeon.apply(model, example=X, scaling="paper"), example=X)
    assert not any(isinstance(value, FakeTensor) for value in (*KEPT.values(), model(X), model.eval()(X)))
    SEEN[:] = [{"first": 1}]
    rebound(None)  # type: ignore[arg-type]


def test_what_was_kept_before_stays() -> None:
    model = Of(OUTSIDE["a dict of the file"], f=Plain().f)
    before = kept(7)
    with torch._subclasses.FakeTensorMode():
        FAKES.append(torch.zeros(2))
    mine = FAKES[0]
    surgeon.find(model, X)
    assert list(KEPT) == [7]
    assert KEPT[7] is before
    assert FAKES[0] is mine


def test_a_function_that_keeps_results_by_objects_runs_as_it_is() -> None:
    """As einops does it: the recipe for a pattern is an object, shapes are keys where they can be."""

    class Recipe:
        factor = 2

    @functools.lru_cache
    def recipe(pattern: str) -> Recipe:
        assert pattern
        return Recipe()

    def sizes(of: Recipe, shape: Any) -> list[Any]:
        return [size * of.factor for size in shape]

    keeping = functools.lru_cache(sizes)

    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            wide = keeping(recipe("a b"), x.shape)
        except TypeError:
            wide = sizes(recipe("a b"), x.shape)
        return x + self.f(x.repeat(2, 2).reshape(wide)[: x.shape[0], : x.shape[1]])

    model = nn.Sequential(Of(forward, f=Plain().f), Plain())
    assert [r.name for r in surgeon.find(model, X)] == ["0.add", "1.add"]
    assert keeping.cache_info().currsize <= 1  # of the real run of a size; of no trace


class Connection:
    """Something that hands out what arrives, and tells the other side when it ends."""

    ended = 0

    def __next__(self) -> str:
        return "data"

    def __del__(self) -> None:
        Connection.ended += 1


class Log:
    def __init__(self) -> None:
        self.to, self.lines = Connection(), sys.stderr


def test_connections_and_files_that_a_forward_can_reach_are_left_alone() -> None:
    log = Log()

    def forward(self: Any, x: Tensor) -> Tensor:
        assert [*map(id, vars(log).values())] == places  # no stand-in: other threads use them, too
        return x + self.f(x)

    places = [id(log.to), id(log.lines)]
    model = nn.Sequential(Of(forward, f=Plain().f), Plain())
    assert len(surgeon.find(model, X)) == 2
    gc.collect()
    assert Connection.ended == 0 and id(log.to) == places[0]
    model[0].source = log.to
    surgeon.apply(model, example=X)
    assert Connection.ended == 0 and model[0].source is log.to
