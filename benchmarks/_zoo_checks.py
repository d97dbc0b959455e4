"""The checks behind the numerical columns of the coverage table."""

import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import surgeon
from surgeon._gating.block import settle_class
from surgeon._gating.gate import Gate
from surgeon._gating.gated import gated_blocks, gates_of, is_gated, placed_gates
from surgeon._scales import plan_gates
from surgeon._tracing.example import inputs
from surgeon._tracing.nests import tensors
from surgeon.errors import FoldError

TRAINED = 300_000_000  # models with more parameters are not trained: their gradients take long
_DIFFERENT = {torch.float64: 1e-12, torch.float32: 1e-5}  # models whose outputs differ by more are asked why


def numbers(model: nn.Module, given: Any) -> dict[str, Any]:
    """Evaluation bit for bit, every gate live and safe to drop, a training step; on real tensors.

    The model's weights are changed; its gates are taken out at the end.
    """
    randomise(model)
    args, kwargs = pytree.tree_map_only(Tensor, _noise, inputs(model, given))
    model.eval()
    _show(model, args, kwargs)
    before, classes, keys = outputs(model, args, kwargs), _classes(model), list(model.state_dict())
    start = time.process_time()
    surgeon.apply(model, schedule="uniform", drop_rate=0.5, example=given)
    row: dict[str, Any] = {"apply_s": round(time.process_time() - start, 2), "gated": len(gates_of(model))}
    row["eval_equal"] = _equal(before, outputs(model, args, kwargs))
    row["eval_finite"] = all(bool(t.isfinite().all()) for t in before if t.is_floating_point())
    with _frozen(model):
        dead, lost = _dead(model, args, kwargs), _lost(model, args, kwargs)
    row |= {"live": row["gated"] - len(dead), "dead": dead}
    row |= {"carried": row["gated"] - len(lost), "lost": lost}
    training = _trains(model, args, kwargs) if _size(model) <= TRAINED else {}
    if gates_of(model):
        surgeon.remove(model)
    row["restored"] = _classes(model) == classes and list(model.state_dict()) == keys
    return row | training


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trains(model: nn.Module, args: Any, kwargs: Any) -> dict[str, bool]:
    """Training steps of the gated model, while branches drop and while none does, and without gates."""
    torch.manual_seed(1)
    dropping = _trained(model, args, kwargs)
    surgeon.set_drop_rate(model, 0.0)
    gated = _trained(model, args, kwargs)
    surgeon.remove(model)
    plain = _trained(model, args, kwargs)
    ok = plain is None or (gated is not None and dropping is not None and plain <= gated)
    return {"trains_plain": plain is not None, "train_ok": ok}


def folds(model: nn.Module, given: Any) -> dict[str, Any]:
    """A round trip: the gates' scales out of the weights, then `surgeon.fold`; the model is changed.

    Where a scale fits into no weight, a fold alone comes first, and the round trip goes without those gates.
    ``silent`` names folded gates of which nothing shows that their fold did something: leaving one scale out
    of the weights would move the outputs by less than ten times the difference that there is between the
    folded and the gated ones. ``jumps`` is there where outputs differ: how far those of the plain model move
    when every weight moves by a rounding (a detector's, in the order of their scores, do).
    """
    row = _folds(model, given)
    worst = max(row.get(name, 0.0) for name in ("fold_error", "round_trip"))
    if worst > _DIFFERENT[next(model.parameters()).dtype]:
        row["jumps"] = _jumps(model, *pytree.tree_map_only(Tensor, _noise, inputs(model, given)))
    return row


def leftover(model: nn.Module, given: Any) -> dict[str, Any]:
    """The plan of a fold: which gates find no weight for their scale, and why; the weights are not read."""
    surgeon.apply(model, drop_rate=0.4, scaling="paper", example=given)
    placed = placed_gates(model)
    scales = {one.name: one.gate.scale for one in placed}
    kept = plan_gates(model, placed, scales, *inputs(model, given)).kept
    return {"planned": len(placed), "left": {one.gate: one.reason for one in kept}}


def _jumps(model: nn.Module, args: Any, kwargs: Any) -> float:
    before = outputs(model, args, kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * torch.randn_like(parameter))
    return _error(outputs(model, args, kwargs), before)


def _folds(model: nn.Module, given: Any) -> dict[str, Any]:
    randomise(model)
    settle(model, given)
    args, kwargs = pytree.tree_map_only(Tensor, _noise, inputs(model, given))
    model.eval()
    try:
        return _round_trip(model, args, kwargs, [], given)
    except FoldError:  # raised before anything was changed
        surgeon.apply(model, drop_rate=0.4, scaling="paper", example=given)
    first = _folded(model, args, kwargs)
    everything = len(first["left"]) == len(gates_of(model))
    surgeon.remove(model)
    if everything:
        return first
    second = _round_trip(model, args, kwargs, list(first["left"]), given)
    return second | first | {"fold_error": max(first["fold_error"], second["fold_error"])}


def _folded(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """What folding the gates of a model does."""
    gates, gated = gates_of(model), outputs(model, args, kwargs)
    with _scaled(model, gates, [1.0] * len(gates)):
        moved = _error(outputs(model, args, kwargs), gated)
    with _frozen(model):
        moves = _moves(model, args, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        surgeon.fold(model, inplace=True)
    left = {gate.name: gate.note for gate in surgeon.status(model).gates} if is_gated(model) else {}
    error = _error(outputs(model, args, kwargs), gated)
    silent = [name for name, by in moves.items() if name not in left and not by > 10 * error]
    return {"fold_error": error, "left": left, "fold_moved": moved, "silent": silent}


def _round_trip(model: nn.Module, args: Any, kwargs: Any, exclude: list[str], given: Any) -> dict[str, Any]:
    plain, weights = outputs(model, args, kwargs), [t.detach().clone() for t in model.parameters()]
    surgeon.apply(model, drop_rate=0.4, scaling="paper", keep_eval=True, exclude=exclude, example=given)
    kept = _error(outputs(model, args, kwargs), plain)
    divided = sum(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    row = _folded(model, args, kwargs)
    back = [(a, b) for a, b in zip(model.parameters(), weights, strict=True) if b.any()]
    return row | {
        "kept_error": kept,
        "round_trip": _error(outputs(model, args, kwargs), plain),
        "weights_error": max(_error([a], [b]) for a, b in back),
        "divided": divided,
    }


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference over the largest value, of the worst tensor; 1 where shapes differ."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return 1.0
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b.is_floating_point() and b.numel()]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


def _classes(model: nn.Module) -> dict[str, tuple[type, frozenset[str]]]:
    """Class and attributes of every module."""
    return {name: (type(m), frozenset(m.__dict__)) for name, m in model.named_modules()}


def _noise(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor


def _colours(tensor: Tensor) -> Tensor:
    """Rows of 10 and of -10 in turns."""
    if not tensor.is_floating_point():
        return tensor
    sign = 1 - 2 * (torch.arange(tensor.shape[0], device=tensor.device) % 2)
    return (10 * sign).to(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor).clone()


def _trained(model: nn.Module, args: Any, kwargs: Any) -> set[str] | None:
    """The parameters that get a gradient in a training step; None if it fails or is not finite."""
    model.train()
    model.zero_grad()
    try:
        results = tensors(model(*args, **kwargs))
        loss = sum((t.square().mean() for t in results if t.is_floating_point()), torch.zeros(()))
        loss.backward()
    except (RuntimeError, ValueError, AssertionError):
        return None
    return {n for n, p in model.named_parameters() if p.grad is not None} if loss.isfinite() else None


def _dead(model: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """The gates on which the evaluating output does not depend: the derivative by their scale is zero."""
    model.eval()
    gates = gates_of(model)
    # A way of running that is traced when it comes: with plain numbers.
    with _scaled(model, gates, [0.5] * len(gates)):
        outputs(model, args, kwargs)
    _, slopes = _slopes(model, args, kwargs, [0.5] * len(gates))
    return [one.name for one, slope in zip(placed_gates(model), slopes, strict=True) if not slope]


def _moves(model: nn.Module, args: Any, kwargs: Any) -> dict[str, float]:
    """By how much evaluation would move without the scale of one gate, relative and to first order."""
    placed = placed_gates(model)
    probe, slopes = _slopes(model, args, kwargs, [one.gate.scale for one in placed])
    pairs = [(one.name, one.gate.scale, slope) for one, slope in zip(placed, slopes, strict=True)]
    return {name: abs(slope * (1 - scale)) / probe for name, scale, slope in pairs if scale != 1}


def _slopes(model: nn.Module, args: Any, kwargs: Any, at: Sequence[float]) -> tuple[float, list[float]]:
    """A typical size of `_probe` for outputs as large as the model's, and its derivatives by the scales."""
    gates = gates_of(model)
    scales = [torch.tensor(scale, dtype=torch.float64, requires_grad=True) for scale in at]
    with _scaled(model, gates, scales):
        probe, size = _probe(model, args, kwargs)
        gradients = torch.autograd.grad(probe, scales, allow_unused=True)
    return size, [0.0 if g is None else float(g) for g in gradients]


def _lost(model: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """The gates whose drop loses the input of their block: nothing of it reaches the output.

    All branches are off at once first; only a gate that seems to lose its input then (one inside another's
    branch does) is looked at with its own branch off alone.
    """
    model.eval()
    names = {one.gate: one.name for one in placed_gates(model)}
    suspects = _unreached(model, args, kwargs, list(names), list(names))
    return [names[gate] for gate in suspects if _unreached(model, args, kwargs, [gate], [gate])]


def _unreached(
    model: nn.Module, args: Any, kwargs: Any, off: Sequence[Gate], asked: Sequence[Gate]
) -> list[Gate]:
    """Those of ``asked`` whose block's inputs have no derivative while the branches of ``off`` are zero."""
    taken: dict[int, list[Tensor]] = {}

    def note(block: nn.Module, given: Any, named: Any) -> None:
        floats = [t for t in tensors((given, named)) if t.is_floating_point() and t.requires_grad]
        taken.setdefault(id(block), []).extend(floats)

    asking = set(asked)
    blocks = [(block, gating) for _, block, gating in gated_blocks(model) if asking & set(gating.gates)]
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True, prepend=True) for block, _ in blocks]
    try:
        with _scaled(model, off, [0.0] * len(off)):
            probe, _ = _probe(model, args, kwargs)
        wanted = [t for block, _ in blocks for t in taken.get(id(block), ())]
        found = torch.autograd.grad(probe, wanted, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    reached = iter([g is not None and bool(g.count_nonzero()) for g in found])
    reaching = {block: [next(reached) for _ in taken.get(id(block), ())] for block, _ in blocks}
    return [g for block, gating in blocks if not any(reaching[block]) for g in gating.gates if g in asking]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient: those of large models take long."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _scaled(model: nn.Module, gates: Sequence[Gate], scales: Sequence[Any]) -> Iterator[None]:
    """Inside, the branches of ``gates`` are multiplied by ``scales`` in evaluation."""

    def put(numbers: Sequence[Any]) -> None:
        for gate, scale in zip(gates, numbers, strict=True):
            gate.scale = scale
        for _, block, _ in gated_blocks(model):
            settle_class(block)  # without a scale it evaluates as the class that it had

    before = [gate.scale for gate in gates]
    try:
        put(scales)
        yield
    finally:
        put(before)


def _probe(model: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, float]:
    """A number that depends on every value the model gives, each with a random weight of its own, and its
    standard deviation."""
    given, named = pytree.tree_map_only(
        Tensor, lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, (args, kwargs)
    )
    floats = [t for t in tensors(model(*given, **named)) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros((), dtype=floats[0].dtype)
    for t in floats:
        total = total + (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
    return total, math.sqrt(sum(float(t.detach().square().sum()) for t in floats))


def randomise(model: nn.Module) -> None:
    """Statistics, scales and zero-initialised weights away from values that hide what a branch does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point() and (tensor.ndim <= 1 or not tensor.any()):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def settle(model: nn.Module, given: Any) -> None:
    """Gives batch norms statistics near those of what they get, as a trained network has them.

    With others, values grow from layer to layer until softmaxes are steps, and the network turns a rounding
    into large differences by itself. What they get is noise and, for checks on extreme inputs, ten times
    that, and images of one colour, which survive a mean over pixels better than noise does. Depthwise
    weights are made a tenth: a position encoding that is one such convolution added to its input would let
    values grow from block to block until they drown what later branches add (DaViT). For the same reason the
    gains of networks without norms are below one (NFNets).
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                module.weight.mul_(0.1)
            gain = getattr(module, "gain", None)
            if isinstance(module, nn.Conv2d) and gain is not None:  # of a weight standardisation
                gain.copy_(torch.rand(gain.shape, generator=generator) / 2 + 0.5)
    norms = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None takes the mean over all calls
    for kind in (_noise, lambda t: 10 * _noise(t), _colours):
        outputs(model, *pytree.tree_map_only(Tensor, kind, inputs(model, given)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.training = momentum, False
        for near, tensor in ((0.0, norm.running_mean), (1.0, norm.running_var)):
            assert tensor is not None
            jitter = torch.rand(tensor.shape, generator=generator) / 5 - 0.1 + near
            tensor.copy_(tensor * jitter if near else tensor + jitter * norm.running_var.sqrt())


def _show(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Exchanges rows of the weights until something comes out: a detector's may see background everywhere."""
    for _ in range(5):
        if any(t.numel() for t in outputs(model, args, kwargs) if t.is_floating_point()):
            return
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.roll(1, 0))


def runs(model: nn.Module, given: Any) -> bool:
    """Whether a model runs on tensors like ``given`` (some convert to float32 on the way)."""
    try:
        outputs(model.eval(), *inputs(model, given))
    except RuntimeError:
        return False
    return True


def outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """What the model gives in the mode it is in, detached."""
    with torch.no_grad():
        return [t.detach().clone() for t in tensors(model(*args, **kwargs))]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit for bit; a NaN equals a NaN in the same place."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )
