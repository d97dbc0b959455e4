"""The evaluating model as one flat, functional list of ATen calls; the argument is not changed.

The model runs once in evaluation mode on fake tensors: shapes and types without arithmetic and without
a copy of any weight. Every child module, wrapper and parametrisation dissolves; what remains says which
parameter meets which value through which operator, and who else reads it. That is all ``fold`` needs.

How, and why so:

* ``torch.func.functionalize`` rewrites in-place calls and writes through views into calls that return
  new values, so that a value never changes after it was made.
* Below it a ``TorchDispatchMode`` notes each call and numbers each tensor by identity. ``make_fx`` does
  the same with proxies and ends in an ``fx.Graph``; the plain list costs a fraction of the time, lets a
  call remember the module it came from, and cannot be mistaken for something to execute.
* Integers and truth values among the arguments stay out of the rewriting, so that a model that asks whether
  a mask is a fake tensor before it looks into it is told so. A model that looks all the same (a detector)
  runs once more on real tensors.
* Attention is recorded through its mathematical definition, and the fused paths of
  ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` are off: this list is only read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from surgeon._folding.still import evaluating, unchanged
from surgeon.errors import FoldError, UnseenCallError


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the flat list, known by its number."""

    number: int
    shape: tuple[int, ...] = field(compare=False)
    scalable: bool = field(compare=False)
    """Whether it holds real or complex numbers; an integer or a truth value cannot carry a scale."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call."""

    name: str
    """Namespace and operator, without the overload: ``"aten.convolution"``."""
    arguments: Mapping[str, Any]
    """By the names of the operator's schema, defaults included; tensors stand as ``Value``."""
    inputs: tuple[Value, ...]
    """The tensors among the arguments whose content is read, in order."""
    outputs: tuple[Value, ...]
    module: str
    """Name of the module whose ``forward`` was running; empty for the model itself."""


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

    calls: tuple[Call, ...]
    parameters: Mapping[Value, Source]
    buffers: Mapping[Value, str]
    """Named tensors that must not be written: buffers, and parameters that share part of their memory."""
    outputs: frozenset[Value]


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
        if attempt.real and any(t.is_meta for t in (*model.parameters(), *_tensors_in((args, kwargs)))):
            continue
        try:
            with unchanged(model):
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
    named = _named_tensors(model)
    recorder = _Recorder({id(module): name for name, module in model.named_modules()})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    of = _copy if attempt.real else fake.from_tensor
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    held = [of(one.tensor.detach()) for one in named]
    leaves = [of(leaf.detach()) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    fed = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _rewritten(leaf, attempt)]
    values = [recorder.value(tensor) for tensor in held]

    def forward(*wrapped: Tensor) -> list[Tensor]:
        filled = list(leaves)
        for n, tensor in zip(fed, wrapped[len(named) :], strict=True):
            filled[n] = tensor
        positional, keyword = pytree.tree_unflatten(filled, spec)
        state = {name: tensor for tensor, one in zip(wrapped, named, strict=False) for name in one.names}
        result = torch.func.functional_call(model, state, positional, keyword, tie_weights=False)
        return list(_tensors_in(result))

    with evaluating(model), _naming(recorder), nullcontext() if attempt.real else fake, recorder:
        out = torch.func.functionalize(forward, remove="mutations")(*held, *[leaves[n] for n in fed])
    return Flat(
        calls=tuple(recorder.calls),
        parameters={v: Source(one.names) for v, one in zip(values, named, strict=True) if one.writable},
        buffers={v: one.names[0] for v, one in zip(values, named, strict=True) if not one.writable},
        outputs=frozenset(recorder.value(tensor) for tensor in out),
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _rewritten(leaf: Tensor, attempt: _Attempt) -> bool:
    return not attempt.bare or leaf.is_floating_point() or leaf.is_complex()


_FORM_ONLY = frozenset(
    f"aten.{name}"
    for name in (
        *("copy", "empty_like", "new_empty", "new_empty_strided", "zeros_like", "new_zeros"),
        *("ones_like", "new_ones", "full_like", "new_full", "rand_like", "randn_like"),
    )
)
"""Operators that take shape and type of ``self``, not its content."""


class _Recorder(TorchDispatchMode):
    """Notes every call that makes a tensor, with the module that was running."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.running: list[str] = []
        self.names = names
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # an id is only good while its tensor lives

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor; one never seen before is a constant and gets a number here."""
        known = self._values.get(id(tensor))
        if known is None:
            scalable = tensor.is_floating_point() or tensor.is_complex()
            known = Value(len(self._values), tuple(tensor.shape), scalable)
            self._values[id(tensor)] = known
            self._alive.append(tensor)
        return known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            arguments = {name: self._described(v) for name, v in _by_name(func, args, kwargs or {}).items()}
            name = func._schema.name.replace("::", ".")
            read = {k: v for k, v in arguments.items() if k != "self"} if name in _FORM_ONLY else arguments
            inputs = tuple(leaf for leaf in pytree.tree_leaves(read) if isinstance(leaf, Value))
            outputs = tuple(self.value(tensor) for tensor in made)
            module = next((name for name in reversed(self.running) if name), "")
            self.calls.append(Call(name, arguments, inputs, outputs, module))
        return result

    def _described(self, argument: Any) -> Any:
        return pytree.tree_map(lambda leaf: self.value(leaf) if isinstance(leaf, Tensor) else leaf, argument)


def _by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under the names of the operator's schema, with its defaults."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args) and not argument.kwarg_only:
            named[argument.name] = args[position]
        else:
            named[argument.name] = kwargs.get(argument.name, argument.default_value)
    return named


@dataclass(frozen=True, slots=True)
class _Named:
    """One piece of memory in the model's state, with every name it goes by."""

    tensor: Tensor
    names: tuple[str, ...]
    writable: bool


def _named_tensors(model: nn.Module) -> list[_Named]:
    """Parameters and buffers, tied ones once.

    Two Parameters over the same memory count as one. Where memory is shared in part, or with a buffer,
    none of them may be written: what a scale on the one does to the other cannot be said.
    """
    groups: dict[object, list[tuple[str, Tensor]]] = {}
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in state:
        groups.setdefault(_place(tensor), []).append((name, tensor))
    blocked = _overlapping([group[0][1] for group in groups.values()])
    return [
        _Named(
            group[0][1],
            tuple(name for name, _ in group),
            all(isinstance(t, nn.Parameter) for _, t in group) and id(group[0][1]) not in blocked,
        )
        for group in groups.values()
    ]


def _address(tensor: Tensor) -> int:
    """Where the storage begins; 0 when there is none to speak of (meta, empty, subclasses without one)."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    except (RuntimeError, NotImplementedError):
        return 0


def _place(tensor: Tensor) -> object:
    address = _address(tensor)
    if not address:
        return id(tensor)
    layout = (tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    return str(tensor.device), address, layout


def _overlapping(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of the tensors that share some of their memory with another one of the list."""
    spans: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for tensor in tensors:
        if address := _address(tensor):
            first = tensor.storage_offset() * tensor.element_size()
            steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            last = first + (steps + 1) * tensor.element_size()
            spans.setdefault((str(tensor.device), address), []).append((int(first), int(last), id(tensor)))
    found: set[int] = set()
    for group in spans.values():
        group.sort()
        end, owner = -1, 0
        for first, last, one in group:
            if first < end:
                found |= {one, owner}
            if last > end:
                end, owner = last, one
    return found


def _tensors_in(result: Any, depth: int = 8) -> Iterator[Tensor]:
    """Every tensor of a model's output, through containers and plain result objects."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and isinstance(leaf, Mapping):
            yield from _tensors_in(list(leaf.values()), depth - 1)
        elif depth and isinstance(leaf, list | tuple | set | frozenset):
            yield from _tensors_in(list(leaf), depth - 1)
        elif depth and hasattr(leaf, "__dict__") and not callable(leaf):
            yield from _tensors_in(dict(vars(leaf)), depth - 1)


@contextmanager
def _naming(recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder which module is running."""

    def enter(module: nn.Module, _: Any) -> None:
        recorder.running.append(recorder.names.get(id(module), ""))

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        recorder.running.pop()

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
