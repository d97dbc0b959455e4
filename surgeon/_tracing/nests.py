"""Nests: tuples, lists, dicts and dataclasses of tensors and other values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgeon._torch import pytree

_ATOMS = {type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size}


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
