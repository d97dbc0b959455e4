"""Arguments of a call without their numbers: to make it again later, and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon._torch import pytree
from surgeon._tracing.state import PLAIN, kind

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Form:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def forms(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """The arguments, forms in place of tensors; None where they hold objects, which would be kept alive."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return None
    found = [Form(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    made: Arguments = pytree.tree_unflatten(found, spec)
    return made


def zeros(
    made: Arguments, device: torch.device, cast: tuple[torch.dtype | None, torch.dtype] | None = None
) -> Arguments:
    """Arguments of those forms; tensors are zeros on ``device``.

    Args:
        made: The forms.
        device: Where the tensors lie.
        cast: A type that the model's weights had, and the one that they have now; tensors follow.
    """

    def filled(form: Form) -> Tensor:
        dtype = cast[1] if cast and form.dtype == cast[0] else form.dtype
        return torch.zeros(form.shape, dtype=dtype, device=device)

    arguments: Arguments = pytree.tree_map_only(Form, filled, made)
    return arguments


def spoken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The arguments of a call in words, tensors by shape, type and device."""
    return ", ".join([str(kind(a, True)) for a in args] + [f"{k}={kind(v, True)}" for k, v in kwargs.items()])


def leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the arguments of a call, with its place in words."""
    found, _ = pytree.tree_flatten_with_path((args, kwargs))
    return ((pytree.keystr(path), leaf) for path, leaf in found if isinstance(leaf, Tensor))
