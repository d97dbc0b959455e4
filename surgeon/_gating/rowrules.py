"""Which operators keep the rows of a batch apart, where the shapes of their results do not tell.

The rows are a prime number, so a dimension holds them if that number divides its size. Reductions, products
and slices betray mixing by their shapes, and operators per element mix nothing. The rest work along
dimensions, and `RULES` says for each family of operators along which. An operator of no family is taken to
mix: its branch is masked.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon._tracing.aten import Family, answers, family

PRIME = 10007  # no network has a width or a resolution that it divides
UNKNOWN = "uses an operator that is not known to keep rows apart"


@dataclass(frozen=True, slots=True)
class _Call:
    """An operator's call: its arguments by name, and the first of them that depends on the rows."""

    given: dict[str, Any]
    first: Tensor
    active: Callable[[Tensor], bool]

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name)


def hazard(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], active: Callable[[Tensor], bool]) -> str:
    """What an operator does to rows that its results' shapes do not show; ``""`` if nothing.

    Args:
        func: The operator, an overload.
        args: What it was called with,
        kwargs: by place and by name.
        active: Whether a tensor depends on the rows.
    """
    kind = family(func)
    rule = RULES[kind] if kind else _shown if torch.Tag.pointwise in func.tags else None
    first = next((t for t in _tensors(args) if active(t)), None)
    if rule is _shown or first is None:
        return ""
    if rule is None:
        return UNKNOWN
    given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return "works along the dimension of the rows" if rule(_Call(given, first, active)) else ""


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _rows(size: int) -> bool:
    return size % PRIME == 0


def _shown(_: _Call) -> bool:
    """What the operator does to rows shows in the shapes."""
    return False


def _along(call: _Call) -> bool:
    named = call["dims"] if call["dim"] is None else call["dim"]
    if named is None or named == []:
        return True
    named = [named] if isinstance(named, int) else list(named)
    return call.first.ndim > 0 and any(_rows(call.first.shape[d]) for d in named)


def _spatial(call: _Call) -> bool:
    return any(_rows(size) for size in call.first.shape[2:])


def _convolution(call: _Call) -> bool:
    channels = call["input"].shape[1]
    return any(_rows(s) for s in call["input"].shape[2:]) or (_rows(channels) and not _rows(call["groups"]))


def _layer_norm(call: _Call) -> bool:
    return any(_rows(size) for size in call["normalized_shape"])


def _group_norm(call: _Call) -> bool:
    return not _rows(call["N"]) and not _rows(call["group"])


def _attention(call: _Call) -> bool:
    return any(_rows(s) for name in ("query", "key", "value") for s in call[name].shape[-2:])


def _index(call: _Call) -> bool:
    """Picks entries of a tensor by number: of rows, perhaps in another order."""
    picked = call["self"]
    named = [d for d, index in enumerate(call["indices"]) if index is not None]
    return call.active(picked) and any(_rows(picked.shape[d]) for d in named)


def _recurrent(call: _Call) -> bool:
    """Runs along the first dimension or the second; MKL-DNN always along the first."""
    second = call["batch_first"] and "hx_" not in call.given
    return _rows(call["input"].shape[1 if second else 0])


def _table(call: _Call) -> bool:
    return call.active(call["weight"])


def _matrix(call: _Call) -> bool:
    return any(_rows(size) for size in call.first.shape[-2:])


def _view(call: _Call) -> bool:
    """A reshaping that moves the rows to another place, as ``(rows, 4)`` to ``(4, rows)``, scrambles them."""
    size = [s if s != -1 else _missing(call.first, call["size"]) for s in call["size"]]
    before, after = _place(call.first.shape), _place(size)
    return None not in (before, after) and before != after


def _missing(first: Tensor, size: Iterable[int]) -> int:
    rest = 1
    for s in size:
        rest *= s if s != -1 else 1
    return first.numel() // max(rest, 1)


def _place(shape: Iterable[int]) -> int | None:
    """How many entries lie between one row and the next, if a dimension is that of the rows alone."""
    sizes, between = list(shape), 1
    for size in reversed(sizes):
        if size == PRIME:
            return between
        between *= size
    return None


Rule = Callable[[_Call], bool]

RULES: dict[Family, Rule | None] = answers(
    (
        _shown,
        """EMPTIES ZEROS ONES FILLS NOISE DRAWS COINS AXES DIMS PARTS COPIES COMPLEX STACKS ERASES ASSIGNS
        MASKS CHOICES RELUS LEAKY CLAMPS SQUASHES SMOOTH ROUNDINGS COMPARISONS SIGNS POWERS PAIRS SUMS
        DIFFERENCES PRODUCTS QUOTIENTS FUSED LERPS DROPOUTS MATMULS AFFINE TRILINEAR BATCH_NORMS REDUCTIONS
        TOTALS EXTREMES INDICES DEVIATIONS LENGTHS QUESTIONS""",
    ),
    (_along, "SHIFTS GATHERS CATS SCATTERS MERGES CROSS SOFTMAXES RUNNING_SUMS RUNNING ORDERED FOURIER"),
    (_spatial, "PADS RESIZES MEAN_POOLS ADAPTIVE_POOLS MAX_POOLS REARRANGED SAMPLES DEFORMED"),
    (_view, "FORMS"),
    (_convolution, "CONVOLUTIONS"),
    (_layer_norm, "LAYER_NORMS"),
    (_group_norm, "GROUP_NORMS"),
    (_attention, "ATTENTION"),
    (_index, "PICKS PUTS"),
    (_matrix, "TRIANGLES"),
    (_table, "TABLES"),
    (_recurrent, "RECURRENT"),
    # Where rows end up depends on strides, on a mask, or on numbers among the arguments.
    (None, "STRIDES PACKED REGIONS WEIGHT_NORMS"),
)
