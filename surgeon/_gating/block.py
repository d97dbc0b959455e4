"""Installs gated forwards on a block, and takes them off.

The block keeps its identity: its ``__class__`` becomes a generated subclass of its class (as in
`torch.nn.utils.parametrize`) with the same name, whose forward runs the generated code. A block that
evaluates as it did without gates has a twin of that class, without a forward of its own: nothing stands
between the call and the block's code. ``training`` decides, whoever sets it. Gates are no submodules: they
have no weights, and ``children()`` of a block must stay what it was. `ungate_block` puts the class back.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._finding.findings import gate_name
from surgeon._gating.around import inside, run_around
from surgeon._gating.forwards import Gating
from surgeon._tracing.trace import Made, Unannounced, portable, revived
from surgeon.errors import CheckpointError, WrappedModelError

NOTE = "surgeon_scales"
"""Where the metadata beside a ``state_dict`` notes the evaluation scales of a block's gates."""


class GatedBlock(Unannounced, nn.Module):
    """Mixed into the class of a gated block, in front of it."""

    _ungated: type[nn.Module]
    _surgeon: Gating

    def __setattr__(self, name: str, value: Any) -> None:
        gating = gating_of(self) if name == "forward" else None
        if gating is not None:  # on the block it would hide the gates; the gated forward put back is none
            own = getattr(value, "__func__", None) is gated_class(self._ungated).forward
            gating.replaced = None if own else value
        else:
            super().__setattr__(name, value)
        # Taking off what parametrize put on brings back the class of that time, whatever the block does now.
        if name in ("training", "__class__", "forward"):
            settle_class(self)

    def __delattr__(self, name: str) -> None:
        gating = gating_of(self)
        if name == "forward" and gating is not None and gating.replaced is not None:
            gating.replaced = None
            settle_class(self)
        else:
            super().__delattr__(name)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        settle_class(self)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        settle_device(self)
        return moved

    def extra_repr(self) -> str:
        gating, own = gating_of(self), super().extra_repr()
        if gating is None:
            return own
        gates = ", ".join(f"{gate_name('', g.branch.ordinal)} p={g.survival:.4g}" for g in gating.gates)
        return f"{own}, gates: {gates}" if own else f"gates: {gates}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Beside the keys, which stay stock: torch.save keeps this, and `surgeon.load` reads it.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        noted = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if noted is not None and any(scale != 1.0 for _, scale in _table(self)):
            noted[NOTE] = _table(self)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        noted = local_metadata.get(NOTE)
        own = _table(self)
        if noted is not None and own and [tuple(row) for row in noted] != own:
            raise CheckpointError(
                f"{_block_name(self)}: the checkpoint was trained with the evaluation scales "
                f"{_spoken(noted)}, the model's are {_spoken(own)}; {_LOAD}"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        _, _, *rest = reduced
        return (_revive, (portable(self._ungated), isinstance(self, KeepingBlock)), *rest)


class KeepingBlock(GatedBlock):
    """A gated block whose weights were divided by its gates' scales: `surgeon.apply(..., keep_eval=True)`.

    Such weights mean something else than those of the stock model under the same names. So the ``state_dict``
    carries the scales along, as the extra state that PyTorch provides for, and no strict load can confuse the
    two.
    """

    def get_extra_state(self) -> Tensor:
        """Place among the block's additions and scale of each gate, one row per gate, in float64."""
        return torch.tensor(_table(self), dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Checks that weights which come in were divided by the scales of these gates.

        Raises:
            CheckpointError: They were not.
        """
        own = self.get_extra_state()
        if not (isinstance(state, Tensor) and state.shape == own.shape and _close(state, own)):
            noted = state.tolist() if isinstance(state, Tensor) and state.ndim == 2 else ()
            raise CheckpointError(
                f"{_block_name(self)}: the checkpoint's weights were divided by the scales {_spoken(noted)}, "
                f"the model's are {_spoken(own.tolist())}; {_LOAD}"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Also where a load is not strict; a part of the state that leaves the block out may come in.
        if gating_of(self) and prefix + "_extra_state" not in state_dict and state_dict:
            raise CheckpointError(
                f"{_block_name(self)}: these weights are not from a model gated with keep_eval=True, so its "
                f"gates would scale a branch that was never divided by their scales; {_LOAD}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


_LOAD = "surgeon.load(model, file) converts them"


def _table(block: GatedBlock) -> list[tuple[int, float]]:
    """Place and scale of each gate that still acts; empty for a slice of a gated block."""
    gating = gating_of(block)
    return [(g.branch.ordinal, g.scale) for g in gating.gates if not g.folded] if gating else []


def _close(state: Tensor, own: Tensor) -> bool:
    return torch.allclose(state.to(own), own, rtol=max(1e-6, 4 * torch.finfo(state.dtype).eps), atol=0)


def _block_name(block: nn.Module) -> str:
    gating = gating_of(block)
    return (gating.name if gating else "") or type(block).__name__


def _spoken(table: Sequence[Any]) -> str:
    return ", ".join(f"{scale:.4g}" for _, scale in table) or "(none)"


def _revive(ungated: type[nn.Module] | Made, keeping: bool = False) -> nn.Module:
    cls = gated_class(revived(ungated), keeping=keeping)
    block: nn.Module = cls.__new__(cls)
    return block


_classes: dict[tuple[type[nn.Module], bool], tuple[type[nn.Module], type[nn.Module]]] = {}


def gated_class(cls: type[nn.Module], *, keeping: bool = False) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward runs a block's gates; of the same name, in the same module.

    Args:
        cls: The block's class.
        keeping: For a `KeepingBlock`.
    """
    if issubclass(cls, GatedBlock):  # a slice or a sibling of a gated block has its class and no gates
        cls = cls._ungated
    if (cls, keeping) not in _classes:
        _classes[cls, keeping] = _twins(cls, KeepingBlock if keeping else GatedBlock)
    return _classes[cls, keeping][0]


def _twins(cls: type[nn.Module], kind: type[GatedBlock]) -> tuple[type[nn.Module], type[nn.Module]]:
    """The class with gates, and the one that evaluates as ``cls`` does."""
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A slice of a gated Sequential is of the gated class and has no gates.
        gating = self.__dict__.get("_surgeon")
        if gating is None:
            return cls.forward(self, *args, **kwargs)
        if gating.replaced is not None and gating.wrapped(self) and not inside(self):
            needed = self.training or not gating.evaluates_plainly
            return run_around(self, gating.replaced, args, kwargs, _block_name(self) if needed else "")
        if not self.training and gating.evaluates_plainly:
            return gating.forward(self)(self, *args, **kwargs)
        return gating.run(self, args, kwargs)

    def bears(heir: Any, /, **_: Any) -> None:
        heir.forward = forward  # what FSDP or parametrize make of an evaluating block has to train as well

    body = {
        "_ungated": cls,
        "_ungated_forward": original,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    gated = type(cls.__name__, (kind, cls), body | {"forward": forward})
    plain = type(cls.__name__, (kind, cls), body | {"__init_subclass__": classmethod(bears)})
    for twin in (gated, plain):
        twin._twins = gated, plain  # type: ignore[attr-defined]
    return gated, plain


def settle_class(block: nn.Module) -> None:
    """Gives a gated block the class for what it does now; one that others made of it stays."""
    twins = vars(type(block)).get("_twins")
    if twins is None:
        return
    gating = block.__dict__.get("_surgeon")
    plain = gating is not None and gating.evaluates_plainly and gating.replaced is None
    wanted = twins[plain and not block.training]
    if type(block) is not wanted:
        object.__setattr__(block, "__class__", wanted)


def settle_device(block: nn.Module) -> None:
    """Puts what a compiled graph reads of a block's gates where the block is."""
    gating = block.__dict__.get("_surgeon")
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    if gating is not None:
        for gate in gating.gates:
            gate.move(device)


def gate_block(block: nn.Module, gating: Gating) -> None:
    """Installs ``gating`` on ``block``; the block's class becomes a subclass of what it was.

    Where it is interrupted, `ungate_block` undoes what it did.
    """
    cls = gated_class(type(block), keeping=any(gate.keeps_eval for gate in gating.gates))
    block.__dict__["_surgeon"] = gating
    block.__class__ = cls
    settle_class(block)
    settle_device(block)


def check_class(name: str, block: nn.Module) -> None:
    """Checks that a gated block has the class that `gate_block` gave it, so that `ungate_block` undoes it.

    Raises:
        WrappedModelError: Something else has changed the block's class since, and would be undone with it.
    """
    if "_ungated" not in vars(type(block)):
        raise WrappedModelError(
            f"{name or 'the model'} has become a {type(block).__name__} since surgeon.apply, by fully_shard, "
            "parametrize or the like, which would be lost with its gates. Take that off first, or call "
            "surgeon.load with the weights on a model without it, gated or not"
        )


def ungate_block(block: nn.Module) -> None:
    """Gives ``block`` its own class back and takes its gates away, as far as it has them."""
    without_gates(block)
    block.__dict__.pop("_surgeon", None)


def without_gates(block: nn.Module) -> None:
    """Gives ``block`` its own class and forward back; its gates are still on it, and do nothing."""
    if isinstance(block, GatedBlock):
        block.__class__ = type(block)._ungated  # type: ignore[assignment]
    gating = block.__dict__.get("_surgeon")
    if gating is not None and gating.replaced is not None:
        block.__dict__["forward"] = gating.replaced


def gating_of(module: nn.Module) -> Gating | None:
    """The gating of a gated block, else None."""
    return module.__dict__.get("_surgeon") if isinstance(module, GatedBlock) else None
