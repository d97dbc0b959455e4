"""Gated blocks that are reordered, doubled, cut, built into larger models or taken out of them.

A gate's name is where its block is now. So what a checkpoint notes belongs to the weights beside it, whatever
has happened since `apply`: `load(save(model))` evaluates as the model did.
"""

import copy
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Plain, randomise
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import surgeon
from surgeon._checkpoint import read_weights
from surgeon._gating.gated import grouped_gates, placed_gates
from surgeon._load import noted_scales

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SCALINGS: dict[str, dict[str, Any]] = {
    "inverted": {"scaling": "inverted"},
    "paper": {"scaling": "paper"},
    "paper, kept": {"scaling": "paper", "keep_eval": True},
}


class Pair(nn.Module):
    """Two residual adds."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)


class Net(nn.Module):
    """A stem, ``n`` blocks and a head; every third block has two residual adds."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.Sequential(*(Pair() if i % 3 == 2 else Plain() for i in range(n)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


class Streams(nn.Module):
    """Two networks side by side."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.left(x) * self.right(x)
        return out


class Detector(nn.Module):
    """A network inside of another one that adds besides."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.neck, self.body = Plain().double(), nn.ModuleDict({"backbone": backbone})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body["backbone"](self.neck(x))
        return out


def picked(*order: int) -> Callable[[Net], nn.Module]:
    """The blocks in another order; one that comes twice is a copy, with weights of its own."""

    def move(model: Net) -> nn.Module:
        used: set[int] = set()
        blocks = [
            copy.deepcopy(model.blocks[i]) if i in used else (used.add(i), model.blocks[i])[1] for i in order
        ]
        model.blocks = randomise(nn.Sequential(*blocks), seed=5).double()
        return model

    return move


def inserted(model: Net) -> nn.Module:
    model.blocks.insert(1, randomise(Plain()).double())  # without a gate
    return model


def shared(model: Net) -> nn.Module:
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[1], model.blocks[1], model.blocks[2])
    return model


def renamed(model: Net) -> nn.Module:
    model.trunk = model.blocks  # a second name for all of them
    return model


def deleted(model: Net) -> nn.Module:
    del model.blocks[1]
    return model


def second_half(model: Net) -> nn.Module:
    return model.blocks[2:]


def two_streams(model: Net) -> nn.Module:
    other = surgeon.apply(
        randomise(Net(3), seed=8).double(), "uniform", drop_rate=0.3, scaling="paper", example=X
    )
    return Streams(model, other)


WAYS: dict[str, Callable[[Net], nn.Module]] = {
    "as it was": lambda model: model,
    "reordered": picked(2, 0, 3, 1),
    "reversed": picked(3, 2, 1, 0),
    "a block twice": picked(0, 1, 1, 2),
    "all of them twice": picked(0, 1, 2, 3, 0, 1, 2, 3),
    "pruned inside": picked(0, 3),
    "the first one cut": picked(1, 2, 3),
    "deleted": deleted,
    "a plain block inserted": inserted,
    "one block in two places": shared,
    "a second name": renamed,
    "built into a detector": Detector,
    "in a list": lambda model: nn.Sequential(nn.Linear(4, 4).double(), model),
    "its encoder alone": lambda model: model.blocks,
    "half of its encoder": second_half,
    "one block alone": lambda model: model.blocks[2],
    "twins": lambda model: Streams(model, copy.deepcopy(model)),
    "two streams": two_streams,
}


def stock(model: nn.Module) -> nn.Module:
    """The same without gates, and with other weights."""
    return randomise(surgeon.remove(copy.deepcopy(model)), seed=3).double().eval()


def saved(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(model.state_dict(), path)
        return path
    return surgeon.save_checkpoint(model, path)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_says_what_its_weights_need_wherever_they_are(
    way: str, scaling: str, tmp_path: Path
) -> None:
    """Into a stock model, and back into the very model: in both file formats."""
    gated = surgeon.apply(randomise(Net()).double(), drop_rate=0.6, example=X, **SCALINGS[scaling])
    model = WAYS[way](gated).eval()
    expected = model(X)
    assert torch.allclose(surgeon.fold(model, example=X)(X), expected, rtol=1e-10, atol=1e-12)
    for kind in ("pt", "safetensors"):
        path = saved(model, tmp_path / f"model.{kind}")
        plain = stock(model)
        surgeon.load(plain, path, example=X)
        assert torch.allclose(plain(X), expected, rtol=1e-10, atol=1e-12), kind
        weights = copy.deepcopy(model.state_dict())
        report = surgeon.load(model, path, example=X)
        assert not report.converted
        assert all(
            torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True)
        )
        assert torch.equal(model(X), expected)


def test_without_the_note_the_weights_are_not_enough(tmp_path: Path) -> None:
    """Negative control: the scales matter."""
    model = picked(2, 0, 3, 1)(surgeon.apply(randomise(Net()).double(), scaling="paper", example=X)).eval()
    plain = surgeon.remove(copy.deepcopy(model))
    assert (plain(X) - model(X)).abs().max() > 0.01


def test_names_are_those_of_the_modules_now() -> None:
    model: Any = surgeon.apply(Net().double(), drop_rate=0.4, example=X)
    assert [g.name for g in surgeon.status(model).gates] == [
        "blocks.0.add", "blocks.1.add", "blocks.2.add", "blocks.2.add_1", "blocks.3.add",
    ]  # fmt: skip
    picked(2, 0)(model)
    status = surgeon.status(Detector(model))
    assert [(g.name, g.block) for g in status.gates] == [
        (f"body.backbone.{add}", f"body.backbone.{block}")
        for add, block in (
            ("blocks.0.add", "blocks.0"), ("blocks.0.add_1", "blocks.0"), ("blocks.1.add", "blocks.1"),
        )
    ]  # fmt: skip
    assert [round(g.drop_rate, 3) for g in status.gates] == [0.3, 0.3, 0.1]


class Backwards(nn.Module):
    """Its blocks run the other way round than its modules are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = Plain(), Plain()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.late(self.early(x))
        return out


@pytest.mark.parametrize("around", [lambda m: m, Detector, lambda m: nn.Sequential(nn.Identity(), m)])
def test_the_order_is_that_in_which_the_places_ran(around: Callable[[nn.Module], nn.Module]) -> None:
    model = around(surgeon.apply(Backwards().double(), drop_rate=0.4, example=X))
    gates = surgeon.status(model).gates
    assert [(g.name.rpartition(".")[0][-5:], g.drop_rate) for g in gates] == [
        ("early", 0.2),
        (".late"[-5:], 0.4),
    ] or [(g.block.rpartition(".")[2], g.drop_rate) for g in gates] == [("early", 0.2), ("late", 0.4)]


def test_a_new_rate_counts_the_blocks_as_they_are_now() -> None:
    model: Any = surgeon.apply(Net().double(), drop_rate=0.4, example=X)
    surgeon.set_drop_rate(picked(3, 0)(model), 0.4)
    assert [g.drop_rate for g in surgeon.status(model).gates] == [0.2, 0.4]


def test_each_of_several_networks_is_counted_by_itself() -> None:
    left = surgeon.apply(Net().double(), drop_rate=0.4, example=X)
    model = Streams(left, surgeon.apply(Net(2).double(), "uniform", drop_rate=0.2, example=X))
    assert [len(group) for group in grouped_gates(model)] == [5, 2]
    surgeon.set_drop_rate(model, 0.8)
    rates = [g.drop_rate for g in surgeon.status(model).gates]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.8, 0.8, 0.8])
    assert "linear, uniform" in str(surgeon.status(model))
    twins = Streams(left, copy.deepcopy(left))
    assert [len(group) for group in grouped_gates(twins)] == [5, 5]


def test_a_shallow_copy_of_a_block_is_no_second_gate() -> None:
    model: Any = surgeon.apply(Net().double(), example=X)
    model.blocks.append(copy.copy(model.blocks[0]))
    names = [placed.name for placed in placed_gates(model)]
    assert len(names) == len(set(names)) == 5


def insert(model: Any, blocks: list[nn.Module], draw: Callable[..., int]) -> nn.Module:
    return put(model, [*blocks, randomise(Plain(), seed=draw(0, 9)).double()])  # without a gate


def put(model: Any, blocks: Sequence[nn.Module]) -> nn.Module:
    """The same network, with these blocks."""
    network(model).blocks = nn.Sequential(*blocks)
    return model


def network(model: nn.Module) -> Any:
    """The network inside of whatever it was built into."""
    return next(module for module in model.modules() if isinstance(module, Net))


MOVES: dict[str, Callable[[Any, list[nn.Module], Callable[..., int]], nn.Module]] = {
    "permute": lambda model, blocks, draw: put(
        model,
        random.Random(draw(0, 99)).sample(blocks, len(blocks)),  # noqa: S311 - no secret
    ),
    "delete": lambda model, blocks, draw: put(model, blocks[:1] + blocks[1 + draw(1, 3) :]),
    "duplicate": lambda model, blocks, draw: put(
        model, [*blocks, randomise(copy.deepcopy(blocks[draw(0, len(blocks) - 1)]), seed=draw(0, 9)).double()]
    ),
    "in two places": lambda model, blocks, draw: put(model, [*blocks, blocks[draw(0, len(blocks) - 1)]]),
    "insert": insert,
    "nest": lambda model, _blocks, draw: [Detector, nn.Sequential, lambda m: nn.Sequential(nn.Tanh(), m)][
        draw(0, 2)
    ](model),
}


def moved(model: nn.Module, data: st.DataObject) -> nn.Module:
    """After up to five moves, one upon another, and perhaps cut to its blocks, in evaluation."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    for move in data.draw(st.lists(st.sampled_from(list(MOVES)), max_size=5)):
        model = MOVES[move](model, list(network(model).blocks), draw)
    return (network(model).blocks if data.draw(st.booleans()) else model).eval()


def is_the_identity(scaling: str, data: st.DataObject) -> None:
    """Into a stock twin, one with gates of another schedule, and the very model, from both file formats."""
    gated = surgeon.apply(randomise(Net()).double(), drop_rate=0.6, example=X, **SCALINGS[scaling])
    model = moved(gated, data)
    assume(placed_gates(model))  # a plain block may be all that is left
    expected = model(X)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("pt", "safetensors"):
            path, plain = saved(model, Path(folder) / f"model.{kind}"), stock(model)
            other = surgeon.apply(
                copy.deepcopy(plain), "uniform", drop_rate=0.3, scaling="paper", keep_eval=True, example=X
            )
            for target in (plain, other):
                surgeon.load(target, path, example=X)
                assert torch.allclose(target(X), expected, rtol=1e-10, atol=1e-12), kind
            assert not surgeon.load(model, path, example=X).converted
            assert torch.equal(model(X), expected)


@pytest.mark.parametrize("scaling", SCALINGS)
@given(data=st.data())
@settings(max_examples=4, deadline=None, derandomize=True)
def test_load_of_save_is_the_identity_after_any_moves(scaling: str, data: st.DataObject) -> None:
    is_the_identity(scaling, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scaling", SCALINGS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_load_of_save_is_the_identity_after_many_moves(scaling: str, data: st.DataObject) -> None:
    is_the_identity(scaling, data)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_part_of_what_was_saved(kind: str, scaling: str, tmp_path: Path) -> None:
    """The encoder's part of a file of the whole network, under names of its own, in a network of its own."""
    model = surgeon.apply(randomise(Net()).double(), drop_rate=0.6, example=X, **SCALINGS[scaling]).eval()
    entry = read_weights(model, saved(model, tmp_path / f"whole.{kind}"))
    state, metadata = entry.state, entry.metadata
    part = {name.removeprefix("blocks."): t for name, t in state.items() if name.startswith("blocks.")}
    scales = {name.removeprefix("blocks."): scale for name, scale in noted_scales(metadata).items()}
    plain = stock(model.blocks)
    path = tmp_path / "part.safetensors"
    save_file(part, path, {"weights": "gated", "scales": json.dumps(scales)})
    surgeon.load(plain, path, example=X)
    assert torch.allclose(plain(X), model.blocks(X), rtol=1e-10, atol=1e-12)
    if scaling == "paper":  # negative control
        save_file(part, path, {"weights": "stock"})
        surgeon.load(plain, path, example=X)
        assert (plain(X) - model.blocks(X)).abs().max() > 1e-3
