"""Nests: tuples, lists, dicts and dataclasses of tensors and other values."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict, immutable_list

from surgeon._torch import pytree
from surgeon._tracing.state import held_by

_ATOMS = {type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size}
_PLAIN = {*_ATOMS, dict, list, tuple, immutable_dict, immutable_list}


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


def parts(nest: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the class of a nest makes another one like it of; None for plain ones, and what is none."""
    kind = type(nest)
    if kind in _PLAIN:
        return None
    if is_dataclass(nest) and not isinstance(nest, type):
        return (), {f.name: getattr(nest, f.name) for f in fields(nest)}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return tuple(nest), {}
    base = next((one for one in (dict, list, tuple) if isinstance(nest, one)), None)
    return None if base is None else ((base(nest),), {})


def alike(nest: Any, other: Any) -> bool:
    """Whether two nests of one class have as many items, and the same attributes."""
    counts = [len(one) if isinstance(one, (dict, list, tuple)) else 0 for one in (nest, other)]
    return counts[0] == counts[1] and held_by(nest).keys() == held_by(other).keys()


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
