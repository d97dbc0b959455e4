"""A block that has lost branches for good.

As with a gate (`surgeon._gating.block`) the block keeps its identity: its class becomes a generated subclass
of its class, of the same name, whose forward is the code that `surgeon._pruning.cut` made. Unlike a gate
there is no way back: the modules of the branch are gone. The code goes with the block as text, so it pickles.

The code was made for one way of calling the block. A call that could need other code is refused by name:
other arguments, another value of a flag, and, where the forward looked at sizes, other sizes than those.
"""

import functools
import importlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from surgeon._pruning.cut import Code
from surgeon._tracing.trace import Made, Unannounced, portable, revived
from surgeon.errors import UnseenCallError

_FLAGS = (type(None), bool, str)


@dataclass(frozen=True, slots=True)
class Form:
    """The way of calling a block that its code was made for.

    Attributes:
        places: One entry per positional argument: the value of a flag, or ``Ellipsis`` for anything else.
        words: Keyword arguments likewise, in their order.
        sizes: Shapes of the tensors among them, from the dimension ``first`` on; empty if any size will do.
        first: 1 where the number of samples is free, else 0.
    """

    places: tuple[Any, ...]
    words: tuple[tuple[str, Any], ...]
    sizes: tuple[tuple[int, ...], ...] = ()
    first: int = 0

    def fits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        given = (tuple(map(_flag, args)), tuple((name, _flag(value)) for name, value in kwargs.items()))
        return given == (self.places, self.words) and (
            not self.sizes or _sizes(args, kwargs, self.first) == self.sizes
        )


def form(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, exact: bool, first: int = 0) -> Form:
    """The form of one call, with its sizes if they count."""
    places = tuple(map(_flag, args))
    words = tuple((name, _flag(value)) for name, value in kwargs.items())
    return Form(places, words, _sizes(args, kwargs, first) if exact else (), first if exact else 0)


def _flag(value: Any) -> Any:
    return value if isinstance(value, _FLAGS) else ...


def _sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any], first: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(v.shape[first:]) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


@dataclass(slots=True)
class Kept:
    """What a pruned block still does: its code in training and in evaluation.

    Attributes:
        names: Of the residual adds that were deleted.
        form: The way of calling it.
        training, evaluation: Its code.
    """

    names: tuple[str, ...]
    form: Form
    training: Code
    evaluation: Code
    _runs: dict[bool, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for mode, code in ((True, self.training), (False, self.evaluation)):
            scope = {name: _found(value) for name, value in code.names.items()}
            exec(compile(code.source, "<surgeon>", "exec"), scope)  # noqa: S102 - what fx wrote, as GraphModule does
            self._runs[mode] = scope["forward"]

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of ``block``."""
        if not self.form.fits(args, kwargs):
            raise UnseenCallError(
                f"a {type(block).__name__} that was pruned ({', '.join(self.names)} deleted) is called in "
                "another way than on the example, for which its code was made: other arguments, flags or "
                "sizes. Prune the model with an example of these: surgeon.prune(model, example=...)"
            )
        return self._runs[block.training](block, *args, *kwargs.values())

    def __reduce__(self) -> Any:
        codes = [Code(c.source, _portable(c.names)) for c in (self.training, self.evaluation)]
        return Kept, (self.names, self.form, *codes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return self  # nothing in it changes


@dataclass(frozen=True, slots=True)
class _Import:
    """A Python module, which does not pickle, by its name."""

    name: str


def _portable(names: Mapping[str, Any]) -> dict[str, Any]:
    return {n: _Import(v.__name__) if isinstance(v, types.ModuleType) else v for n, v in names.items()}


def _found(value: Any) -> Any:
    return importlib.import_module(value.name) if isinstance(value, _Import) else value


class PrunedBlock(Unannounced, nn.Module):
    """Mixed into the class of a pruned block, in front of it."""

    _unpruned: type[nn.Module]
    _kept: Kept

    def extra_repr(self) -> str:
        own, deleted = super().extra_repr(), "deleted: " + ", ".join(_last(n) for n in self._kept.names)
        return f"{own}, {deleted}" if own else deleted

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        _, _, *rest = reduced
        return (_revive, (portable(self._unpruned),), *rest)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _revive(unpruned: type[nn.Module] | Made) -> nn.Module:
    cls = pruned_class(revived(unpruned))
    block: nn.Module = cls.__new__(cls)
    return block


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def pruned_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` that runs what is left of a block; of the same name, in the same module."""
    if cls not in _classes:
        _classes[cls] = _subclass(cls)
    return _classes[cls]


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._kept.run(self, args, kwargs)

    body = {
        "forward": forward,
        "_unpruned": cls,
        "_made": Made(pruned_class, cls),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (PrunedBlock, cls), body)


def prune_block(block: nn.Module, kept: Kept) -> None:
    """Gives ``block`` the forward in ``kept``; its class becomes a subclass of what it was."""
    block.__dict__["_kept"] = kept
    if not isinstance(block, PrunedBlock):
        block.__class__ = pruned_class(type(block))
