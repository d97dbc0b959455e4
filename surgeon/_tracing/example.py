"""The example a model is recorded on: what the user gave, or what the model says of its own input."""

import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._torch import pytree
from surgeon._tracing.outside import nothing_left_outside
from surgeon.errors import UsageError

Example = Tensor | tuple[Any, ...] | Mapping[str, Any] | None

_NESTS = (list, dict, set, deque)
_ATOMS = {type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size}
_BATCH = 2
_DEFAULT_SIZE = (3, 224, 224)


def inputs(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turns an example into positional and keyword arguments; the model is only read.

    Args:
        model: The model that will be called.
        example: A tensor (the only argument), a tuple of positional arguments or a mapping of keyword
            arguments. ``None`` makes a batch of two zeros of the size in ``model.pretrained_cfg``
            (timm), else 3 x 224 x 224, in the model's own dtype and on its device.

    Raises:
        UsageError: The example is of another type.
    """
    if example is None:
        return (default_input(model),), {}
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise UsageError(
        f"example is a {type(example).__name__}; give a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments"
    )


def default_input(model: nn.Module) -> Tensor:
    """A batch of two zeros of the input size that the model declares, else 3 x 224 x 224."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    shape = tuple(size) if size else _DEFAULT_SIZE
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype, device = (torch.float32, torch.device("cpu")) if like is None else (like.dtype, like.device)
    return torch.zeros(_BATCH, *shape, dtype=dtype, device=device)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists, dicts and dataclasses known to pytree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    kind = type(tree)
    if kind in _ATOMS:
        return
    if isinstance(tree, Tensor):
        found.append(tree)
    elif kind is tuple or kind is list:
        for item in tree:
            _collect(item, found)
    elif kind is dict:
        for item in tree.values():
            _collect(item, found)
    else:
        found += [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def mapped(of: Callable[[Any], Any], tree: Any) -> Any:
    """The nest with ``of(leaf)`` in the place of each leaf, as pytree's ``tree_map``; quick."""
    kind = type(tree)
    if kind in _ATOMS or isinstance(tree, Tensor):
        return of(tree)
    if kind is tuple:
        return tuple([mapped(of, item) for item in tree])
    if kind is list:
        return [mapped(of, item) for item in tree]
    if kind is dict:
        return {key: mapped(of, item) for key, item in tree.items()}
    return pytree.tree_map(of, tree)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets every module's ``training`` flag inside the block and restores each one afterwards.

    The flags are assigned directly: some models override ``train()`` with side effects.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the state of PyTorch's, Python's and NumPy's global random number generators afterwards."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Keeps autocast from remembering casts of weights: real and fake ones must not meet in its cache."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """Leaves inference mode inside, whose tensors have no version counters; the grad mode stays as it is."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restores every module's attributes afterwards, and what lists, dicts, sets and objects in them hold.

    A forward may store tensors on its module (LeViT caches its attention bias in evaluation) or outside, or
    give a weight other memory (``weight.data = ...``); what an analysis on fake tensors leaves must not stay.
    """
    memory = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t)]
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    nests: dict[int, tuple[Any, list[Any]]] = {}
    for _, attributes in before:
        # What a gated block learns while one looks at it stays.
        _note([v for name, v in attributes.items() if name != "_surgeon"], nests, depth=3)
    try:
        with nothing_left_outside(model):
            yield
    finally:
        for module, attributes in before:
            if not _same(_items(module.__dict__), _items(attributes)):
                # At one stroke: another thread that runs the module must never find it bare.
                object.__setattr__(module, "__dict__", attributes)
        for nest, items in nests.values():
            _put_back(nest, items)
        for tensor, data in memory:
            if not _same_memory(tensor, data):
                tensor.data = data


def _same_memory(tensor: Tensor, data: Tensor) -> bool:
    try:
        return tensor.is_set_to(data)
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return True


def _note(values: Iterable[Any], nests: dict[int, tuple[Any, list[Any]]], depth: int) -> None:
    for value in values:
        nest, inside = (value, depth - 1) if isinstance(value, _NESTS) else (_held_in(value), depth - 2)
        if nest is not None and id(nest) not in nests and inside >= 0:
            nests[id(nest)] = nest, _items(nest)
            if nest and inside:
                _note(nest.values() if isinstance(nest, dict) else nest, nests, inside)


def _held_in(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of some class of the user's (a cache, a configuration)."""
    known = value is None or isinstance(value, (bool, int, float, str, tuple, type, types.ModuleType))
    if known or isinstance(value, (Tensor, nn.Module)) or callable(value):
        return None
    return getattr(value, "__dict__", None)


def _items(nest: Any) -> list[Any]:
    return [*nest.keys(), *nest.values()] if isinstance(nest, dict) else list(nest)


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _put_back(nest: Any, items: list[Any]) -> None:
    """Where something has changed only: a class of one's own (diffusers' FrozenDict) may forbid to write."""
    if _same(_items(nest), items):
        return
    nest.clear()
    if isinstance(nest, (list, deque)):
        nest.extend(items)
    else:
        half = len(items) // 2
        nest.update(zip(items[:half], items[half:], strict=True) if isinstance(nest, dict) else items)
