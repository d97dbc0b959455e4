"""Pruned networks: the numbers of the full one without those branches, and nothing left of them."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from blocks import BasicBlock, Net, Plain, Twice, randomise
from folds import made_anew, zoo_randomised
from torch import Tensor, nn
from torch.nn import functional

import surgeon
from surgeon._gating.gated import gates_of
from surgeon._pruning.pruned import PrunedBlock
from surgeon.errors import NoResidualsError, PruneError, UnseenCallError, UsageError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def without(model: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
    """The oracle: the full network with these branches multiplied by zero, by gates of the paper's kind."""
    gated = surgeon.apply(copy.deepcopy(model), scaling="paper", example=x).eval()
    for name, gate in zip([g.name for g in surgeon.status(gated).gates], gates_of(gated), strict=True):
        gate.scale = 0.0 if name in names else 1.0
    with torch.no_grad():
        return gated(x)


ZOO = [
    ("test_resnet", 64),
    ("test_vit", 160),
    pytest.param("swin_tiny_patch4_window7_224", 56, marks=pytest.mark.slow),
    pytest.param("convnext_atto", 32, marks=pytest.mark.slow),
    ("torchvision:mobilenet_v3_small", 32),
]


@pytest.mark.parametrize(("name", "size"), ZOO)
def test_models_of_the_zoo_lose_a_quarter_of_their_branches(name: str, size: int) -> None:
    model = zoo_randomised(made_anew(name, size))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    names = [r.name for r in surgeon.find(model, x)]
    drop = names[::4]
    pruned = surgeon.prune(model, drop, example=x)
    with torch.no_grad():
        expected, full, got = without(model, drop, x), model(x), pruned(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(full, expected, rtol=1e-6)  # the branches do count
    assert len(surgeon.find(pruned, x)) == len(names) - len(drop)
    assert pruned.state_dict().keys() < model.state_dict().keys()
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    pruned.train()(x).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


class Net2(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def test_a_block_of_nothing_but_its_branch_becomes_an_identity() -> None:
    model = randomise(Net2(Plain(), Plain(), Plain()))
    pruned = surgeon.prune(model, ["blocks.1.add"], example=X)
    assert type(pruned.blocks[1]) is nn.Identity
    assert type(model.blocks[1]) is Plain
    assert set(pruned.state_dict()) == {k for k in model.state_dict() if not k.startswith("blocks.1.")}
    by_hand = model.head(model.blocks[2](model.blocks[0](X)))
    assert torch.equal(pruned(X), by_hand)


def test_a_projection_shortcut_and_what_follows_the_sum_stay() -> None:
    model = randomise(nn.Sequential(BasicBlock(project=True), BasicBlock())).eval()
    pruned = surgeon.prune(model, ["*.add"], example=IMAGES)
    first = model[0]
    by_hand = torch.relu(torch.relu(first.downsample(IMAGES)))
    assert torch.equal(pruned(IMAGES), by_hand)
    assert [n for n, _ in pruned[0].named_children()] == ["relu", "downsample"]
    assert [n for n, _ in pruned[1].named_children()] == ["relu"]
    assert "deleted: add" in repr(pruned[0])
    assert isinstance(pruned[0], BasicBlock) and pruned[0].__class__.__name__ == "BasicBlock"


def test_an_activation_in_place_behind_a_deleted_sum_leaves_the_shortcut_alone() -> None:
    class Reads(nn.Module):
        """Hands on its input beside the block's result."""

        def __init__(self) -> None:
            super().__init__()
            self.block = BasicBlock()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 1
            return self.block(y), y

    pruned = surgeon.prune(Reads().eval(), ["block.add"], example=IMAGES)
    result, kept = pruned(IMAGES)
    assert torch.equal(kept, IMAGES) and torch.equal(result, IMAGES.relu())


@pytest.mark.parametrize("drop", [["block.add"], ["block.add_1"], ["block.add", "block.add_1"]])
def test_either_branch_of_two_goes_with_its_weights(drop: list[str]) -> None:
    model = randomise(Net(Twice()))
    pruned = surgeon.prune(model, drop, example=X)
    h, block = model.stem(X), model.block
    h = h if "block.add" in drop else h + block.f(h)
    h = h if "block.add_1" in drop else h + block.g(h)
    assert torch.equal(pruned(X), model.head(h))
    left = {"block.add": "g", "block.add_1": "f"}
    kept = {left[name] for name in drop} if len(drop) == 1 else set()
    assert {n for n, _ in pruned.block.named_children()} == kept


class Pulled(nn.Module):
    """Steps towards what each branch gives: the differences are additions as well, in between."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for branch in (self.f, self.g, self.h):
            x = x + 0.3 * (branch(x) - x)
        return x


@pytest.mark.parametrize("drop", [["0.add"], ["0.add_1"], ["0.add_2"], ["0.add", "0.add_2"]])
def test_the_branch_that_is_named_goes_where_other_additions_stand_between(drop: list[str]) -> None:
    model = nn.Sequential(randomise(Pulled()))
    assert [residual.name for residual in surgeon.find(model, X)] == ["0.add", "0.add_1", "0.add_2"]
    pruned = surgeon.prune(model, drop, example=X)
    torch.testing.assert_close(pruned(X), without(model, drop, X))
    assert len(surgeon.find(pruned, X)) == 3 - len(drop)
    gone = {"fgh"[["0.add", "0.add_1", "0.add_2"].index(name)] for name in drop}
    assert {name for name, _ in pruned[0].named_children()} == set("fgh") - gone


class Parallel(nn.Module):
    """Two branches that read one norm, and a scale per channel of each, as in parallel transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f, self.g = (
            nn.LayerNorm(4),
            nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            nn.Linear(4, 4),
        )
        self.gamma = nn.Parameter(torch.full((4,), 0.5))
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.gamma * self.f(y)
        return x + torch.tanh(self.g(y)) * self.table


def test_what_two_deleted_branches_share_goes_with_the_second() -> None:
    model = randomise(Net(Parallel()))
    one = surgeon.prune(model, ["block.add"], example=X)
    assert set(one.block.state_dict()) == {"norm.weight", "norm.bias", "g.weight", "g.bias", "table"}
    both = surgeon.prune(model, "block.add*", example=X)
    assert type(both.block) is nn.Identity
    again = surgeon.prune(one, ["block.add"], example=X)  # the first that is left
    assert torch.equal(again(X), both(X))


def test_it_trains_on_with_gates_and_folds() -> None:
    pruned = surgeon.prune(randomise(Net(Twice())), ["block.add"], example=X)
    expected = pruned.eval()(X)
    gated = surgeon.apply(copy.deepcopy(pruned), drop_rate=0.5, example=X, scaling="inverted")
    assert torch.equal(gated.eval()(X), expected)
    gated.train()
    torch.manual_seed(0)
    assert len({gated(X).sum().item() for _ in range(20)}) > 1
    assert torch.equal(surgeon.fold(gated).eval()(X), expected)
    revived = pickle.loads(pickle.dumps(gated))  # noqa: S301 - our own
    assert torch.equal(revived.eval()(X), expected)


def test_it_goes_on_in_a_fresh_process(tmp_path: Path) -> None:
    pruned = surgeon.prune(randomise(Net(Twice())), ["block.add"], example=X)
    file = tmp_path / "pruned.pt"
    torch.save((pruned, X, pruned(X)), file)
    tests = Path(__file__).parents[1]
    code = (
        f"import sys, torch; sys.path[:0] = {[str(tests), str(tests.parent)]!r}\n"
        f"model, x, expected = torch.load({str(file)!r}, weights_only=False)\n"
        "assert torch.equal(model(x), expected); model.load_state_dict(model.state_dict())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_loads_its_own_state_into_a_fresh_network_pruned_alike() -> None:
    model = randomise(Net(Twice()))
    pruned, other = (surgeon.prune(m, ["block.add"], example=X) for m in (model, Net(Twice())))
    buffer = io.BytesIO()
    torch.save(pruned.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(X), pruned(X))


def test_compilers_take_it() -> None:
    pruned = surgeon.prune(randomise(Net(Twice())), ["block.add"], example=X)
    compiled = torch.compile(pruned, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), pruned(X))
    torch.testing.assert_close(torch.export.export(pruned, (X,)).module()(X), pruned(X))


def test_in_place_changes_the_model_itself() -> None:
    model = Net2(Plain(), Plain())
    assert surgeon.prune(model, ["blocks.0.add"], example=X, inplace=True) is model
    assert type(model.blocks[0]) is nn.Identity


def test_a_gated_model_is_folded_first() -> None:
    model = randomise(Net2(Plain(), Plain()))
    gated = surgeon.apply(copy.deepcopy(model), scaling="paper", drop_rate=0.5, example=X)
    pruned = surgeon.prune(gated, ["blocks.1.add"])
    expected = surgeon.prune(surgeon.fold(gated), ["blocks.1.add"], example=X)
    assert torch.equal(pruned(X), expected(X))
    assert len(surgeon.status(gated).gates) == 2
    assert not torch.allclose(pruned(X), surgeon.prune(model, ["blocks.1.add"], example=X)(X))


class Flagged(nn.Module):
    """A block that looks at a flag and at its size."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x) * (2 if twice else 1)


def test_a_call_that_needs_other_code_is_refused_by_name() -> None:
    pruned = surgeon.prune(Net(Flagged(), lambda block, x: block(x, twice=False)), ["block.add"], example=X)
    assert torch.isfinite(pruned(X[:1])).all()
    with pytest.raises(
        UnseenCallError, match=r"Flagged that was pruned \(block.add deleted\) is called in another"
    ):
        pruned.block(X, twice=True)


class Padded(nn.Module):
    """Pads to a multiple of three by Python arithmetic, as windowed attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.Conv1d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.f(x))
        y = functional.pad(x, (0, -x.shape[-1] % 3)) if x.shape[-1] % 3 else x
        return x + torch.tanh(self.g(y))[..., : x.shape[-1]]


def test_where_code_looks_at_sizes_other_batches_run_and_other_sizes_are_refused() -> None:
    model, x = randomise(nn.Sequential(Padded())), torch.randn(2, 4, 7)
    pruned = surgeon.prune(model, ["0.add"], example=x)
    block, more = model[0], torch.randn(5, 4, 7)
    by_hand = more + torch.tanh(block.g(functional.pad(more, (0, 2))))[..., :7]
    torch.testing.assert_close(pruned(more), by_hand)
    with pytest.raises(UnseenCallError, match=r"sizes\. Prune the model with an example of these"):
        pruned(torch.randn(2, 4, 9))


def test_a_caller_that_reads_the_block_keeps_it() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Plain(), Plain()])
            for block in self.blocks:
                block.times = 2

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) * block.times
            return x

    model = randomise(Asks())
    pruned = surgeon.prune(model, ["blocks.0.add"], example=X)
    assert isinstance(pruned.blocks[0], PrunedBlock) and not list(pruned.blocks[0].parameters())
    assert torch.equal(pruned(X), model.blocks[1](X * 2) * 2)


def test_hooks_on_a_block_go_on_being_called() -> None:
    model, seen = Net2(Plain(), Plain()), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    pruned = surgeon.prune(model, ["blocks.0.add"], example=X)
    pruned(X)
    assert seen and not list(pruned.blocks[0].parameters())


def test_a_block_that_runs_twice_loses_its_branch_in_both() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Plain(), Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.b(x)))

    model = randomise(Again())
    assert torch.equal(surgeon.prune(model, ["b.add"], example=X)(X), model.a(X))


def test_a_layer_that_others_use_too_stays_there() -> None:
    model = randomise(Net2(Plain(), Plain()))
    model.tied = model.blocks[1].f
    model.blocks[0].f = model.blocks[1].f
    pruned = surgeon.prune(model, ["blocks.1.add"], example=X)
    assert torch.equal(pruned(X), model.head(model.blocks[0](X)))
    assert pruned.tied is pruned.blocks[0].f


def test_a_child_that_is_called_from_outside_stays() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * 2 - self.block.f(x).tanh()

    model = randomise(Peeks())
    pruned = surgeon.prune(model, ["block.add"], example=X)
    torch.testing.assert_close(pruned(X), X * 2 - model.block.f(X).tanh())


def test_messages() -> None:
    model = Net2(Plain(), Plain())
    with pytest.raises(UsageError, match="give one of drop"):
        surgeon.prune(model, example=X)
    with pytest.raises(UsageError, match=r"'blocks.1.ad' is no residual add.*Did you mean 'blocks.1.ad"):
        surgeon.prune(model, ["blocks.1.ad"], example=X)
    with pytest.raises(UsageError, match=r"depth is 1\.5; give the share"):
        surgeon.prune(model, depth=1.5, data=[X], example=X)
    with pytest.raises(UsageError, match=r"depth is 0.9, which deletes none of the 2 branches.* 0.5"):
        surgeon.prune(model, depth=0.9, data=[X], example=X)
    with pytest.raises(UsageError, match=r"give either data .* or score"):
        surgeon.prune(model, depth=0.5, example=X)
    with pytest.raises(NoResidualsError, match="no branch can be deleted"):
        surgeon.prune(nn.Linear(4, 4), depth=0.5, data=[X], example=X)


def test_a_sum_that_evaluation_does_not_perform_is_named_and_nothing_changed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) if self.training else self.f(x)

    model = Net2(Odd())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneError, match=r"blocks.0.add cannot be deleted: in evaluation"):
        surgeon.prune(model, ["blocks.0.add"], example=X, inplace=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
