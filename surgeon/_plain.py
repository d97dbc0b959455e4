"""Refuses models that are wrapped: surgery is done on the plain module, wrapping comes after."""

import sys
from collections.abc import Callable

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


def _from(package: str, *names: str) -> Callable[[nn.Module], bool]:
    """A test for instances of classes of a package that is imported only if the user has imported it."""

    def test(module: nn.Module) -> bool:
        home = sys.modules.get(package)
        classes = tuple(cls for name in names if isinstance(cls := getattr(home, name, None), type))
        return isinstance(module, classes)

    return test


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
