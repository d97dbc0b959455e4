"""Branches put together at random fold exactly or keep their gate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from blocks import Of
from folds import SCALE, Gated, Ghost, SpatialAttention, SqueezeExcite, difference, image, randomised, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn

from surgeon._folding.fold import commit, plan

CHANNELS = 4
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "bare conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
    "standardised": lambda: ScaledStdConv2d(CHANNELS, CHANNELS, 1),
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "bare norm": lambda: nn.GroupNorm(2, CHANNELS, affine=False),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "relu6": nn.ReLU6,
    "pool": lambda: nn.AvgPool2d(3, 1, 1),
    "excite": lambda: SqueezeExcite(CHANNELS),
    "ghost": lambda: Ghost(CHANNELS),
    "gamma": lambda: Of(lambda m, x: x * m.gamma, gamma=torch.ones(CHANNELS, 1, 1)),
    "spatial": SpatialAttention,
    "halves": lambda: Of(lambda m, x: torch.cat([x[:, :2].relu(), x[:, 2:] * m.gain], 1), gain=torch.ones(1)),
    "first half": lambda: Of(
        lambda m, x: torch.cat([x[:, :2], F.silu(x[:, :2]) * m.gain], 1), gain=torch.ones(1)
    ),
}


class Joined(nn.Module):
    def __init__(self, how: str, parts: list[nn.Module]) -> None:
        super().__init__()
        self.how, self.parts = how, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (part(x) for part in self.parts)
        match self.how:
            case "add":
                return first + second
            case "mul":
                return first * second
            case "gate":
                return first * second.sigmoid()
        return torch.maximum(first, second) + x.mean()


def branches() -> st.SearchStrategy[nn.Module]:
    layer = st.sampled_from(sorted(LAYERS)).map(lambda name: LAYERS[name]())
    return st.recursive(
        layer,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=4).map(lambda parts: nn.Sequential(*parts)),
            st.builds(
                Joined,
                st.sampled_from(["add", "mul", "gate", "maximum"]),
                st.lists(inner, min_size=2, max_size=2),
            ),
        ),
        max_leaves=6,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(branch=branches(), seed=st.integers(0, 9))
def test_a_random_branch_folds_exactly_or_is_kept(branch: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = randomised(Gated(branch)), image()
    made = plan(model, (x,), {}, {"0": SCALE})
    assert bool(made.products) != bool(made.kept)
    with torch.no_grad():
        scaled(model, {"0": SCALE})
        expected = model(x)
        commit(model, made, {"0": SCALE})
        scaled(model, {kept.gate: SCALE for kept in made.kept})
        assert difference(model(x), expected) < 1e-12
