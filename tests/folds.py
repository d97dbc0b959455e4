"""A gated branch in float64 with nothing at its initial value, and the check that a fold of it is exact."""

import copy
from collections.abc import Mapping

import timm
import torch
import torchvision
from torch import Tensor, nn

from surgeon._folding.fold import FoldPlan, commit, plan

SCALE = 0.7


class Gated(nn.Module):
    """``shortcut + c * branch(x)``; a mark stands for ``c`` while ``scale`` is None."""

    def __init__(self, branch: nn.Module, gate: str = "0", shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.gate = gate
        self.scale: float | None = None
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result = self.branch(x)
        mark = self.scale is None
        result = torch.ops.surgeon.mark(result, self.gate) if mark else result * self.scale
        return self.shortcut(x) + result


def randomised(model: nn.Module) -> nn.Module:
    """Float64, evaluating, and nothing left at the zeros and ones of an initialisation."""
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            positive = name.endswith(("running_var", "original0"))
            tensor.copy_(torch.rand_like(tensor) + 0.5 if positive else torch.randn_like(tensor) * 0.5)
    return model


def scaled(model: nn.Module, scales: Mapping[str, float] | None) -> None:
    """Each gate multiplies by its scale, or marks."""
    for module in model.modules():
        if isinstance(module, Gated):
            module.scale = None if scales is None else scales.get(module.gate, 1.0)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def folds(model: nn.Module, x: Tensor, scales: Mapping[str, float] | None = None) -> FoldPlan:
    """Plan and commit; the outputs must be those of the explicit factors, and not those without them."""
    scales = scales or {"0": SCALE}
    made = plan(model, (x,), {}, scales)
    with torch.no_grad():
        scaled(model, scales)
        expected = model(x)
        scaled(model, {})
        ungated = model(x)
        folded = copy.deepcopy(model)
        commit(folded, made, scales)
        scaled(folded, {kept.gate: scales[kept.gate] for kept in made.kept})
        assert difference(folded(x), expected) < 1e-12
        assert difference(ungated, expected) > 1e-6, "the scale has no effect: the case proves nothing"
    scaled(model, None)
    return made


def exponents(made: FoldPlan) -> dict[str, int]:
    assert not made.kept, made
    return {step.parameter.removeprefix("branch."): step.exponent for step in made.products}


def image(channels: int = 4, size: int = 6) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        mean = self.pool(x) if self.pool else x.mean((2, 3), keepdim=True)
        return x * self.fc2(self.fc1(mean).relu()).sigmoid()


class GraphAttention(nn.Module):
    """GATv2 (Brody et al. 2022): nodes weigh those at the other ends of their edges."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.scores = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]))

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges.unbind()
        values = self.left(x)[source]
        score = nn.functional.leaky_relu(values + self.right(x)[target]) @ self.scores
        highest = score.new_full(x.shape[:1], -torch.inf).scatter_reduce(0, target, score, "amax")
        weight = (score - highest[target]).exp()
        total = weight.new_zeros(x.shape[:1]).index_add(0, target, weight)
        return torch.zeros_like(x).index_add(0, target, (weight / total[target])[:, None] * values)


class Ghost(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.primary = nn.Sequential(
            nn.Conv2d(channels, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()
        )
        self.cheap = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class SpatialAttention(nn.Module):
    """CBAM's second half: a map over places, from the mean and the maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


def weights(*names: str) -> dict[str, int]:
    return {f"{name}.{kind}": 1 for name in names for kind in ("weight", "bias")}


def zoo_randomised(model: nn.Module) -> nn.Module:
    """In float64 with random norm statistics and affine weights; in place."""
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        last = name.rsplit(".", 1)[-1]
        if last == "running_var":
            tensor.uniform_(0.5, 1.5)
        elif last in ("running_mean", "bias"):
            tensor.normal_(std=0.1)
        elif "gamma" in last or "gain" in last or (last == "weight" and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.0)
        elif last == "weight" and not tensor.any():
            tensor.normal_(std=0.1)
    return model


def made_anew(name: str, size: int) -> nn.Module:
    """A model of timm or torchvision with ten classes, for images of that size."""
    if name.startswith("torchvision:"):
        return torchvision.models.get_model(name.removeprefix("torchvision:"), num_classes=10)
    try:
        return timm.create_model(name, num_classes=10, img_size=size)
    except TypeError:  # not one of those that must know
        return timm.create_model(name, num_classes=10)
