"""Refuses models that are wrapped: surgery is done on the plain module, wrapping comes after."""

import gc
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from surgeon._torch import COMPILED
from surgeon.errors import UsageError, WrappedModelError


def check_plain(model: nn.Module) -> None:
    """Checks that ``model`` is a plain, writable ``torch.nn.Module``; it is only read.

    Raises:
        UsageError: It is no module, or it is a TorchScript module.
        WrappedModelError: It is, or holds, a wrapper; the message gives the line to write instead.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "model is a TorchScript module, whose code cannot be edited; give the module it was made from"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(
                f"{name} is not initialised yet (a lazy module); run the model once on real data first"
            )
    for name, module in model.named_modules():
        for is_wrapper, what, instead in _WRAPPERS:
            if is_wrapper(module):
                where = f"its submodule {name}" if name else "the model"
                raise WrappedModelError(f"{where} is {what}; gates go in before that: {instead}")


def check_filled(model: nn.Module) -> None:
    """Checks that the weights of ``model`` are somewhere; it is only read.

    Raises:
        UsageError: One is on the meta device.
    """
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise UsageError(
                f"{type(model).__name__} has no weights yet: {name} is on the meta device; "
                "call model.to_empty(device=...) first"
            )


def held_elsewhere(model: nn.Module) -> list[str]:
    """What else holds weights for a network that evaluates without scales; ``model`` is only read.

    Adapters of PEFT are trained along, and go out alone; an average keeps the forward of its own copy.
    """
    found = []
    if any(map(_is_adapter, model.modules())):
        found.append(
            "the model has adapters of PEFT: trained under scaling='paper' they fit a network that "
            "evaluates with the scales of its gates, and not the stock base that they are saved for. "
            "Deliver the folded network with its adapters merged"
        )
    averages = tuple(cls for package, *kinds in _AVERAGES for cls in _classes(package, kinds))
    for one in [one for one in gc.get_objects() if issubclass(type(one), averages)]:
        if _is_copy(one.module, model):
            kind = type(one).__name__
            found.append(
                f"a {kind} holds a copy of such a {type(model).__name__} without gates: fed with weights "
                "that scaling='paper' trains, it evaluates without their scales. Make it after surgeon.apply"
            )
    return found


def _is_copy(other: nn.Module, model: nn.Module) -> bool:
    """Whether ``other`` is a copy of ``model`` without gates: the same class, names and numbers."""
    if type(other) not in type(model).__mro__[:3] or any("_surgeon" in vars(m) for m in other.modules()):
        return False
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    return own.keys() == others.keys() and all(
        own[n].shape == p.shape and own[n].device == p.device and torch.equal(own[n], p)
        for n, p in others.items()
    )


def _from(package: str, *names: str) -> Callable[[nn.Module], bool]:
    """A test for instances of classes of a package that is imported only if the user has imported it."""
    return lambda module: isinstance(module, _classes(package, names))


def _classes(package: str, names: Sequence[str]) -> tuple[type, ...]:
    home = sys.modules.get(package)
    return tuple(cls for name in names if isinstance(cls := getattr(home, name, None), type))


_is_adapter = _from("peft.tuners.tuners_utils", "BaseTunerLayer")
_AVERAGES = (
    ("torch.optim.swa_utils", "AveragedModel"),
    ("timm.utils.model_ema", "ModelEmaV2", "ModelEmaV3"),
)


_WRAPPERS: tuple[tuple[Callable[[nn.Module], bool], str, str], ...] = (
    (
        _from("torch.nn.parallel", "DistributedDataParallel", "DataParallel"),
        "wrapped for data parallelism",
        "DistributedDataParallel(surgeon.apply(model)), where model is the wrapper's .module",
    ),
    (
        _from(*COMPILED),
        "compiled by torch.compile",
        "torch.compile(surgeon.apply(model)), where model is the compiled one's ._orig_mod",
    ),
    (
        _from("torch.distributed.fsdp", "FSDPModule", "FullyShardedDataParallel"),
        "sharded by FSDP",
        "call surgeon.apply(model) first, then fully_shard each block and the model",
    ),
    (
        _from("torch.optim.swa_utils", "AveragedModel"),
        "a weight average",
        "AveragedModel(surgeon.apply(model)), where model is the average's .module",
    ),
    (
        _from("timm.utils.model_ema", "ModelEma", "ModelEmaV2", "ModelEmaV3"),
        "an EMA of a model",
        "ModelEmaV3(surgeon.apply(model)), where model is the EMA's .module",
    ),
)
