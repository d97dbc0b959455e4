"""Folds into parts of parameters, into shared ones, and of several gates at once."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from folds import (
    SCALE,
    Gated,
    difference,
    exponents,
    folds,
    image,
    randomised,
    scaled,
    tokens,
)
from torch import Tensor, nn

from surgeon._folding import search as _search
from surgeon._folding.fold import FoldPlan, Kept, commit, plan
from surgeon.errors import FoldError

# Parts of parameters.


def dual_path(block: nn.Module, x: Tensor) -> Tensor:
    """Half of the channels go onto the shortcut, the other half beside it; in place, as users write it."""
    y = block.bn(block.conv(x)).relu()
    y[:, :2] = torch.ops.surgeon.mark(y[:, :2], "0") if block.scale is None else y[:, :2] * block.scale
    y[:, :2] += x[:, :2]
    return y


class Parts(Gated):
    """A gate somewhere inside, on a part of a value."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__(nn.Identity())
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def gated(self, branch: Tensor, gate: str = "0") -> Tensor:
        if self.scale is None:
            return torch.ops.surgeon.mark(branch, gate)
        return branch * self.scale


def rows(made: FoldPlan) -> dict[str, tuple[tuple[int, int] | None, int, int]]:
    assert not made.kept, made
    return {step.parameter: (step.rows, step.dim, step.exponent) for step in made.products}


def test_channels_beside_the_shortcut_keep_their_scale() -> None:
    model = randomised(Parts(dual_path, conv=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5)))
    assert rows(folds(model, image())) == {"bn.weight": ((0, 2), 0, 1), "bn.bias": ((0, 2), 0, 1)}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_takes_the_scale_on_some_channels(transposed: bool) -> None:
    conv = nn.ConvTranspose2d(4, 5, 1) if transposed else nn.Conv2d(4, 5, 1)

    def dense(block: nn.Module, x: Tensor) -> Tensor:
        first, rest = block.conv(x).split([2, 3], dim=1)
        return torch.cat([block.gated(first) + x[:, :2], rest], dim=1)

    dim = 1 if transposed else 0
    made = folds(randomised(Parts(dense, conv=conv)), image())
    assert rows(made) == {"conv.weight": ((0, 2), dim, 1), "conv.bias": ((0, 2), 0, 1)}


def test_values_alone_are_scaled_in_a_joint_projection() -> None:
    def attend(block: nn.Module, x: Tensor) -> Tensor:
        query, key, value = block.qkv(x).chunk(3, dim=-1)
        return x + block.gated((query @ key.mT).softmax(-1) @ value)

    made = folds(randomised(Parts(attend, qkv=nn.Linear(8, 24))), tokens())
    assert rows(made) == {"qkv.weight": ((16, 24), 0, 1), "qkv.bias": ((16, 24), 0, 1)}


def test_a_table_of_gammas_is_scaled_row_by_row() -> None:
    def table(block: nn.Module, x: Tensor) -> Tensor:
        for row in range(3):
            branch = block.table[row] * block.fc(x)
            x = x + (block.gated(branch) if row == 1 else branch)
        return x

    made = folds(randomised(Parts(table, fc=nn.Linear(8, 8), table=torch.ones(3, 8))), tokens())
    assert rows(made) == {"table": ((1, 2), 0, 1)}


def test_a_table_read_as_a_whole_besides_is_not_split() -> None:
    def table(block: nn.Module, x: Tensor) -> Tensor:
        return x * block.table.sum() + block.gated(block.table[0] * x.sigmoid())

    made = folds(randomised(Parts(table, table=torch.ones(3, 8))), tokens())
    assert [kept.reason for kept in made.kept] == ["the parameter 'table' is also used outside of the branch"]


def test_scaling_a_row_twice_is_seen() -> None:
    model, x = randomised(Parts(dual_path, conv=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5))), image()
    made = plan(model, (x,), {}, {"0": SCALE})
    with torch.no_grad():
        scaled(model, {"0": SCALE})
        expected = model(x)
        for part in (None, (0, 3), (1, 2)):
            damaged = copy.deepcopy(model)
            steps = tuple(dataclasses.replace(step, rows=part) for step in made.products)
            commit(damaged, dataclasses.replace(made, products=steps), {"0": SCALE})
            scaled(damaged, {})
            assert difference(damaged(x), expected) > 1e-6, part


# Shared weights.


class Twice(nn.Module):
    """Two gates over one branch."""

    def __init__(self) -> None:
        super().__init__()
        branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.first, self.second = Gated(branch, "0"), Gated(branch, "1")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_tied_weights_fold_together_when_the_scales_agree() -> None:
    made = folds(randomised(Twice()), tokens(), {"0": SCALE, "1": SCALE})
    assert [str(step) for step in made.products] == [
        "gate 0: first.branch.1.weight *= scale",
        "gate 0: first.branch.1.bias *= scale",
    ]
    assert made.together == (("0", "1"),)
    assert made.folded == ("0", "1")


def test_tied_weights_stay_when_the_scales_disagree() -> None:
    made = folds(randomised(Twice()), tokens(), {"0": 0.5, "1": 0.6})
    assert made.products == ()
    assert [kept.gate for kept in made.kept] == ["0", "1"]
    assert "the parameter 'first.branch.1." in made.kept[0].reason
    assert "is also used outside of the branch" in made.kept[0].reason


def test_gates_that_fold_together_must_keep_equal_scales() -> None:
    model = randomised(Twice())
    made = plan(model, (tokens(),), {}, {"0": SCALE, "1": SCALE})
    with pytest.raises(FoldError, match="the gates 0, 1 share weights and fold only with equal scales"):
        commit(model, made, {"0": 0.5, "1": 0.6})


def test_one_gate_passed_twice_is_one_gate() -> None:
    gated = Gated(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    assert exponents(folds(randomised(nn.Sequential(gated, nn.ReLU(), gated)), tokens())) == {
        "0.branch.1.weight": 1,
        "0.branch.1.bias": 1,
    }


def test_a_weight_also_used_on_the_shortcut_stays() -> None:
    tied = nn.Linear(8, 8, bias=False)
    made = folds(randomised(Gated(tied, shortcut=tied)), tokens())
    assert [kept.reason for kept in made.kept] == [
        "the parameter 'branch.weight' is also used outside of the branch"
    ]


def test_two_parameters_over_one_memory_are_one() -> None:
    model = randomised(Gated(nn.Linear(8, 8), shortcut=nn.Linear(8, 8)))
    model.shortcut.weight = nn.Parameter(model.branch.weight.data)  # type: ignore[union-attr, assignment]
    made = plan(model, (tokens(),), {}, {"0": SCALE})
    assert not made.products
    assert "'branch.weight' is also used outside of the branch" in made.kept[0].reason


def test_a_parameter_that_shares_part_of_its_memory_stays() -> None:
    model = randomised(Gated(nn.Linear(8, 8, bias=False)))
    model.register_parameter("view", nn.Parameter(model.branch.weight.data[:4]))  # type: ignore[union-attr, index]
    made = plan(model, (tokens(),), {}, {"0": SCALE})
    assert not made.products


# Several gates, and gates inside branches.


def test_each_gate_takes_its_own_scale() -> None:
    blocks = [Gated(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), name) for name in "0123"]
    model = randomised(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(144, 3)))
    made = folds(model, image(), {"0": 0.9, "1": 0.5, "2": 0.1, "3": 1.7})
    assert [(s.parameter, s.gate) for s in made.products] == [
        (f"{i}.branch.1.{kind}", i) for i in "0123" for kind in ("weight", "bias")
    ]


def test_nested_gates_multiply() -> None:
    inner = Gated(nn.Linear(8, 8), "1", shortcut=nn.Linear(8, 8))
    made = folds(randomised(Gated(inner, "0")), tokens(), {"0": 0.9, "1": 0.5})
    assert not made.kept
    both = {
        step.parameter: {s.gate for s in made.products if s.parameter == step.parameter}
        for step in made.products
    }
    assert both == {
        "branch.branch.weight": {"0", "1"},
        "branch.branch.bias": {"0", "1"},
        "branch.shortcut.weight": {"0"},
        "branch.shortcut.bias": {"0"},
    }


def test_a_gate_the_forward_does_not_reach_is_kept() -> None:
    made = plan(randomised(Gated(nn.Linear(8, 8))), (tokens(),), {}, {"0": 0.5, "7": 0.5})
    assert made.kept == (Kept("7", "the model's forward did not pass it"),)


def test_a_branch_value_returned_beside_the_output_stays() -> None:
    class Escaping(Gated):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            result = self.branch(x)
            factor = result if self.scale is None else result * self.scale
            marked = torch.ops.surgeon.mark(result, "0") if self.scale is None else factor
            return torch.cat([x + marked, result])

    made = folds(randomised(Escaping(nn.Linear(8, 8))), tokens())
    assert len(made.kept) == 1


def test_the_search_is_cut_where_it_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_search, "_CHOICES", 1)
    made = plan(Gated(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), (tokens().float(),), {}, {"0": SCALE})
    assert made.kept == (Kept("0", "the search for a place to put the scale was cut after 1 tries"),)
