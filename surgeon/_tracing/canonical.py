"""One spelling for every addition: while a block is traced, its additions become ``a + b`` of two operands.

``torch.add(a, b, alpha=k)`` becomes ``a + b * k``, and ``a - b`` of two tensors that depend on an input
``a + b * -1``; ``addcmul(a, t, u, value=k)`` becomes ``a + t * u * k`` (``addcdiv`` likewise, and ``addmm``
and its like where ``a`` depends on an input); ``torch.stack([a, b, ...]).sum(dim)`` over the stacked
dimension becomes the chain ``a + b + ...``, its mean that chain over its length. In-place spellings stay in
place. The rest of surgeon then knows one form only. The values are the same to rounding; evaluation under the
default scaling runs the block's own forward in any case.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

SPELT = "spelt"
"""Where the ``meta`` of an addition's node says that it was written as something else, ``"-"``."""

Emit = Callable[..., Any]

_ADD = {torch.add: False, "add": False, "add_": True}
_FUSED: dict[Any, Any] = {
    **dict.fromkeys((torch.addcmul, "addcmul"), (operator.mul, False)),
    **dict.fromkeys((torch.addcdiv, "addcdiv"), (operator.truediv, False)),
    "addcmul_": (operator.mul, True),
    "addcdiv_": (operator.truediv, True),
}
_SUBTRACTS: dict[Any, bool] = {
    **dict.fromkeys((operator.sub, torch.sub, torch.subtract, "sub", "subtract"), False),
    **dict.fromkeys((operator.isub, "sub_", "subtract_"), True),
}
_PRODUCTS: dict[Any, bool] = {
    **dict.fromkeys((torch.addmm, torch.addmv, torch.baddbmm, "addmm", "addmv", "baddbmm"), False),
    **dict.fromkeys(("addmm_", "addmv_", "baddbmm_"), True),
}
_REDUCES = {torch.sum: False, "sum": False, torch.mean: True, "mean": True}
_NAMES = ("input", "other")


def canonical(emit: Emit, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The canonical form of one call, emitted; ``None`` if the call is no addition in another spelling.

    Args:
        emit: ``emit(target, args)`` puts one function call into the graph and returns its proxy.
        target: What is called: a function, or a method's name.
        args: Its positional arguments, proxies among them.
        kwargs: Its keyword arguments.
    """
    if target in _REDUCES:
        return _sum_of_stack(emit, _REDUCES[target], args, kwargs)
    if "out" in kwargs:
        return None
    if target is torch.rsub:
        return _subtract(emit, False, args[1::-1], dict(kwargs))
    tables: tuple[tuple[dict[Any, Any], Callable[..., Any]], ...] = (
        *((_ADD, _add), (_SUBTRACTS, _subtract)),
        *((_FUSED, _fused), (_PRODUCTS, _added_product)),
    )
    for table, rewrite in tables:
        if target in table:
            return rewrite(emit, table[target], args, dict(kwargs))
    return None


def _add(emit: Emit, in_place: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    alpha = kwargs.pop("alpha", 1)
    operands = [*args, *(kwargs[name] for name in _NAMES[len(args) :] if name in kwargs)]
    if len(operands) != 2:
        return None
    return _sum(emit, in_place, operands[0], _times(emit, operands[1], alpha))


def _subtract(emit: Emit, in_place: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    alpha = kwargs.pop("alpha", 1)
    operands = [*args, *(kwargs[name] for name in _NAMES[len(args) :] if name in kwargs)]
    if len(operands) != 2 or not all(map(_features, operands)):
        return None
    total = _sum(emit, in_place, operands[0], _times(emit, operands[1], -1 * alpha))
    total.node.meta[SPELT] = "-"
    return total


def _added_product(emit: Emit, in_place: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``beta * a + alpha * (t @ u)``; a bias that depends on no input is a part of its layer."""
    beta, alpha = kwargs.pop("beta", 1), kwargs.pop("alpha", 1)
    operands = [*args, *kwargs.values()]
    if len(operands) != 3 or not _features(operands[0]) or (in_place and beta != 1):
        return None
    product = emit(operator.matmul, (operands[1], operands[2]))
    return _sum(emit, in_place, _times(emit, operands[0], beta), _times(emit, product, alpha))


def _features(value: Any) -> bool:
    """Whether a value is a tensor of numbers that depends on an input of the model."""
    tensor = value.__dict__.get("value") if isinstance(value, fx.Proxy) else None
    plain = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return plain and bool(value.tracer.facts[value.node].active)


def _fused(
    emit: Emit, how: tuple[Callable[..., Any], bool], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    (op, in_place), value = how, kwargs.pop("value", 1)
    operands = [*args, *kwargs.values()]
    if len(operands) != 3:
        return None
    product = emit(op, (operands[1], operands[2]))
    return _sum(emit, in_place, operands[0], _times(emit, product, value))


def _sum(emit: Emit, in_place: bool, left: Any, right: Any) -> Any:
    return emit(operator.iadd if in_place else operator.add, (left, right))


def _times(emit: Emit, operand: Any, factor: Any) -> Any:
    return (
        operand if isinstance(factor, (int, float)) and factor == 1 else emit(operator.mul, (operand, factor))
    )


def _sum_of_stack(emit: Emit, mean: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``stack(terms, d).sum(d)`` as a chain of additions; ``mean`` divides it by their number."""
    stack = args[0].node if args and isinstance(args[0], fx.Proxy) else None
    if stack is None or stack.target is not torch.stack or len(args) > 2 or kwargs.keys() - {"dim", "axis"}:
        return None
    given: Any = stack.args[0] if stack.args else stack.kwargs["tensors"]
    over = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    along = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    rank = args[0].value.ndim
    if isinstance(over, (tuple, list)) and len(over) == 1:
        over = over[0]
    if not (isinstance(over, int) and isinstance(along, int) and over % rank == along % rank):
        return None
    terms = _terms(emit, args[0].tracer, given)
    if len(terms) < 2:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = emit(operator.add, (total, term))
    return emit(operator.truediv, (total, len(terms))) if mean else total


def _terms(emit: Emit, tracer: Any, given: Any) -> list[Any]:
    """The tensors of a list, which is written out or is itself a value of the graph (an argument, say)."""
    if not isinstance(given, fx.Node):
        return [tracer.proxy_of(term) for term in given]
    nest = tracer.proxy_of(given)
    return [emit(operator.getitem, (nest, i)) for i in range(len(nest.value))]
