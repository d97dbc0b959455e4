"""What was measured before, in a file: a lesion that was stopped goes on, and `prune` finds it done."""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon._pruning.score import Worth
from surgeon._torch import pytree
from surgeon.errors import UsageError


class Known:
    """The worths of one network without some of its branches, by those branches.

    A line of the file says for which weights and data it holds; other lines are left alone.

    Args:
        path: Where they are kept, line by line; None: nowhere.
        mark: Of the network and the data.

    Raises:
        UsageError: The file is none of these.
    """

    def __init__(self, path: Path | None, mark: str) -> None:
        self.path, self.mark = path, mark
        self.held: dict[frozenset[str], Worth] = {}
        if path is None or not path.exists():
            return
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            own = [line for line in lines if line["of"] == mark]
            self.held = {frozenset(line["without"]): Worth(**line["worth"]) for line in own}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{path} is no cache of lesions ({error}); name another file") from error

    def get(self, names: Collection[str]) -> Worth | None:
        return self.held.get(frozenset(names))

    def put(self, names: Collection[str], worth: Worth) -> None:
        self.held[frozenset(names)] = worth
        if self.path is not None:
            line = {"of": self.mark, "without": sorted(names), "worth": asdict(worth)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def marked(model: nn.Module, batches: Iterable[Any]) -> str:
    """A mark of a network's code and numbers and of some batches; other ones have another."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        _add(digest, tensor)
    for leaf in pytree.tree_leaves(list(batches)):
        _add(digest, leaf)
    return digest.hexdigest()[:16]


def _add(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
