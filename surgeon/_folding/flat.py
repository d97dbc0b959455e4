"""The evaluating model as one flat, functional list of ATen calls; the argument is not changed.

The model runs once in evaluation mode on fake tensors: shapes and types without arithmetic and without
a copy of any weight. Every child module, wrapper and parametrisation dissolves; what remains says which
parameter meets which value through which operator, and who else reads it. That is all ``fold`` needs.

How, and why so:

* Functionalisation rewrites in-place calls and writes through views into calls that return new values, so
  that a value never changes after it was made. What it leaves is for the recorder. (PyTorch's own switch
  rather than ``torch.func.functionalize``, under which no classic ``autograd.Function`` runs.)
* Below it a `Recorder` notes each call. ``make_fx`` does the same with proxies and ends in an ``fx.Graph``;
  the plain list costs a fraction of the time, lets a call remember the module it came from, and cannot be
  mistaken for something to execute.
* Integers and truth values among the arguments stay out of the rewriting, so that a model that asks whether
  a mask is a fake tensor before it looks into it is told so. A model that looks all the same (a detector)
  runs once more on real tensors.
* Attention is recorded through its mathematical definition, and the fused paths of
  ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` are off: this list is only read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._folding.evaluation import evaluating, noting
from surgeon._folding.recorder import OpCall, Recorder, Value
from surgeon._folding.results import tensors_in
from surgeon._folding.state import address, named_tensors
from surgeon._torch import FakeTensorMode, from_functional, functionalizing, pytree, to_functional
from surgeon._tracing.undisturbed import undisturbed
from surgeon.errors import FoldError, UnseenCallError


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter value lives: every name it has, and which rows when it is not the whole."""

    names: tuple[str, ...]
    rows: tuple[int, int] | None = None
    dim: int = 0
    through: str = ""
    """The value is not the parameter but this function of it; see `surgeon._folding.freed`."""


@dataclass(frozen=True, slots=True)
class Flat:
    """The whole evaluating model: calls in execution order, and what the named values are."""

    calls: tuple[OpCall, ...]
    parameters: Mapping[Value, Source]
    buffers: Mapping[Value, str]
    """Named tensors that must not be written: buffers, and parameters that share part of their memory."""
    outputs: frozenset[Value]
    """What the model returns, and what it leaves behind in its state and its arguments."""


def flatten(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Flat:
    """Record what the model computes in evaluation mode.

    The model, its caches, training flags and the random state are left as they were.

    Args:
        model: Any module; only its structure is read.
        args: Positional arguments of one call; tensors give shapes, types and devices.
        kwargs: Keyword arguments of the same call.

    Raises:
        FoldError: The model cannot run on these arguments.
    """
    first: Exception | None = None
    for attempt in _ATTEMPTS:
        if attempt.real and any(
            isinstance(t, Tensor) and t.is_meta
            for t in (*model.parameters(), *pytree.tree_leaves((args, kwargs)))
        ):
            continue
        try:
            with undisturbed(model):
                return _record(model, args, kwargs, attempt)
        except (FoldError, UnseenCallError) as error:
            first = error
            break
        except Exception as error:  # noqa: BLE001 - whatever a foreign forward may raise
            first = first or error
    if isinstance(first, FoldError):
        raise first
    raise FoldError(
        f"{type(model).__name__} could not run in evaluation mode, neither on fake tensors nor on real ones, "
        f"so there is nothing to fold on; check the example input ({type(first).__name__}: {first})"
    ) from first


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One way of running a model for its list of calls."""

    bare: bool
    """Integers and truth values among the arguments are not rewritten."""
    real: bool
    """Tensors hold numbers: copies of the model's own."""


_ATTEMPTS = (
    _Attempt(bare=True, real=False),
    _Attempt(bare=False, real=False),
    _Attempt(bare=False, real=True),
)


def _record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], attempt: _Attempt) -> Flat:
    """Run the model under a recorder."""
    named = named_tensors(model)
    recorder = Recorder()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    of = _copy if attempt.real else fake.from_tensor
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    held = [of(one.tensor.detach()) for one in named]
    leaves = [of(leaf.detach()) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    fed = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _rewritten(leaf, attempt)]
    values = [recorder.value(tensor) for tensor in held]

    def forward(wrapped: Sequence[Tensor]) -> Iterator[Tensor]:
        filled = list(leaves)
        for n, tensor in zip(fed, wrapped[len(named) :], strict=True):
            filled[n] = tensor
        positional, keyword = pytree.tree_unflatten(filled, spec)
        given = {name: tensor for tensor, one in zip(wrapped, named, strict=False) for name in one.names}
        state = dict(given)
        result = torch.func.functional_call(model, state, positional, keyword, tie_weights=False)
        yield from tensors_in(result)
        # A buffer that the forward has replaced: the call has put the new one into its argument.
        yield from (state[name] for name, tensor in given.items() if state[name] is not tensor)

    with (
        evaluating(model),
        noting(model, recorder.running),
        nullcontext() if attempt.real else fake,
        recorder,
    ):
        out = _functionalised(forward, [*held, *[leaves[n] for n in fed]])
    outside = {address(tensor) for tensor in recorder.constants} - {None}
    writable = [one.writable and address(one.tensor) not in outside for one in named]
    state = list(zip(values, named, writable, strict=True))
    return Flat(
        calls=tuple(recorder.calls),
        parameters={value: Source(one.names) for value, one, free in state if free},
        buffers={value: one.names[0] for value, one, free in state if not free},
        outputs=frozenset(recorder.value(tensor) for tensor in out),
    )


def _functionalised(
    function: Callable[[Sequence[Tensor]], Iterable[Tensor]], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """What a function returns without writing in place, and what it would have written to its arguments."""
    wrapped = [to_functional(tensor) for tensor in tensors]
    with functionalizing():
        results = list(function(wrapped))
    written = [from_functional(one) for one in wrapped]
    return [
        *map(from_functional, results),
        *(new for new, old in zip(written, tensors, strict=True) if new is not old),
    ]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _rewritten(leaf: Tensor, attempt: _Attempt) -> bool:
    return not attempt.bare or leaf.is_floating_point() or leaf.is_complex()
