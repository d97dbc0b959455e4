"""The fold: evaluation scales written into the branches' own parameters, exactly.

Under ``scaling="paper"`` every gate evaluates ``shortcut + c * branch(x)`` with a constant ``c > 0``.
``plan`` finds, without touching the model, which parameters to multiply by which power of ``c`` so that
each branch yields ``c * branch(x)`` by itself; ``commit`` multiplies them. The laws behind the plan are
those of ``surgeon._folding.algebra``.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._folding.balance import Balance, independent_of_inputs
from surgeon._folding.flat import Flat, flatten
from surgeon._folding.freed import INVERTIBLE, freed
from surgeon._folding.recorder import OpCall
from surgeon._folding.rows import by_rows
from surgeon._folding.search import Exponents, NoSolution, described, solve, spoken
from surgeon._folding.state import memory_of, repeats
from surgeon._mark import MARK
from surgeon.errors import FoldError


@dataclass(frozen=True, slots=True)
class Product:
    """Multiply one parameter by ``scale[gate] ** exponent``."""

    parameter: str
    """The parameter's name, the first of them if it is tied; or that of a batch norm's running mean."""
    gate: str
    exponent: int
    rows: tuple[int, int] | None = None
    """First row and the row after the last, counted along ``dim``; None for the whole parameter."""
    dim: int = 0
    through: str = ""
    """What is multiplied is this function of the parameter, such as ``"sigmoid"``."""
    also: tuple[str, ...] = field(default=(), compare=False)
    """Its other names, of which some may be Parameters of their own over the same memory."""

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"[{':, ' * self.dim}{self.rows[0]}:{self.rows[1]}]"
        power = "" if self.exponent == 1 else f" ** {self.exponent}"
        what = f"{self.parameter}{rows}"
        return f"gate {self.gate}: {f'{self.through}({what})' if self.through else what} *= scale{power}"


@dataclass(frozen=True, slots=True)
class Kept:
    """A gate whose scale no parameter can take; it keeps its multiplication."""

    gate: str
    reason: str
    operator: str = field(default="", compare=False)
    """The operator to blame, such as ``"silu"``; empty if it is none."""
    module: str = field(default="", compare=False)
    """Name of the module that the operator ran in."""

    def __str__(self) -> str:
        return f"gate {self.gate}: kept, {self.reason}"


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What a fold would do to a model's parameters, gate by gate."""

    products: tuple[Product, ...]
    kept: tuple[Kept, ...]
    together: tuple[tuple[str, ...], ...] = ()
    """Gates that share parameters and fold only because their scales are the same number."""

    @property
    def folded(self) -> tuple[str, ...]:
        """The gates that the products take out, those that fold together beside one another."""
        groups = {group[0]: group for group in self.together}
        leads = dict.fromkeys(product.gate for product in self.products)
        return tuple(gate for lead in leads for gate in groups.get(lead, (lead,)))

    def __str__(self) -> str:
        counts = len(self.folded), len(self.products), len(self.kept)
        head = "{} gates fold into {} parameters, {} keep a factor".format(*counts)
        return "\n".join([head, *map(str, self.products), *map(str, self.kept)])


def plan(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], scales: Mapping[str, float]
) -> FoldPlan:
    """Find the parameters that can take each gate's scale; the model is not changed.

    Args:
        model: A model whose gates pass their branch results through ``torch.ops.surgeon.mark``.
        args: Positional arguments of one call of the model; no arithmetic is done on them.
        kwargs: Keyword arguments of the same call.
        scales: For each gate to fold its scale, finite and above 0. The plan holds for any other scales
            as well, as long as gates that fold together keep equal ones.

    Raises:
        FoldError: A scale is not a positive number, or the model cannot run on the arguments.
    """
    for gate, scale in scales.items():
        if not (math.isfinite(scale) and scale > 0):
            raise FoldError(f"gate {gate} has the scale {scale}; only a finite scale above 0 can be folded")
    return plan_flat(flatten(model, args, kwargs), scales)


def plan_flat(flat: Flat, scales: Mapping[str, float]) -> FoldPlan:
    """The plan for a model already flattened.

    Each gate alone, then gates of equal scale that get into each other's way, then what is still refused
    on the model taken apart by rows, at last with functions of parameters in place of the parameters.
    """
    balance, decided = Balance(flat), _decided(flat)
    answers = {gate: decided.get(gate) or _solved(balance, gate) for gate in scales}
    together = []
    for group in _related(answers, scales):
        result = solve(balance, frozenset(group))
        if not isinstance(result, NoSolution):
            answers.update({gate: {} for gate in group} | {group[0]: result})
            together.append(group)
    products = _products(flat, answers)
    refused = {gate: answer for gate, answer in answers.items() if isinstance(answer, NoSolution)}
    if any(gate in balance.marks for gate in refused):
        apart = by_rows(flat)
        for view in (apart, freed(flat), freed(apart)):
            done = products.keys() | decided.keys()
            products |= _further_products(view, [gate for gate in refused if gate not in done])
    kept = tuple(_kept(gate, answer) for gate, answer in refused.items() if gate not in products)
    return FoldPlan(
        tuple(product for gate in scales for product in products.get(gate, ())), kept, tuple(together)
    )


def _kept(gate: str, refusal: NoSolution) -> Kept:
    call = refusal.call
    return Kept(gate, refusal.reason, spoken(call) if call else "", call.module if call else "")


def _decided(flat: Flat) -> dict[str, NoSolution]:
    """The gates in whose blocks activations decide what runs: a mixture of experts, say.

    Such a model has run on real numbers, and what they did not choose was not seen.
    """
    fixed, refused = independent_of_inputs(flat), dict[str, NoSolution]()
    deciding: list[OpCall] = []
    for call in flat.calls:
        if call.decides and not fixed.issuperset(call.inputs):
            deciding.append(call)
        if call.name == MARK:
            inside = next((earlier for earlier in deciding if _is_in(earlier.module, call.module)), None)
            if inside is not None:
                why = f"values decide what runs ({described(inside)}), so other inputs may use other weights"
                refused.setdefault(call.arguments["gate"], NoSolution(why, frozenset(), inside))
    return refused


def _is_in(module: str, block: str) -> bool:
    return not block or module == block or module.startswith(f"{block}.")


def _solved(balance: Balance, gate: str) -> Exponents | NoSolution:
    if gate not in balance.marks:
        return NoSolution("the model's forward did not pass it", frozenset())
    return solve(balance, frozenset([gate]))


def _further_products(flat: Flat, gates: Iterable[str]) -> dict[str, list[Product]]:
    """Steps for those gates that fold on another view of the model."""
    balance = Balance(flat)
    answers = {gate: _solved(balance, gate) for gate in gates}
    return _products(flat, answers)


def _related(
    answers: Mapping[str, Exponents | NoSolution], scales: Mapping[str, float]
) -> list[tuple[str, ...]]:
    """Refused gates of equal scale that tried to write the same parameters."""
    groups: list[tuple[float, set[str], set[object]]] = []
    for gate, result in answers.items():
        if not isinstance(result, NoSolution) or not result.tried:
            continue
        gates, tried = {gate}, set[object](result.tried)
        for other in [g for g in groups if g[0] == scales[gate] and not g[2].isdisjoint(tried)]:
            groups.remove(other)
            gates, tried = gates | other[1], tried | other[2]
        groups.append((scales[gate], gates, tried))
    return [tuple(gate for gate in answers if gate in gates) for _, gates, _ in groups if len(gates) > 1]


def _products(flat: Flat, answers: Mapping[str, Exponents | NoSolution]) -> dict[str, list[Product]]:
    """What the exponents of each gate that has some come to."""
    products = {}
    for gate, exponents in answers.items():
        if not isinstance(exponents, NoSolution):
            sources = [(flat.parameters[value], exponent) for value, exponent in exponents.items()]
            products[gate] = [
                Product(s.names[0], gate, exponent, s.rows, s.dim, s.through, s.names[1:])
                for s, exponent in sources
            ]
    return products


def commit(model: nn.Module, plan: FoldPlan, scales: Mapping[str, float]) -> None:
    """Multiply the parameters of ``model`` in place, as the plan says; all of them or none.

    The products are taken in float64 and rounded once to the parameter's own type. The Parameters stay
    the objects they are.

    Args:
        model: The model the plan was made for, or a copy of it.
        plan: From ``plan``.
        scales: A scale above 0 for each gate in the plan's products.

    Raises:
        FoldError: A scale or a parameter is missing, a parameter is not finite, or a product does not fit
            the parameter's type. Nothing was changed.
    """
    _check_scales(plan, scales)
    grouped = _by_parameter(plan)
    work = {name: _parameters(model, (name, *products[0].also)) for name, products in grouped.items()}
    for name, tensors in work.items():
        for tensor in tensors:
            _check_product(name, tensor.detach(), _scaled(tensor, grouped[name], scales))
    with torch.no_grad():
        for name, tensors in work.items():
            for tensor in tensors:
                tensor.copy_(_scaled(tensor, grouped[name], scales))


def check_products(plan: FoldPlan, scales: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
    """Check that every product of a plan is finite and keeps its digits; nothing is changed.

    Args:
        plan: From ``plan``.
        scales: A scale above 0 for each gate in the plan's products.
        tensors: The values of the parameters in the plan, and any others.

    Raises:
        FoldError: As for ``commit``.
    """
    for name, products in _by_parameter(plan).items():
        old = tensors[name].detach()
        _check_product(name, old, _scaled(old, products, scales))


def _check_scales(plan: FoldPlan, scales: Mapping[str, float]) -> None:
    for gate in plan.folded:
        scale = scales.get(gate)
        if scale is None:
            raise FoldError(f"the plan folds gate {gate}, but no scale was given for it")
        if not (math.isfinite(scale) and scale > 0):
            raise FoldError(f"gate {gate} has the scale {scale}; only a finite scale above 0 can be folded")
    for group in plan.together:
        if len({scales[gate] for gate in group}) > 1:
            raise FoldError(
                f"the gates {', '.join(group)} share weights and fold only with equal scales; make a new plan"
            )


def _by_parameter(plan: FoldPlan) -> dict[str, list[Product]]:
    grouped: dict[str, list[Product]] = {}
    for product in plan.products:
        grouped.setdefault(product.parameter, []).append(product)
    return grouped


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name.

    Raises:
        FoldError: The model has none of that name.
    """
    where, _, own = name.rpartition(".")
    try:
        tensor: Tensor = getattr(model.get_submodule(where), own)
    except AttributeError as error:
        raise FoldError(f"the model has no parameter {name!r}; the plan was made for another one") from error
    return tensor


def _parameters(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """What some names stand for, each piece of memory once: a copy of a model has Parameters taken apart."""
    parameters: dict[object, Tensor] = {}
    for name in names:
        parameter = tensor_named(model, name)
        if parameter.is_meta or parameter.is_inference():
            raise FoldError(
                f"the parameter {name!r} cannot be written: it is on the meta device or an inference tensor"
            )
        if repeats(parameter):
            raise FoldError(
                f"the parameter {name!r} cannot be written: several of its entries are one number in memory"
            )
        parameters.setdefault(memory_of(parameter), parameter)
    return list(parameters.values())


def _scaled(parameter: Tensor, products: list[Product], scales: Mapping[str, float]) -> Tensor:
    """The parameter times its factors in float64 or complex128, on the CPU: not every device has them."""
    wide = torch.complex128 if parameter.is_complex() else torch.float64
    exact = parameter.detach().to("cpu").to(wide, copy=True)
    for product in products:
        part = (
            exact
            if product.rows is None
            else exact.narrow(product.dim, product.rows[0], product.rows[1] - product.rows[0])
        )
        factor = scales[product.gate] ** product.exponent
        if product.through:
            function, inverse = INVERTIBLE[product.through]
            part.copy_(inverse(function(part) * factor))
        else:
            part.mul_(factor)
    return exact


def _check_product(name: str, old: Tensor, exact: Tensor) -> None:
    """Refuse what is not finite, overflows, or loses its digits to underflow as a whole."""
    if not old.isfinite().all():
        raise FoldError(f"the parameter {name!r} holds NaN or infinite values; a fold would spread them")
    stored = exact.to(old.dtype).to(exact.dtype)
    largest = exact.abs().max() if exact.numel() else torch.zeros(())
    if not exact.isfinite().all():
        raise FoldError(f"no finite value of the parameter {name!r} takes the scale")
    if not stored.isfinite().all():
        raise FoldError(
            f"the parameter {name!r} overflows {old.dtype} when scaled; fold in a wider type first"
        )
    if old.numel() and (stored - exact).abs().max() > 2 * torch.finfo(old.dtype).eps * largest:
        raise FoldError(
            f"the parameter {name!r} underflows {old.dtype} when scaled; fold in a wider type first"
        )
