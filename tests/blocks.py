"""Toy blocks, the models of the first promise, and stand-ins for chance, shared by the tests of the core."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon._finding.findings import gate_name
from surgeon._gating.forwards import Gating
from surgeon._gating.gate import Gate

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """A block without a forward: a branch ``f`` of two linear layers."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class Plain(Branch):
    """``x + f(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Around(nn.Module):
    """``x + f(x)`` with a branch of any kind."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Twice(nn.Module):
    """Two residual adds, as in a transformer block."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.f, self.g = (
            nn.Sequential(nn.Linear(width, width), nn.Tanh()),
            nn.Sequential(nn.Linear(width, width), nn.Tanh()),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)


class Pair(nn.Module):
    """Two residual adds whose branches end in a layer, which takes a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)


class Linear(nn.Module):
    """``x + W x + tanh(0)``: linear in ``x``, but with an activation that surgeon sees."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # abs(x) - relu(-x) - relu(x) is zero; it only keeps the branch from being a linear path.
        return x + (self.f(x) + (x.abs() - x.relu() - (-x).relu()))


class BasicBlock(nn.Module):
    """The block of the paper: conv, norm, ReLU, conv, norm, add, ReLU in place."""

    def __init__(self, width: int = 4, *, project: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)) if project else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Net(nn.Module):
    """A linear stem, one block called as ``call(block, x)``, and a head."""

    def __init__(
        self, block: nn.Module, call: Callable[[nn.Module, Tensor], Any] | None = None, width: int = 4
    ) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(width, width), block, nn.Linear(width, 3)
        self._call = call

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = self.block(x) if self._call is None else self._call(self.block, x)
        return self.head(x) if isinstance(x, Tensor) else x


def skipping(model: nn.Module, rate: float = 0.5, **options: Any) -> nn.Module:
    """Gates that leave out what they drop, all at one rate; by default for rows of four numbers."""
    options = {"example": torch.zeros(2, 4), "skip": True, **options}
    return surgeon.apply(model, "uniform", drop_rate=rate, **options)


def drawn(rows: list[list[int]]) -> pytest.MonkeyPatch:
    """Lets the given rows survive, one list per draw, over and over."""
    patch, order = pytest.MonkeyPatch(), itertools.cycle(rows)
    chosen: list[list[int]] = []

    def survivors(gate: Gate, count: int) -> int:
        chosen.append(next(order))
        return len(chosen[-1])

    patch.setattr(Gate, "survivors", survivors)
    patch.setattr(Gate, "rows", lambda *_: torch.tensor(chosen[-1]))
    return patch


@contextmanager
def coins(kept: bool | Mapping[str, bool] | Callable[[str], bool]) -> Iterator[list[str]]:
    """Decides every gate's coin; yields the names of the gates in the order in which they were tossed.

    A kept row has the correction ``c / p`` that the gate itself computes, a dropped one 0.
    """
    tossed: list[str] = []
    names: dict[int, str] = {}
    gated_forward = Gating.run

    def run(gating: Gating, *given: Any) -> Any:
        names.update({id(g): gate_name(gating.name, g.branch.ordinal) for g in gating.gates})
        return gated_forward(gating, *given)

    def fate(gate: Gate) -> bool:
        name = names[id(gate)]
        tossed.append(name)
        if callable(kept):
            return kept(name)
        return kept if isinstance(kept, bool) else kept[name]

    def mask(gate: Gate, branch: Tensor) -> Tensor:
        rows = branch.shape[0] if gate.decided.unit == "sample" else 1
        value = gate.scale / gate.survival if fate(gate) else 0.0
        return branch.new_full((rows,) + (1,) * (branch.ndim - 1), value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gating, "run", run)
        patch.setattr(Gate, "survives", fate)
        patch.setattr(Gate, "survivors", lambda gate, count: count if fate(gate) else 0)
        patch.setattr(Gate, "mask", mask)
        yield tossed


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random weights and statistics everywhere, the same for the same seed.

    Zero-initialised scales and fresh statistics would hide differences.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like.dtype) * (high - low) + low

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                around = 1.0 if "weight" in name or "gamma" in name else 0.0
                parameter.copy_(uniform(parameter, around - 0.4, around + 0.4))
            else:
                width = (3 * parameter.shape[0] / max(parameter.numel(), 1)) ** 0.5
                parameter.copy_(uniform(parameter, -width, width))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(uniform(buffer, 0.6, 1.4))
            elif name.endswith("running_mean"):
                buffer.copy_(uniform(buffer, -0.4, 0.4))
    return model


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every parameter, by name; a copy."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def joined(out: Any) -> Tensor:
    leaves = out.values() if isinstance(out, dict) else out
    return out if isinstance(out, Tensor) else torch.cat([leaf.flatten() for leaf in leaves])


def step(
    model: nn.Module, run: Callable[[Tensor], Any], x: Tensor
) -> tuple[Any, Tensor, dict[str, Tensor | None]]:
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    out = run(x)
    flat = joined(out)
    (flat * torch.linspace(1, 2, flat.numel()).view_as(flat)).sum().backward()
    return out, x.grad, grads(model)


def same(a: Any, b: Any) -> bool:
    """Bit-equality of nests of tensors; NaN never equals."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@dataclass(frozen=True)
class Snapshot:
    """What of a model must not change: tensors and their identity, attributes, classes, flags, hooks."""

    state: dict[str, Tensor] = field(repr=False)
    ids: dict[str, int] = field(repr=False)
    attributes: dict[str, list[tuple[str, Any]]] = field(repr=False)
    classes: dict[str, type]
    flags: dict[str, bool]

    @staticmethod
    def of(model: nn.Module) -> "Snapshot":
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        modules = dict(model.named_modules(remove_duplicate=False))
        return Snapshot(
            state={n: t.detach().clone() for n, t in tensors.items()},
            ids={n: id(t) for n, t in tensors.items()},
            attributes={n: [(k, _frozen(v)) for k, v in m.__dict__.items()] for n, m in modules.items()},
            classes={n: type(m) for n, m in modules.items()},
            flags={n: m.training for n, m in modules.items()},
        )

    def differences(self, model: nn.Module) -> list[str]:
        """What of ``model`` is no longer as it was, in words."""
        now, found = Snapshot.of(model), []
        for what in ("ids", "attributes", "classes", "flags"):
            before, after = getattr(self, what), getattr(now, what)
            found += [
                f"{what} of {n or 'the model'}" for n in {**before, **after} if before.get(n) != after.get(n)
            ]
        found += [f"values of {n}" for n, t in self.state.items() if not torch.equal(t, now.state[n])]
        return found


def _frozen(value: Any) -> Any:
    """A copy of an attribute that can be compared: containers by content, tensors and objects by identity."""
    if isinstance(value, Mapping):
        return [(k, _frozen(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [_frozen(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


@dataclass(frozen=True)
class Case:
    """One published model: where it comes from, a small input for it, and its residual adds counted by hand.

    Attributes:
        library: ``"timm"`` or ``"torchvision"``.
        name: Name of the model there.
        gates: Residual adds of the published architecture.
        why: The arithmetic behind ``gates``.
        size: Side of a small square input.
        options: What the constructor is given, so that it takes that input.
        heavy: Left to the slow tests.
    """

    library: str
    name: str
    gates: int
    why: str
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    heavy: bool = False

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    def build(self, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        if self.library == "torchvision":
            import torchvision

            model: nn.Module = torchvision.models.get_model(
                self.name, weights=None, **{**self.options, **more}
            )
            return model
        import timm

        made: nn.Module = timm.create_model(self.name, **{**self.options, **more})
        return made

    def input(self, rows: int = 2) -> Tensor:
        return torch.randn(rows, 3, self.size, self.size, generator=torch.Generator().manual_seed(rows))


def _cases() -> Iterator[Case]:
    tv, tm = "torchvision", "timm"
    yield Case(tv, "resnet18", 8, "basic blocks per stage 2 + 2 + 2 + 2 (He et al. 2016, table 1)")
    yield Case(tv, "resnet50", 16, "bottlenecks per stage 3 + 4 + 6 + 3")
    yield Case(tv, "wide_resnet50_2", 16, "the stages of ResNet-50", heavy=True)
    yield Case(tv, "resnext50_32x4d", 16, "the stages of ResNet-50", heavy=True)
    yield Case(
        tv,
        "mobilenet_v2",
        10,
        "repeats 1,2,3,4,3,3,1 less the first of each stage: 0 + 1 + 2 + 3 + 2 + 2 + 0",
    )
    yield Case(tv, "mobilenet_v3_small", 6, "11 bnecks less 4 of stride 2 and one that widens 40 to 48")
    yield Case(
        tv,
        "efficientnet_b0",
        9,
        "repeats 1,2,2,3,3,4,1 less the first of each stage: 0 + 1 + 1 + 2 + 2 + 3 + 0",
    )
    yield Case(tv, "regnet_y_400mf", 16, "depths 1 + 3 + 6 + 6")
    yield Case(tv, "convnext_tiny", 18, "depths 3 + 3 + 9 + 3", heavy=True)
    yield Case(tv, "vit_b_16", 24, "12 layers x 2", 32, {"image_size": 32}, heavy=True)
    yield Case(tv, "swin_t", 24, "(2 + 2 + 6 + 2) x 2")
    yield Case(
        tv,
        "maxvit_t",
        55,
        "(2 + 2 + 5 + 2) layers x (MBConv 1 + block attention 2 + grid attention 2)",
        224,
        heavy=True,
    )
    yield Case(tm, "resnet18", 8, "2 + 2 + 2 + 2")
    yield Case(tm, "resnet50", 16, "3 + 4 + 6 + 3")
    yield Case(tm, "resnetv2_50", 16, "3 + 4 + 6 + 3, pre-activation")
    yield Case(tm, "convnext_atto", 12, "depths 2 + 2 + 6 + 2")
    yield Case(tm, "convnextv2_atto", 12, "depths 2 + 2 + 6 + 2; the sum inside each GRN is no residual add")
    yield Case(tm, "vit_tiny_patch16_224", 24, "12 blocks x 2", 32, {"img_size": 32})
    yield Case(tm, "deit_tiny_patch16_224", 24, "12 blocks x 2", 32, {"img_size": 32}, heavy=True)
    yield Case(tm, "beit_base_patch16_224", 24, "12 blocks x 2", 32, {"img_size": 32}, heavy=True)
    yield Case(
        tm, "swin_tiny_patch4_window7_224", 24, "(2 + 2 + 6 + 2) x 2", 64, {"img_size": 64}, heavy=True
    )
    yield Case(tm, "mixer_s32_224", 16, "8 mixer blocks x 2", 64, {"img_size": 64})
    # Half width rounds 40 and 48 channels both to 24, so the stage that widens in the full model adds here.
    yield Case(
        tm, "mobilenetv3_small_050", 7, "1 of (24, 24), 2 of (40, 40, 40), 2 of (48, 48), 2 of (96, 96, 96)"
    )
    yield Case(tm, "efficientnet_b0", 9, "0 + 1 + 1 + 2 + 2 + 3 + 0")
    yield Case(tm, "regnetx_002", 13, "depths 1 + 1 + 4 + 7")
    yield Case(tm, "nf_resnet26", 8, "2 + 2 + 2 + 2")
    yield Case(tm, "poolformerv2_s12", 24, "(2 + 2 + 6 + 2) x 2")
    # The two attentions that shrink the map have no shortcut, the MLP behind each of them has.
    yield Case(tm, "levit_128s", 20, "(2 + 3 + 4) blocks x 2 + 2 MLPs after shrinking", 64, {"img_size": 64})
    yield Case(
        tm,
        "cait_xxs24_224",
        52,
        "24 blocks x 2 + 2 class-attention blocks x 2",
        32,
        {"img_size": 32},
        heavy=True,
    )
    yield Case(
        tm, "xcit_nano_12_p16_224", 40, "12 blocks x 3 + 2 class-attention blocks x 2", 32, {"img_size": 32}
    )


CASES = tuple(_cases())


def case(name: str) -> Case:
    """The case of ``"library:name"``."""
    return next(c for c in CASES if str(c) == name)


def parameters(cases: Iterator[Case] | tuple[Case, ...] = CASES) -> list[Any]:
    """The cases as parameters of a test, the heavy ones left to the slow run."""
    return [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if c.heavy else []) for c in cases]


class Of(nn.Module):
    """A forward written as a function of its own module: its parameters are attributes."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)
