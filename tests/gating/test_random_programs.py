"""Random straight-line forwards with in-place writes, views and several residual adds.

With every coin kept the gated step is the plain one; a branch that is skipped gives what the same branch
multiplied by zero gives. Both to float64 rounding, outputs and all gradients, for every pattern of coins.
"""

import itertools
import random
from typing import Any

import pytest
import torch
from blocks import coins, step
from torch import Tensor, nn

import surgeon
from surgeon.errors import NoResidualsError


def program(rng: random.Random) -> tuple[str, int]:
    """A straight-line forward over tensors of shape (rows, 4), and how many layers it has."""
    lines, names, layers = [], ["x"], 0
    kinds = ["layer"] * 4 + ["add"] * 4 + ["iadd", "add_", "relu_", "mul_", "scale", "view", "chunk", "size"]
    for n in range(rng.randint(3, 9)):
        a, b, new = rng.choice(names[-4:]), rng.choice(names[-4:]), f"v{n}"
        layer = f"self.l{layers}(torch.sin({a} * 1))"
        forms = {
            "layer": f"{new} = {layer}",
            "add": f"{new} = {a} + {b}",
            "iadd": f"{a} += {b}",
            "add_": f"{new} = {a}.add_({b})",
            "relu_": f"{a}.relu_()",
            "mul_": f"{a}.mul_(0.5)",
            "scale": f"{new} = {a} * 0.5",
            "view": f"{new} = {a}.view(-1, 2, 2).view(-1, 4)",
            "chunk": f"{new}, _ = torch.cat([{layer}, {b}], -1).chunk(2, -1)",
            "size": f"n, c = {b}.shape; {new} = {layer}.reshape(n, c)",
        }
        kind = rng.choice(kinds)
        lines.append(forms[kind])
        layers += "self.l" in forms[kind]
        if f"{new} = " in forms[kind] or f"{new}, " in forms[kind]:
            names.append(new)
    return "\n".join(
        ["def forward(self, x):", *(f"    {line}" for line in lines), f"    return {names[-1]}"]
    ), layers


class Random(nn.Module):
    """A network around one block with a random forward; what follows may write in place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)  # noqa: S311
        self.source, layers = program(rng)
        scope: dict[str, Any] = {"torch": torch}
        exec(self.source, scope)  # noqa: S102 - a program of this file
        block = type("Block", (nn.Module,), {"forward": scope["forward"]})()
        for i in range(layers):
            setattr(block, f"l{i}", nn.Linear(4, 4))
        self.stem, self.block, self.head = nn.Linear(4, 4), block, nn.Linear(4, 3)
        self.writes, self.rereads = rng.random() < 0.3, rng.random() < 0.3

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x) * 1
        y = self.block(h)
        if self.writes:
            y = y.mul_(3)
        return self.head(y) + (h.sum() if self.rereads else 0)


def agree(a: Any, b: Any) -> bool:
    """Equal to rounding, no gradient as good as zero."""

    def close(p: Tensor | None, q: Tensor | None) -> bool:
        if p is None or q is None:
            return all(t is None or not t.any() for t in (p, q))
        return torch.allclose(p, q, rtol=1e-9, atol=1e-12)

    return close(a[0], b[0]) and close(a[1], b[1]) and all(close(a[2][n], b[2][n]) for n in a[2])


def check_random_program(seed: int) -> int:
    """Kept coins give the plain numbers; a branch that is skipped gives those of one multiplied by zero."""
    torch.manual_seed(seed)
    model, x = Random(seed).double(), torch.randn(3, 4, dtype=torch.float64)
    try:
        plain = step(model, model, x)
        surgeon.apply(model, unit="batch", scaling="paper", example=x)
    except (RuntimeError, NoResidualsError):  # autograd refuses the program itself, or it has no residual add
        return 0
    names = [gate.name for gate in surgeon.status(model).gates]
    skipped = sum(gate.skips for gate in surgeon.status(model).gates)
    fates = [
        dict(zip(names, fate, strict=True)) for fate in itertools.product((True, False), repeat=len(names))
    ]
    results: dict[str, list[Any]] = {}
    for unit in ("batch", "sample"):
        surgeon.remove(model)
        surgeon.apply(model, unit=unit, scaling="paper", example=x)
        results[unit] = []
        for fate in fates[:8]:
            with coins(fate):
                results[unit].append(step(model, model, x))
        assert agree(results[unit][0], plain), model.source
    for fate, lifted, masked in zip(fates, results["batch"], results["sample"], strict=False):
        assert agree(lifted, masked), (fate, model.source, model.writes, model.rereads)
    return skipped


@pytest.mark.parametrize("part", range(2))
def test_random_programs(part: int) -> None:
    skipped = sum(check_random_program(seed) for seed in range(100 * part, 100 * part + 50))
    assert skipped >= 3  # the comparison was not empty


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(8))
def test_many_random_programs(part: int) -> None:
    first = 10_000 + 150 * part
    assert sum(check_random_program(seed) for seed in range(first, first + 150)) > 15
