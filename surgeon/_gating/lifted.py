"""The branch of one residual add as a function of its own, and what runs of it on some of the rows."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from surgeon._gating.gate import Gate
from surgeon._gating.ranks import several
from surgeon._gating.regions import Branch
from surgeon._gating.rowops import SMALL, parted, take
from surgeon._gating.saved_tensors import saved_once
from surgeon._torch import FakeTensorMode, saves_may_change
from surgeon._tracing.fake import to_fake
from surgeon._tracing.nests import tensors
from surgeon._tracing.oplog import OpLog
from surgeon._tracing.state import attribute
from surgeon._tracing.undisturbed import undisturbed


@dataclass(frozen=True, slots=True)
class Lifted:
    """A branch as a function of its own.

    Attributes:
        run: ``run(block, *inputs)``, the gates of sums inside it last.
        rows: Which inputs have one entry per sample, or one for all, by place; the others go in whole.
        owns: Submodules and parameters of the block that it uses.
        feeds: Which inputs reach the result through the branch alone, by place; of a nest a part may.
        saved: Which of ``rows`` autograd saves whole anyway, see `surgeon._gating.saved_tensors`.
        single: Tensors that have one entry for all and must have, by the input's place and theirs in it.
        gates: The gates of sums inside the branch, by their place among those of the block.
    """

    run: Branch
    rows: tuple[int, ...]
    owns: tuple[str, ...]
    feeds: tuple[int, ...]
    saved: tuple[int, ...] = ()
    single: tuple[tuple[int, int], ...] = ()
    gates: tuple[int, ...] = ()

    def odd(self, count: int, inputs: Sequence[Any]) -> bool:
        """Whether an input has neither one entry for each of ``count`` rows nor one for all."""
        if any(inputs[i].shape[0] not in (1, count) for i in self.rows):
            return True
        return bool(self.single) and any(tensors(inputs[i])[place].shape[0] != 1 for i, place in self.single)

    def asks_ranks(self, gate: Gate, block: nn.Module) -> bool:
        """Whether it takes statistics over ranks that draw otherwise: all of them have to run it."""
        if not several() or gate.decided.ranks is not None:
            return False
        return any(isinstance(module, nn.SyncBatchNorm) for module in self._modules(block))

    def hooked(self, block: nn.Module) -> bool:
        """Whether hooks look on, which must not see fake tensors."""
        return any(m._forward_pre_hooks or m._forward_hooks for m in self._modules(block))

    def gathered(
        self, shortcut: Tensor, onto: str, rows: Tensor, inputs: Sequence[Any]
    ) -> tuple[Tensor, list[Any]]:
        """What the result is added to, and the inputs for the surviving rows."""
        into, own = shortcut, None
        if onto != "shortcut" and any(inputs[i] is shortcut for i in self.rows):
            into, own = parted(shortcut, rows)
        taken = list(inputs)
        for i in self.rows:
            value: Tensor = inputs[i]
            if value is shortcut and own is not None:
                taken[i] = own
            elif value.shape[0] == shortcut.shape[0]:  # else one entry for all, spread over any number
                taken[i] = take(value, rows)
        return into, taken

    def on_rows(self, block: nn.Module, inputs: Sequence[Any], taken: list[Any], rows: Tensor) -> Tensor:
        """Runs on the rows that were taken."""
        parts = []
        if self.saved and not is_compiling():
            parts = [(taken[i], inputs[i]) for i in self.saved if _worth_hooks(inputs[i])]
        if not parts or not saves_may_change():
            return self.run(block, *taken)
        with saved_once(parts, rows):
            return self.run(block, *taken)

    def on_fake(self, block: nn.Module, inputs: Sequence[Any]) -> Tensor | None:
        """What it gives, as a fake tensor; None if it does not run on such."""
        log = OpLog(FakeTensorMode(allow_non_fake_inputs=True))
        with undisturbed(block), torch.no_grad(), suppress(Exception):
            given = to_fake(log.fake, tuple(inputs))
            with log.fake, log:
                return self.run(block, *given)
        return None

    def types(self, block: nn.Module) -> frozenset[torch.dtype]:
        """The types of its weights. They may change at any time, so this asks each, without detours."""
        found, children = set[torch.dtype](), block._modules
        todo: list[Any] = [children.get(name) or attribute(block, name) for name in self.owns]
        while todo:
            one = todo.pop()
            if isinstance(one, nn.Module):
                if one._modules:
                    todo += one._modules.values()
                found.update([t.dtype for t in one._parameters.values() if t is not None])
            elif isinstance(one, Tensor):
                found.add(one.dtype)
        return frozenset([dtype for dtype in found if dtype.is_floating_point])

    def idle(self, block: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
        """Every tensor that would have had its gradient from the branch alone, parameters once.

        Inputs are not compared: a compiled graph that looks at their identity holds for one step.
        """
        given = [t for i in self.feeds for t in tensors(inputs[i])]
        return [t for t in (*weights_of(block, self.owns), *given) if t.requires_grad]

    def _modules(self, block: nn.Module) -> Iterator[nn.Module]:
        for name in self.owns:
            value = attribute(block, name)
            yield from value.modules() if isinstance(value, nn.Module) else ()


def weights_of(block: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The weights of a block under some names, and those of its children of that name; each once."""
    found: dict[int, Tensor] = {}
    for name in names:
        value = attribute(block, name)
        own = value.parameters() if isinstance(value, nn.Module) else (value,)
        found |= {id(t): t for t in own if isinstance(t, Tensor)}
    return list(found.values())


def autocast(device: torch.device) -> torch.dtype | None:
    """What autocast has layers compute in on that device; None where it is off."""
    kind = device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else None


def _worth_hooks(whole: Tensor) -> bool:
    """Whether to keep a tensor from being saved twice; a small one takes less than the hooks' time."""
    return whole.requires_grad and whole.numel() >= SMALL
