"""Every private name of PyTorch that surgeon needs, each with its reason. No other file names one.

A version of PyTorch without one of them is refused here, when surgeon's first room is imported: what is
missing must not look like a model in which nothing was found. Names that changed between the versions that
docs/versions.md tells of have their older form here, so that no other room knows of versions.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from surgeon.errors import UnsupportedTorchError

__all__ = [
    "CHECK",
    "CHECKPOINT",
    "COMPILED",
    "EXPORT_LOGS",
    "FAKE_LOG",
    "MODULE_GETATTR",
    "NUMBERS_ASKED",
    "UNWRAPPED",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "check_exporter",
    "checkpoint_call",
    "checkpoint_itself",
    "fake_of",
    "from_functional",
    "functionalizing",
    "global_forward_hooks",
    "no_dispatch",
    "pytree",
    "saves_may_change",
    "to_functional",
    "top_saving_hooks",
    "traced_assert",
    "transformed",
    "under_vmap",
    "without_compiler",
]

OLDEST, NEWEST = "2.6", "2.15"  # the versions that the tests have run on
_EXPORTS_AFTER = "2.6"  # whose exporter fails on batch norms, and on dynamic shapes of inputs in a tuple
_CURE = "install one that it is tested on: pip install 'torch>=2.6,<2.16'"


def _older_than(version: str) -> bool:
    here, there = ([int(part) for part in one.split(".")[:2]] for one in (torch.__version__, version))
    return here < there


if _older_than(OLDEST):
    raise UnsupportedTorchError(
        f"surgeon runs on PyTorch {OLDEST} and newer, and this is {torch.__version__}; {_CURE}"
    )

try:
    # Keeps the compiler out of a function without importing it before the function is first called, as
    # `torch.compiler.disable` would.
    from torch._compile import _disable_dynamo as without_compiler

    # What autograd functions do with tensors, and only with them, before their forward; below.
    from torch._functorch import utils as _functorch_utils

    # Runs a forward without arithmetic and without touching a weight.
    # What a fake tensor raises where code asks for its numbers.
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )

    # Where fx asks for what is no plain attribute of a module while it traces.
    from torch.fx import _symbolic_trace

    # Hooks that every module's result goes through.
    from torch.nn.modules.module import _global_forward_hooks as global_forward_hooks

    # Walks through the nests that models take and give, as torch.export and torch.func do.
    from torch.utils import _pytree as pytree

    # Lets real numbers be read within a `FakeTensorMode`.
    from torch.utils._mode_utils import no_dispatch

    # Shows every operator that runs, those of composite functions too.
    from torch.utils._python_dispatch import TorchDispatchMode

    MODULE_GETATTR = _symbolic_trace, "_orig_module_getattr"
    _symbolic_trace._orig_module_getattr  # noqa: B018 - asked for, so that it is missed here
    # What `assert` on a tensor becomes in a graph.
    traced_assert = torch._assert

    # What `torch._check` and its kin come to, which take no proxy for a truth value.
    CHECK = torch, "_check_with"
    torch._check_with  # noqa: B018 - asked for, so that it is missed here

    # Functionalisation, of which torch.func.functionalize shows no more than the end.
    to_functional = torch._to_functional_tensor
    _is_functional, _from_functional = torch._is_functional_tensor, torch._from_functional_tensor
    _sync: Any = torch._sync  # type: ignore[attr-defined]
    _functionalize: Any = torch._enable_functionalization
    _functionalize_no_more: Any = torch._disable_functionalization

    # Whether hooks on what autograd saves are allowed: torch.func forbids them.
    _autograd: Any = torch._C._autograd
    _hooks_enabled = _autograd._saved_tensors_hooks_is_enabled

    # Whether `torch.vmap` runs: its tensors have no values that Python could look at.
    _functorch: Any = torch._C._functorch
    _transforms, _vmap = _functorch.get_interpreter_stack, _functorch.TransformType.Vmap

    # Whether forward mode runs: a level of its own, which no transform shows.
    _forward_mode: Any = torch.autograd.forward_ad
    _forward_mode._current_level  # noqa: B018 - asked for, so that it is missed here

    # Where every gradient checkpoint goes through, however `checkpoint` was imported.
    _checkpoint: Any = torch.utils.checkpoint
    CHECKPOINT: tuple[Any, str]
    if hasattr(_checkpoint, "_checkpoint_impl"):  # since 2.14
        checkpoint_itself: Any = _checkpoint._checkpoint_impl
        CHECKPOINT = _checkpoint, "_checkpoint_impl"
    else:  # what keeps the compiler out of `checkpoint` is asked for by this name in each call
        checkpoint_itself = _checkpoint.checkpoint.__wrapped__
        CHECKPOINT = checkpoint_itself, "__dynamo_disable"
        if CHECKPOINT[1] not in _checkpoint.checkpoint.__code__.co_consts:
            raise AttributeError(CHECKPOINT[1])  # noqa: TRY301 - missed as the others are

    # Not in 2.15, where an autograd function takes a proxy for a tensor as it is.
    UNWRAPPED: tuple[tuple[Any, str], ...] = tuple(
        (_functorch_utils, name) for name in ("unwrap_dead_wrappers",) if hasattr(_functorch_utils, name)
    )
except (ImportError, AttributeError) as error:
    raise UnsupportedTorchError(
        f"surgeon needs a part of PyTorch that {torch.__version__} does not have ({error}); {_CURE}"
    ) from error

# Hooks that other code (activation checkpointing) has put on what autograd saves; 2.6 cannot tell.
_top_hooks = getattr(_autograd, "_top_saved_tensors_default_hooks", None)

# What torch.compile returns; its module is looked at only if somebody has imported it.
COMPILED = "torch._dynamo.eval_frame", "OptimizedModule"

NUMBERS_ASKED = DataDependentOutputException, DynamicOutputShapeException

# Loggers that speak of what is no news to a user: fake runs that fail, and an export that goes well.
FAKE_LOG = FakeTensorMode.__module__
EXPORT_LOGS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "torch._export")


def check_exporter(what: str) -> None:
    """Checks that this PyTorch can export to ONNX, before ``what`` begins to work.

    Raises:
        UnsupportedTorchError: It cannot; the message has the way out.
    """
    if torch.__version__.startswith(f"{_EXPORTS_AFTER}."):
        raise UnsupportedTorchError(
            f"{what} cannot be done by PyTorch {torch.__version__}, whose ONNX exporter fails on most "
            "networks: save a fold, surgeon.save_checkpoint(surgeon.fold(model), path), and export that with "
            "a newer one"
        )


def fake_of(mode: FakeTensorMode, meta: Tensor, device: torch.device, *, requires_grad: bool) -> FakeTensor:
    """A fake tensor on ``device`` with sizes and strides of ``meta``, which is changed: the two are one.

    The constructor takes thousands of weights in the time in which the mode's converter takes a hundred.
    """
    return FakeTensor(mode, meta.requires_grad_(requires_grad), device)


def checkpoint_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Function, arguments and options of a call of what `CHECKPOINT` names."""
    if CHECKPOINT[1] == "_checkpoint_impl":
        function, given, named = args
        return function, given, named, kwargs
    own = inspect.signature(checkpoint_itself).parameters.values()
    names = {one.name for one in own if one.kind is one.KEYWORD_ONLY} | {"preserve_rng_state"}
    options = {name: value for name, value in kwargs.items() if name in names}
    return args[0], args[1:], {name: kwargs[name] for name in kwargs.keys() - names}, options


@contextmanager
def functionalizing() -> Iterator[None]:
    """Inside, operators on tensors of `to_functional` write nothing in place."""
    _functionalize(reapply_views=True)
    try:
        yield
    finally:
        _functionalize_no_more()


def from_functional(tensor: Tensor) -> Tensor:
    """The tensor in one of `to_functional`, with all that was written to it; others as they are."""
    if not _is_functional(tensor):
        return tensor
    _sync(tensor)
    return _from_functional(tensor)


def saves_may_change() -> bool:
    """Whether autograd may be told what to save, and can tell who has told it so before."""
    return _top_hooks is not None and bool(_hooks_enabled())


def top_saving_hooks() -> Any:
    """The pair of hooks on what autograd saves that is in force, or None; asked if `saves_may_change`."""
    assert _top_hooks is not None
    return _top_hooks(False)


def under_vmap() -> bool:
    """Whether `torch.vmap` runs the caller; a compiler sees no."""
    return not torch.compiler.is_compiling() and any(one.key() == _vmap for one in _transforms() or ())


def transformed() -> bool:
    """Whether a transform of `torch.func`, or forward mode, looks on; a compiler sees none."""
    if torch.compiler.is_compiling():
        return False
    return bool(_transforms()) or _forward_mode._current_level >= 0
