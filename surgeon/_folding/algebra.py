r"""The algebra of the fold: what a positive scale on one value does to the others.

Give every value ``v`` of the flat model an integer exponent ``e(v)``: after the fold the
value is ``s ** e(v)`` times what it was, for one fixed scale ``s > 0``. An operator is exact under such a
rescaling if and only if the exponents around it satisfy its law. All laws here are linear equations:

====================================  =======================================  =======================
operator                              why it is exact                          law
====================================  =======================================  =======================
view, permute, slice, pool, mean,     homogeneous: ``f(s x) = s f(x)``         ``e(y) = e(x)``
ReLU, LeakyReLU, PReLU, abs, pad 0
add, cat, stack, where, maximum       ``s a + s b = s (a + b)``                ``e(y) = e(a) = e(b)``
mul, matmul, convolution, einsum      bilinear: ``(s a)(t b) = s t (a b)``     ``e(y) = e(a) + e(b)``
bias of a convolution, ``addmm``      added to the product                     ``e(b) = e(y)``
div                                   ``(s a) / (t b) = (s / t)(a / b)``       ``e(y) = e(a) - e(b)``
pow k, sqrt, rsqrt, reciprocal        ``(s x) ** k = s ** k x ** k``           ``e(y) = k e(x)``
batch, layer, group, RMS norm         linear in the affine part; an epsilon    ``e(y) = e(w) = e(b)``,
                                      in the statistics holds the input fast   ``e(x) = 0``
attention                             linear in the values, a softmax of       ``e(y) = e(v)``,
                                      the rest                                 ``e(q) = e(k) = 0``
comparison with 0, argmax, sign       blind to a positive scale                ``e(y) = 0``
a tensor of zeros                     ``s 0 = 0``                              none
everything else: SiLU, GELU, ReLU6,   no law known, or none that is exact      all exponents 0
sigmoid, softmax, clamp, exp
====================================  =======================================  =======================

Constants, buffers and the model's inputs and outputs have exponent 0. A Parameter is a free unknown, one
for all its uses: a tied weight is consistent by construction or there is no solution. The gate whose scale
is pushed asks for ``e = 1`` on its branch and ``e = 0`` behind it.

What would otherwise be a list of special cases follows from these laws alone. In a weight-standardised
convolution the raw weight enters a normalisation, so only gain and bias can take the scale. At the end of
squeeze-and-excitation ``x * sigmoid(f(pool(x)))`` the sigmoid wants 0 on its argument, so a scaled ``x``
asks for ``s ** -1`` on the first weight of ``f``. In a ghost module the cheap convolution reads the scaled
primary features and its norm wants exponent 0, so its weight takes ``s ** -1``. In ``w = g v / |v|`` only
``g`` can take it, and in spectral normalisation ``w / sigma(w)`` nothing can.

Each rule below is a pure function from one call to its laws; ``surgeon._folding.operators`` says whose laws
they are, and ``surgeon._folding.search`` solves them.
"""

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from numbers import Number
from typing import Any, NamedTuple

from surgeon._folding.recorder import OpCall, Value
from surgeon._tracing.aten import named

NO_SCALE = "does not commute with a scale"


class Law(NamedTuple):
    """``sum of coefficient * e(value) = 0``; ``why`` is for a law that forbids a scale on one value."""

    terms: tuple[tuple[Value, int], ...]
    why: str = NO_SCALE


Laws = Iterable[Law]
Rule = Callable[[OpCall], Laws]


# The forms a law can take.


def equal(values: Iterable[Any]) -> Laws:
    """All tensors among ``values`` have the same exponent."""
    tensors = [value for value in values if isinstance(value, Value)]
    return [Law(((tensors[0], 1), (other, -1))) for other in tensors[1:]]


def zero(values: Iterable[Any], why: str = NO_SCALE) -> Laws:
    """No tensor among ``values`` may be scaled."""
    return [Law(((value, 1),), why) for value in values if isinstance(value, Value)]


def product(out: Value, *factors: Any) -> Laws:
    """The exponents of the factors add up; a factor that is a number or absent counts nothing."""
    return [Law(((out, 1), *((factor, -1) for factor in factors if isinstance(factor, Value))))]


def power(out: Value, base: Any, exponent: Fraction) -> Laws:
    """``out = base ** exponent``."""
    return [Law(((out, exponent.denominator), (base, -exponent.numerator)))]


# Rules: from a call to its laws.


def nothing(call: OpCall) -> Laws:
    """No law is known: nothing around the call may be scaled."""
    return zero((*call.outputs, *call.inputs), NO_SCALE if call.inputs else "makes a constant")


def carries(call: OpCall) -> Laws:
    """Homogeneous in its first tensor; the others (indices, slopes, places to sample at) stay as they are."""
    first, *others = call.inputs
    out, *indices = call.outputs
    return [*equal((first, out, *(value for value in indices if value.scalable))), *zero(others)]


def leaks(call: OpCall) -> Laws:
    """A ReLU, leaky or not; the slope may be random, and in evaluation is its mean."""
    return nothing(call) if call.arguments.get("training") else carries(call)


def joins(call: OpCall) -> Laws:
    """Homogeneous in all its tensors together; an index that comes out besides does not see the scale."""
    return equal((*call.inputs, *(value for value in call.outputs if value.scalable)))


def multiplies(call: OpCall) -> Laws:
    """Linear in each of its tensors."""
    return product(call.outputs[0], *call.inputs)


def adds(call: OpCall) -> Laws:
    """A sum or difference; a number other than 0 on one side is a constant that cannot be scaled."""
    if any(_is_number(call.arguments.get(side)) and call.arguments[side] for side in ("self", "other")):
        return zero((*call.outputs, *call.inputs), "adds a constant")
    return joins(call)


def selects(call: OpCall) -> Laws:
    """``where``: entries of two sides, either of which may be zeros."""
    sides = call.arguments["self"], call.arguments["other"]
    if not all(isinstance(side, Value) or is_scale_free(side) for side in sides):
        return nothing(call)
    return equal((call.outputs[0], *sides))


_NOT_HOMOGENEOUS = ("prod", "multiply")


def writes(call: OpCall) -> Laws:
    """Entries of one tensor replaced by, or summed with, those of another or a number."""
    args = call.arguments
    new = next(args[name] for name in ("src", "source", "values", "value") if name in args)
    if args.get("reduce") in _NOT_HOMOGENEOUS or not (isinstance(new, Value) or is_scale_free(new)):
        return nothing(call)
    return equal((call.outputs[0], args["self"], new))


def divides(call: OpCall) -> Laws:
    """A quotient without rounding."""
    if call.arguments.get("rounding_mode") is not None:
        return nothing(call)
    over, under = call.arguments["self"], call.arguments["other"]
    terms = [(call.outputs[0], 1)] + [(v, c) for v, c in ((over, -1), (under, 1)) if isinstance(v, Value)]
    return [Law(tuple(terms))]


def affine(call: OpCall) -> Laws:
    """A product of two arguments plus a third: convolution, ``addmm`` and their kin."""
    args, out = call.arguments, call.outputs[0]
    added = "bias" if "bias" in args else "self"
    factors = [args[name] for name in args if name != added]
    return [*product(out, *factors), *equal((out, args[added]))]


def normalises(call: OpCall) -> Laws:
    """A normalisation: the statistics hold an epsilon, so its input stays; its affine part scales."""
    args, out = call.arguments, call.outputs[0]
    others = [args.get(name) for name in ("input", "running_mean", "running_var")]
    pinned = [*zero(others, "normalises what it reads"), *zero(call.outputs[1:])]
    if not isinstance(args["weight"], Value):
        return [*pinned, *zero((out, args.get("bias")), "has no weight of its own to take a scale")]
    return [*pinned, *equal((out, args["weight"], args.get("bias")))]


def normalises_by_buffers(call: OpCall) -> Laws:
    """An evaluating batch norm whose running mean may be scaled with its input; see `_folding.freed`."""
    args, out = call.arguments, call.outputs[0]
    pinned = zero((args["running_var"], *call.outputs[1:]))
    moved = equal((args["input"], args["running_mean"]))
    return [*pinned, *moved, *product(out, args["input"], args["weight"]), *equal((out, args["bias"]))]


def weight_norm(call: OpCall) -> Laws:
    """``w = g v / |v|`` without an epsilon: ``g`` carries the scale."""
    out, norms = call.outputs
    return [*equal((out, call.arguments["g"])), *equal((norms, call.arguments["v"]))]


def attends(call: OpCall) -> Laws:
    """Fused attention: linear in the values, a softmax in queries, keys and bias."""
    value, out = call.arguments["value"], call.outputs[0]
    rest = [v for v in (*call.inputs, *call.outputs[1:]) if v != value]
    return [*equal((out, value)), *zero(rest)]


def deforms(call: OpCall) -> Laws:
    """A deformable convolution: a product of input, weight and mask, at offsets that stay."""
    args, out = call.arguments, call.outputs[0]
    mask = args["mask"] if args["use_mask"] else None
    pinned = zero((args["offset"], None if args["use_mask"] else args["mask"]))
    return [*product(out, args["input"], args["weight"], mask), *equal((out, args["bias"])), *pinned]


def adds_product(call: OpCall) -> Laws:
    """``addcmul`` and ``addcdiv``: a tensor plus a product or quotient of two."""
    args, out = call.arguments, call.outputs[0]
    sign = 1 if "addcmul" in call.name else -1
    terms = ((out, 1), (args["tensor1"], -1), (args["tensor2"], -sign))
    return [*equal((out, args["self"])), Law(terms)]


_EXPONENTS = {"sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "reciprocal": -1, "square": 2}


def raises(call: OpCall) -> Laws:
    """A power with a constant rational exponent."""
    base = call.arguments["self"]
    exponent = call.arguments.get("exponent", _EXPONENTS.get(named(call.name)))
    if not isinstance(base, Value) or isinstance(exponent, Value) or not math.isfinite(exponent):
        return nothing(call)
    exact = Fraction(exponent).limit_denominator(8)
    return power(call.outputs[0], base, exact) if exact == exponent else nothing(call)


def deviates(call: OpCall) -> Laws:
    """The standard deviation or the variance, alone or before the mean."""
    spread, *mean = call.outputs
    exponent = Fraction(1 if "std" in call.name else 2)
    return [*power(spread, call.inputs[0], exponent), *equal((call.inputs[0], *mean))]


def views(call: OpCall) -> Laws:
    """The same numbers in another form, unless their bits are taken for another type."""
    return carries(call) if call.arguments.get("dtype") is None else nothing(call)


def compares(call: OpCall) -> Laws:
    """A truth value: blind to a scale on both sides, or on one against 0."""
    other = call.arguments.get("other")
    if _is_number(other) and other:
        return nothing(call)
    return equal(call.inputs)


def ignores(call: OpCall) -> Laws:
    """The result does not see a positive scale on what is read (an index, a sign, a shape)."""
    return zero(call.outputs)


def fills(call: OpCall) -> Laws:
    """A new tensor of one number, or of none in particular; zeros carry any scale."""
    number = call.arguments.get("fill_value", call.arguments.get("value", call.arguments.get("s")))
    return [] if is_scale_free(number) else zero((*call.outputs, number), "is a constant")


def pads(call: OpCall) -> Laws:
    """Padding by 0 or infinity carries a scale, by another number not."""
    return carries(call) if is_scale_free(call.arguments.get("value", 0)) else nothing(call)


def clamps(call: OpCall) -> Laws:
    """A clamp whose bounds are all absent, 0 or infinite; ReLU is one, ReLU6 is not."""
    names = ("min", "max", "min_val", "max_val", "threshold", "value")
    bounds = [call.arguments.get(name) for name in names]
    free = all(isinstance(one, Value) or is_scale_free(one) for one in bounds)
    return joins(call) if free else nothing(call)


def copies(call: OpCall) -> Laws:
    """``copy(self, src)``: the content of ``src`` in the form of ``self``."""
    return equal((call.outputs[0], call.arguments["src"]))


def looks_up(call: OpCall) -> Laws:
    """An embedding: rows of its weight."""
    return equal((call.outputs[0], call.arguments["weight"]))


def interpolates(call: OpCall) -> Laws:
    """``lerp``: between two tensors, by a number or a tensor that stays."""
    args = call.arguments
    return [*equal((call.outputs[0], args["self"], args["end"])), *zero((args["weight"],))]


def norm_of(call: OpCall) -> Laws:
    """A vector norm of positive order."""
    order = call.arguments.get("ord", call.arguments.get("p"))
    return carries(call) if order is None or order > 0 else nothing(call)


def _is_number(argument: Any) -> bool:
    return isinstance(argument, Number)


def is_scale_free(number: Any) -> bool:
    """Numbers that a positive scale leaves as they are."""
    return number is None or (_is_number(number) and number in (0, math.inf, -math.inf))
