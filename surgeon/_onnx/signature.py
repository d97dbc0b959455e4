"""How a model is called and what it returns, as flat lists of named tensors, which is all that ONNX knows."""

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._copy import copied
from surgeon._torch import pytree
from surgeon._tracing.example import inputs
from surgeon.errors import UsageError

Grown = tuple[int, int]
LARGER: Grown = (64, 32)  # which most models that take any size can halve five times
ODD: Grown = (5, 3)


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors that a call takes, in order.

    Attributes:
        names: One name per tensor: ``"input"`` for a single one, else the parameter's.
        tensors: The example's tensors, on the CPU.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    def call(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """The model's result for these tensors, the example's other arguments as they are."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return model(*args, **kwargs)

    def batched(self) -> tuple[bool, ...]:
        """For each tensor, whether its first dimension is the batch: the same as the first tensor's."""
        size = self.tensors[0].shape[:1]
        return tuple(len(size) == 1 and tensor.shape[:1] == size for tensor in self.tensors)

    def images(self) -> tuple[bool, ...]:
        """For each tensor, whether its last two dimensions are height and width: as the first image's."""
        sizes = [tuple(t.shape[2:]) if t.ndim == 4 and t.is_floating_point() else () for t in self.tensors]
        first = next((size for size in sizes if size), None)
        return tuple(size == first for size in sizes)

    def draw(self, batch: int, generator: torch.Generator, grown: Grown = (0, 0)) -> tuple[Tensor, ...]:
        """Random tensors like the example's, with another batch size: normal, or integers in its range.

        Args:
            batch: Size of the batch.
            generator: Where the numbers come from.
            grown: By how many pixels images are higher and wider.
        """
        return tuple(
            _random(tensor, _shape(tensor, batch if batched else None, grown if image else (0, 0)), generator)
            for tensor, batched, image in zip(self.tensors, self.batched(), self.images(), strict=True)
        )

    def extremes(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """As `draw`, but beyond what images hold: rows of noise ten times as large, of 10, of -10, of 0."""
        return tuple(
            _extreme(tensor) if batched else tensor
            for tensor, batched in zip(self.draw(batch, generator), self.batched(), strict=True)
        )


def signature(model: nn.Module, example: Any = None) -> Signature:
    """The signature of a call with this example; the model is only read.

    Raises:
        UsageError: The example holds no tensor, or does not fit the model's parameters.
    """
    args, kwargs = inputs(model, example)
    names = _input_names(model, args, kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = tuple(_on_cpu(leaf) for leaf in leaves if isinstance(leaf, Tensor))
    if not tensors:
        raise UsageError(f"the example for {type(model).__name__} holds no tensor")
    if not tensors[0].ndim:
        raise UsageError(
            f"{names[0]}, the first tensor of the example, has no dimension that could be the batch"
        )
    return Signature(names, tensors, tuple(leaves), spec)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A tensor's numbers; zeros where it has none."""
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().cpu()


def tensors_by_name(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a result, each with a name: keys and fields as they are, positions as ``name_0``."""
    if isinstance(value, Tensor):
        yield name, value
        return
    single = name == "output"
    for key, held in _held(value):
        yield from tensors_by_name(held, key if single and not key.isdigit() else f"{name}_{key}")


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), held) for key, held in value.items())
    elif dataclasses.is_dataclass(value):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        yield from ((str(index), held) for index, held in enumerate(value))


class TensorModule(nn.Module):
    """A model whose forward takes and returns nothing but tensors; holds the model itself, no copy."""

    def __init__(self, model: nn.Module, called: Signature) -> None:
        super().__init__()
        self.model = model
        self.called = called

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for _, tensor in tensors_by_name(self.called.call(self.model, tensors)))


def evaluating_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the CPU, without what earlier evaluations left; the model is only read.

    LeViT and its kin keep a table of attention biases from their last evaluation. It goes stale when weights
    change and would be frozen into an export.
    """
    made = copied(model).cpu()
    made.eval()
    drop_caches(made)
    return made


def drop_caches(model: nn.Module) -> None:
    """Empties, in place, the tables that evaluation fills."""
    for cache in _caches(model):
        cache.clear()


def _caches(model: nn.Module) -> Iterator[dict[Any, Any]]:
    for module in model.modules():
        for name, value in vars(module).items():
            if name == "attention_bias_cache" and isinstance(value, dict):
                yield value


def _input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    parameters = inspect.signature(model.forward)
    try:
        parameters.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"the example does not fit {type(model).__name__}.forward: {error}") from error
    positional = [name for name, found in parameters.parameters.items() if found.kind in _POSITIONAL]
    named = [*itertools.zip_longest(positional[: len(args)], args, fillvalue="inputs"), *kwargs.items()]
    found = [name for name, value in named for name in _leaf_names(name, value)]
    return ("input",) if len(found) == 1 else _distinct(found)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _leaf_names(name: str, value: Any) -> list[str]:
    count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    return [name] if count == 1 else [f"{name}_{index}" for index in range(count)]


def _distinct(names: list[str]) -> tuple[str, ...]:
    return (
        tuple(names)
        if len(set(names)) == len(names)
        else tuple(f"{name}_{i}" for i, name in enumerate(names))
    )


def _shape(tensor: Tensor, batch: int | None, grown: Grown) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if batch is not None:
        shape[0] = batch
    if any(grown):
        shape[2:] = shape[2] + grown[0], shape[3] + grown[1]
    return tuple(shape)


def _random(tensor: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(*shape, generator=generator).to(tensor.dtype)
    if tensor.dtype is torch.bool:
        return torch.rand(*shape, generator=generator) < 0.5
    low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
    return torch.randint(low, high + 1, tuple(shape), generator=generator, dtype=tensor.dtype)


def _extreme(drawn: Tensor) -> Tensor:
    """Makes of random rows, in turn, large, constant and zero ones; integers and booleans stay."""
    if not drawn.is_floating_point():
        return drawn
    made = drawn * 10
    for row, constant in enumerate(itertools.islice(itertools.cycle((None, 10.0, -10.0, 0.0)), len(made))):
        if constant is not None:
            made[row] = constant
    return made
