"""The book of operators: its names exist, and steps answer for families, alike in 1, 2 and 3 dimensions."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision  # noqa: F401 - registers its operators
from torch import Tensor, nn
from torch.nn import functional as F

import surgeon
from surgeon._folding.operators import LAWS
from surgeon._gating.rowrules import RULES
from surgeon._torch import NEWEST
from surgeon._tracing.aten import Family, families, family, family_of, form_only, named
from surgeon._tracing.operators import SHAPES

aten = torch.ops.aten


# --- the book ------------------------------------------------------------------------------------


def exists(name: str) -> bool:
    library, _, operator = name.rpartition(".")
    space = getattr(torch.ops, library or "aten")
    return any(hasattr(space, f"{before}{operator}{after}") for before in ("", "_") for after in ("", "_"))


def test_every_name_exists_once() -> None:
    names = Counter(name for one in Family for name in one.names)
    assert [name for name, count in names.items() if count > 1] == []
    missing = [name for name in names if not exists(name)]
    if torch.__version__.startswith(f"{NEWEST}."):
        assert missing == []
    assert len(missing) < 10, missing  # what an older PyTorch lacks
    assert not exists("no_such_operator")


@pytest.mark.parametrize(
    ("step", "known"), [("find", SHAPES), ("rows", RULES), ("fold", LAWS)], ids=lambda x: str(x)[:5]
)
def test_each_step_answers_for_each_family(step: str, known: dict[Family, Any]) -> None:
    """Whoever adds a family reads here which steps have yet to say what it does; "unknown" is an answer."""
    assert set(Family) - known.keys() == set(), f"{step} has no answer"
    with pytest.raises(KeyError, match="NO_SUCH"):
        families("SUMS NO_SUCH")


SPELT = {
    aten.relu.default: Family.RELUS,
    aten.relu_.default: Family.RELUS,
    aten._softmax.default: Family.SOFTMAXES,
    aten._to_copy.default: Family.COPIES,
    aten.add.Tensor: Family.SUMS,
    aten.add_.Scalar: Family.SUMS,
    aten.reflection_pad1d.default: Family.PADS,
    aten.replication_pad3d.default: Family.PADS,
    aten._upsample_nearest_exact3d.default: Family.RESIZES,
    aten._native_batch_norm_legit_no_training.default: Family.BATCH_NORMS,
    aten.as_strided_.default: Family.STRIDES,
    aten.cdist.default: None,
    torch.ops.torchvision.deform_conv2d.default: Family.DEFORMED,
}


@pytest.mark.parametrize("overload", SPELT, ids=str)
def test_an_operator_is_found_under_all_its_spellings(overload: Any) -> None:
    assert family(overload) is SPELT[overload]
    assert family_of(overload._schema.name.replace("::", ".")) is SPELT[overload]


def test_names_of_other_libraries_do_not_pass_for_atens() -> None:
    assert named("torchvision::relu") == "torchvision.relu"
    assert family_of("torchvision::relu") is None


def test_what_takes_the_form_of_a_tensor_reads_none_of_its_numbers() -> None:
    assert form_only(aten.zeros_like.default) and form_only(aten.new_empty.default)
    assert not form_only(aten.zero_.default)  # what it writes to stays the tensor that it was
    assert not form_only(aten.normal.Tensor_Tensor)  # which reads a mean
    assert not form_only(aten.bernoulli.default)  # which reads a chance
    assert not form_only(aten.clone.default)


# --- the same answer in 1, 2 and 3 dimensions ------------------------------------------------------


class Block(nn.Module):
    """``x + f(x)``."""

    def __init__(self, *f: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*f)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Does(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def layer(kind: str, dims: int) -> Any:
    return getattr(nn, f"{kind}{dims}d")


def conv(dims: int, padding: int = 0) -> nn.Module:
    return layer("Conv", dims)(4, 4, 3, padding=padding)


def padded(mode: str) -> Callable[[int], nn.Module]:
    return lambda dims: Does(lambda x: F.pad(x, (1,) * 2 * dims, mode=mode))


def resized(mode: dict[int, str]) -> Callable[[int], nn.Module]:
    return lambda dims: Does(lambda x: F.interpolate(x, (10,) * dims, mode=mode[dims]))


NEAREST, EXACT = dict.fromkeys((1, 2, 3), "nearest"), dict.fromkeys((1, 2, 3), "nearest-exact")
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}

# What stands before a convolution that takes two entries off each side again, and whether it is linear.
STEPS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "zeros": (padded("constant"), True),
    "reflection": (padded("reflect"), True),
    "replication": (padded("replicate"), True),
    "circular": (padded("circular"), True),
    "reflection module": (lambda dims: layer("ReflectionPad", dims)(1), True),
    "nearest": (resized(NEAREST), True),
    "nearest exact": (resized(EXACT), True),
    "linear": (resized(LINEAR), True),
    "mean pool": (lambda dims: layer("AvgPool", dims)(1, padding=0), True),
    "adaptive mean pool": (lambda dims: layer("AdaptiveAvgPool", dims)(8), True),
    "max pool": (lambda dims: layer("MaxPool", dims)(3, 1, 1), False),
    "adaptive max pool": (lambda dims: layer("AdaptiveMaxPool", dims)(8), False),
    "transposed": (lambda dims: layer("ConvTranspose", dims)(4, 4, 3), True),
    "batch norm": (lambda dims: layer("BatchNorm", dims)(4), True),
    "dropout": (lambda dims: layer("Dropout", dims)(0.5) if dims > 1 else nn.Dropout1d(0.5), True),
    "relu": (lambda _: nn.ReLU(), False),
    "prelu": (lambda _: nn.PReLU(4), False),
    "mean of all": (lambda dims: Does(lambda x: x - x.mean(tuple(range(2, 2 + dims)), keepdim=True)), True),
    "shifted": (lambda dims: Does(lambda x: x.roll(1, 1 + dims)), True),
    "by index": (lambda dims: Does(lambda x: x[..., torch.arange(7, -1, -1)]), True),
}


def block(step: str, dims: int, *more: nn.Module) -> Block:
    made = STEPS[step][0](dims)
    after = made(torch.zeros(2, 4, *[8] * dims)).shape[-1]
    return Block(made, conv(dims, padding=(10 - after) // 2), *more)


def example(dims: int) -> Tensor:
    return torch.zeros(2, 4, *[8] * dims)


def told(step: str, dims: int) -> tuple[Any, ...]:
    """What each step says of the branch: find of it alone; rows and fold with an activation in front."""
    found = surgeon.find(block(step, dims), example=example(dims))
    network = nn.Sequential(block(step, dims, nn.ReLU(), conv(dims, padding=1)), conv(dims))
    surgeon.apply(network, "uniform", skip=True, scaling="paper", example=example(dims))
    (gate,) = surgeon.status(network).gates
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        surgeon.fold(network.eval(), example=example(dims))
    left = [str(one.message) for one in caught if "multiplication" in str(one.message)]
    return [r.kind for r in found], [r.code for r in found.refused], gate.skips, gate.note, left


@pytest.mark.parametrize("step", STEPS)
def test_a_branch_gets_the_same_answer_in_1_2_and_3_dimensions(step: str) -> None:
    answers = [told(step, dims) for dims in (1, 2, 3)]
    assert answers[0] == answers[1] == answers[2]
    linear = STEPS[step][1]
    kinds, codes, skips, note, left = answers[0]
    assert (kinds, set(codes)) == (([], {"linear"}) if linear else (["identity"], set()))
    assert (skips, note, left) == (True, "", [])
