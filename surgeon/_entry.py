"""Which weights of a checkpoint are the model's: an entry, the weights under one path of a file or folder.

The names of the model's state are looked for at the end of all names in all stores, however deep these lie
and whatever wrappers (DDP, a weight average, Lightning, ``torch.compile``) have put in front of them: timm's
``state_dict_ema.conv1.weight`` and Lightning's ``state_dict.model.conv1.weight`` both have ``conv1.weight``,
and what stands before it is the entry. The rule of choice:

1. the entry that has most of the model's names, and most of them in the model's shapes;
2. of several, the one whose path says that it is an average (``ema``, ``average``, ``swa``);
3. of several still, what is called ``state_dict`` or ``model``, as training scripts do;
4. of several still, the first, if all hold the same numbers. Else none: the caller has to say which.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._container import Store, read_stores
from surgeon._text import some
from surgeon.errors import CheckpointError

_AVERAGE = re.compile(r"(?:^|[._/-])(?:ema|swa|avg|averaged?|averaging)(?:[._/-]|$)", re.IGNORECASE)
_USUAL = re.compile(r"^(?:[^/]*/)?(?:state_dict|model)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Entry:
    """Weights as a checkpoint has them for a model.

    Attributes:
        name: Where they are in the file; empty where it holds nothing else.
        others: What else of the kind there is: entries that fit as well, and tensors beside the model's.
        state: The tensors by the model's names.
        prefix: What a wrapper has put in front of their names.
        noted: What PyTorch keeps beside a state dict, by the model's modules; None where the file has none.
        metadata: What the file says of itself.
    """

    name: str
    others: tuple[str, ...]
    state: dict[str, Tensor]
    prefix: str
    noted: dict[str, Mapping[str, Any]] | None
    metadata: dict[str, str]


def taken(name: str, others: tuple[str, ...]) -> str:
    """Which entry was taken, in words."""
    also = f"; there is also {some(others)}" if others else ""
    return f"taken from {name or 'the top of the file'}{also}"


@dataclass(frozen=True, slots=True)
class _Candidate:
    store: Store
    prefix: str
    fit: tuple[int, int]  # how many of the model's names, and how many in its shapes

    @property
    def name(self) -> str:
        return f"{self.store.path}.{self.prefix}".strip(".")

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, read, by the model's names."""
        held = self.store.tensors
        read = self.store.read({name: held[name] for name in held if name.startswith(self.prefix)})
        return {name.removeprefix(self.prefix): tensor for name, tensor in read.items()}


def find_entry(model: nn.Module, path: Path, wanted: str | None = None) -> Entry:
    """The model's weights in a checkpoint, by the rule above; whether they are all there is not checked.

    Args:
        model: The model; it is only read.
        path: A file or a folder.
        wanted: The entry to take: its name, or a part of the name that no other entry has.

    Raises:
        CheckpointError: The checkpoint cannot be read, holds no tensors, has no such entry, or several and
            nothing to choose by.
    """
    stores = [store for store in read_stores(path) if store.tensors]
    if not stores:
        raise CheckpointError(f"cannot use the checkpoint {path}: it holds no tensors by name")
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    candidates = [found for store in stores for found in _candidates(store, own)]
    best = max(found.fit for found in candidates)
    fitting = [found for found in candidates if 2 * found.fit[0] >= best[0]]
    if wanted is None:
        chosen = _by_rule([found for found in fitting if found.fit == best], path)
    else:
        chosen = _named(fitting, wanted, path)
    if not chosen.prefix and chosen.store.other:
        raise CheckpointError(
            f"cannot use the checkpoint {path}: not all of it are tensors: {some(chosen.store.other)}"
        )
    return _entry(chosen, fitting)


def _candidates(store: Store, own: Mapping[str, torch.Size]) -> list[_Candidate]:
    """Every path in front of names of the model; the part as a whole, where none fits better."""
    names, shapes = Counter[str](), Counter[str]()
    for name, tensor in store.tensors.items():
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            if name[start:] in own:
                names[name[:start]] += 1
                shapes[name[:start]] += tensor.shape == own[name[start:]]
    found = [_Candidate(store, prefix, (names[prefix], shapes[prefix])) for prefix in names]
    whole = _Candidate(store, "", (names[""], shapes[""]))
    better = [one for one in found if one.fit > whole.fit]
    return better or [whole]


def _by_rule(best: list[_Candidate], path: Path) -> _Candidate:
    if best[0].fit[0] == 0:  # nothing fits: the message is about the largest
        return max(best, key=lambda found: len(found.store.tensors))
    for likes in (_AVERAGE, _USUAL):
        best = [found for found in best if likes.search(found.name)] or best
    if len(best) > 1 and not _same(best):
        names = [found.name for found in best]
        raise CheckpointError(
            f"{path} has {len(names)} entries that fit alike, and nothing says which is meant: "
            f"{some(names)}. Name one: entry={names[0]!r} (--entry {names[0]}). Nothing was loaded."
        )
    return best[0]


def _same(candidates: list[_Candidate]) -> bool:
    first, *rest = (found.tensors() for found in candidates)
    return all(
        first.keys() == one.keys() and all(torch.equal(first[name], one[name]) for name in first)
        for one in rest
    )


def _named(fitting: list[_Candidate], wanted: str, path: Path) -> _Candidate:
    exact = [found for found in fitting if found.name == wanted]
    found = exact or [found for found in fitting if wanted.lower() in found.name.lower()]
    if len(found) != 1:
        names = [one.name or "(the whole file)" for one in found or fitting]
        what = "several entries" if found else "no entry"
        raise CheckpointError(f"{path} has {what} {wanted!r} with weights of this model: {some(names)}")
    return found[0]


def _entry(chosen: _Candidate, fitting: list[_Candidate]) -> Entry:
    store, prefix = chosen.store, chosen.prefix
    beside = dict.fromkeys(
        _head(name) for name, held in store.tensors.items() if held.ndim and not name.startswith(prefix)
    )
    others = dict.fromkeys(found.name for found in fitting if found is not chosen)
    left = [".".join(filter(None, (store.path, name))) for name in beside]
    others |= dict.fromkeys(name for name in left if not any(one.startswith(name) for one in others))
    return Entry(
        chosen.name, tuple(others), chosen.tensors(), prefix, _stripped(store.noted, prefix), store.metadata
    )


def _head(name: str) -> str:
    return name.partition(".")[0]


def _stripped(noted: Any, prefix: str) -> dict[str, Mapping[str, Any]] | None:
    if not isinstance(noted, Mapping):
        return None
    return {
        f"{name}."[len(prefix) : -1]: held
        for name, held in noted.items()
        if f"{name}.".startswith(prefix) and isinstance(held, Mapping)
    }
