"""Bad input: each a SurgeonError that says what, where, which value and what to do, before any change."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from blocks import Branch, Net, Plain, Snapshot, Twice, randomise
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import Tensor, nn

import surgeon
from surgeon.errors import (
    AlreadyGatedError,
    NoResidualsError,
    NotGatedError,
    RecordError,
    SurgeonError,
    UsageError,
    WrappedModelError,
)

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    return randomise(nn.Sequential(Plain(), Twice()))


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("rate of one", {"drop_rate": 1.0}, UsageError, r"drop_rate is 1\.0; a drop rate lies in \[0, 1\)"),
    ("rate above one", {"drop_rate": 1.5}, UsageError, r"drop_rate is 1\.5"),
    ("negative rate", {"drop_rate": -0.1}, UsageError, r"drop_rate is -0\.1"),
    ("NaN", {"drop_rate": math.nan}, UsageError, "drop_rate is nan"),
    ("infinite", {"drop_rate": math.inf}, UsageError, "drop_rate is inf"),
    ("no number", {"drop_rate": "half"}, UsageError, r"drop_rate is 'half'; give a number in \[0, 1\)"),
    ("None", {"drop_rate": None}, UsageError, "drop_rate is None"),
    ("NaN, uniform", {"schedule": "uniform", "drop_rate": math.nan}, UsageError, "drop_rate is nan"),
    (
        "unknown schedule",
        {"schedule": "cosine"},
        UsageError,
        "'cosine'; known are 'linear', 'linear-from-zero', 'uniform'",
    ),
    ("no schedule", {"schedule": None}, UsageError, "unknown schedule None"),
    (
        "short sequence",
        {"schedule": [0.1]},
        UsageError,
        r"has 1 rates; this model needs 2 \(one per block\) or 3",
    ),
    ("long sequence", {"schedule": [0.1] * 4}, UsageError, "has 4 rates"),
    ("empty sequence", {"schedule": []}, UsageError, "has 0 rates"),
    ("sequence with NaN", {"schedule": [0.1, math.nan]}, UsageError, "drop rate of 1 is nan"),
    ("sequence with one", {"schedule": [1.0, 0.1]}, UsageError, r"drop rate of 0 is 1\.0"),
    ("sequence of words", {"schedule": ["a", "b"]}, UsageError, "drop rate of 0 is 'a'"),
    ("callable with NaN", {"schedule": lambda l, n: math.nan}, UsageError, "drop rate of 0 is nan"),
    ("callable with nothing", {"schedule": lambda l, n: None}, UsageError, "drop rate of 0 is None"),
    ("unknown unit", {"unit": "row"}, UsageError, "unit is 'row'; known are 'sample', 'batch'"),
    ("unknown scaling", {"scaling": "none"}, UsageError, "scaling is 'none'; known are 'inverted', 'paper'"),
    (
        "include of nothing",
        {"include": ["layer9*"]},
        UsageError,
        r"include: 'layer9\*' matches no residual add",
    ),
    (
        "exclude of nothing",
        {"exclude": ["layer9"]},
        UsageError,
        r"exclude: 'layer9' matches no residual add.*find",
    ),
    ("override of nothing", {"overrides": {"layer9": 0.1}}, UsageError, "overrides: 'layer9' matches no"),
    ("override of one", {"overrides": {"0": 1.0}}, UsageError, r"drop rate of 0 is 1\.0"),
    (
        "everything excluded",
        {"exclude": ["*"]},
        NoResidualsError,
        "no residual add to gate; its additions: 3 x left out",
    ),
    (
        "wrong width",
        {"example": torch.zeros(2, 5)},
        RecordError,
        r"Sequential could not be run on the example \(float32\[2, 5\]\)",
    ),
    ("wrong rank", {"example": torch.zeros(2, 3, 4, 5)}, RecordError, r"float32\[2, 3, 4, 5\]"),
    (
        "too many arguments",
        {"example": (X, X)},
        RecordError,
        "example=tensor, example=\\(a, b\\) or example=",
    ),
    ("unknown keyword", {"example": {"image": X}}, RecordError, r"image=float32\[3, 4\]"),
    ("a text", {"example": "a cat"}, UsageError, "example is a str; give a tensor"),
    ("no example at all", {"example": ()}, RecordError, "could not be run on the example"),
    ("the default example", {"example": None}, RecordError, r"float32\[2, 3, 224, 224\]"),
    (
        "a list",
        {"example": [X]},
        UsageError,
        "example is a list; give a tensor, a tuple of positional arguments, or a dict",
    ),
    ("a number", {"example": 3}, UsageError, "example is a int"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("given", "kind", "message"), [pytest.param(*w[1:], id=w[0]) for w in WRONG])
def test_bad_arguments_change_nothing(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    plain = model()
    before, state = Snapshot.of(plain), torch.random.get_rng_state()
    with pytest.raises(SurgeonError, match=message) as caught:
        surgeon.apply(plain, **{"example": X, **given})
    assert isinstance(caught.value, kind)
    assert before.differences(plain) == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(surgeon.status(surgeon.apply(plain, example=X)).gates) == 3  # and it can still be gated


def test_cheap_checks_come_before_the_recording() -> None:
    """A wrong word is answered at once, not after minutes with another complaint."""
    for wrong in ({"schedule": "cosine"}, {"drop_rate": 2.0}, {"unit": "row"}, {"scaling": "none"}):
        with pytest.raises(UsageError):
            surgeon.apply(model(), example=torch.zeros(2, 5), **wrong)


def test_a_second_apply_names_remove_and_keeps_the_first() -> None:
    gated = surgeon.apply(model(), "uniform", drop_rate=0.2, example=X)
    status = surgeon.status(gated)
    for again in (
        lambda: surgeon.apply(gated, example=X),
        lambda: surgeon.apply(gated, unit="batch", example=X),
    ):
        with pytest.raises(
            AlreadyGatedError, match=r"already has gates; call surgeon\.remove\(model\) first"
        ):
            again()
    assert surgeon.status(gated) == status
    outer = nn.Sequential(gated, Plain())
    with pytest.raises(AlreadyGatedError):
        surgeon.apply(outer, example=X)


@pytest.mark.parametrize(
    "operation", [surgeon.status, surgeon.remove, surgeon.fold, lambda m: surgeon.set_drop_rate(m, 0.1)]
)
def test_operations_on_gates_need_gates(operation: Callable[[nn.Module], Any]) -> None:
    plain = model()
    before = Snapshot.of(plain)
    with pytest.raises(NotGatedError, match="the model has no gates"):
        operation(plain)
    assert before.differences(plain) == []


@pytest.mark.parametrize("thing", [None, 3, "resnet18", [nn.Linear(1, 1)], nn.Linear, dict])
@pytest.mark.parametrize("operation", [surgeon.find, surgeon.apply])
def test_what_is_no_module_is_named(operation: Callable[..., Any], thing: Any) -> None:
    with pytest.raises(UsageError, match=r"model is a \w+; give a torch\.nn\.Module"):
        operation(thing, example=X)


def test_a_torchscript_module_is_refused() -> None:
    with pytest.warns() as _:
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(UsageError, match=r"TorchScript module.*give the module it was made from"):
        surgeon.apply(scripted, example=X)


# --- wrapped models ---------------------------------------------------------------


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refused(wrapped: nn.Module, *words: str) -> None:
    before = Snapshot.of(wrapped)
    for operation in (surgeon.find, surgeon.apply):
        with pytest.raises(SurgeonError) as caught:
            operation(wrapped, example=X)
        for word in words:
            assert word in str(caught.value)
    assert before.differences(wrapped) == []


def test_data_parallel_is_refused() -> None:
    refused(nn.DataParallel(model()), "data parallelism", "surgeon.apply(model)", ".module")


@pytest.mark.usefixtures("_one_process")
def test_ddp_is_refused_and_wraps_a_gated_model() -> None:
    plain = model()
    wrapped = nn.parallel.DistributedDataParallel(plain)
    refused(wrapped, "DistributedDataParallel(surgeon.apply(model))", ".module")
    del wrapped
    ddp = nn.parallel.DistributedDataParallel(surgeon.apply(model(), example=X))
    ddp(X).sum().backward()
    assert all(p.grad is not None for p in ddp.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_one_process")
def test_fsdp2_is_refused_whole_and_in_part() -> None:
    from torch.distributed.fsdp import fully_shard

    whole = model()
    try:
        fully_shard(whole, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"FSDP2 does not run here: {error}")
    refused(whole, "FSDP", "surgeon.apply(model) first", "fully_shard")
    part = nn.Sequential(model(), model())
    fully_shard(part[1], mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    refused(part, "its submodule 1", "FSDP")


class Gained(Plain):
    """A block with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.f(x)


def shard(block: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


def parametrise(block: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(block, "gain", nn.Softplus())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("keep_eval", [False, True])
@pytest.mark.parametrize("change", [shard, parametrise])
def test_a_class_that_a_block_got_after_its_gates_is_not_taken_off(
    change: Callable[[nn.Module], None], keep_eval: bool
) -> None:
    gated = nn.Sequential(Plain(), Gained())
    surgeon.apply(gated, scaling="paper", keep_eval=keep_eval, example=X)
    change(gated[1])
    before = Snapshot.of(gated)
    for operation in (surgeon.remove, surgeon.fold):
        with pytest.raises(WrappedModelError, match=f"^1 has become a {type(gated[1]).__name__} since "):
            operation(gated)
    assert before.differences(gated) == []
    assert len(surgeon.status(gated).gates) == 2


def test_with_the_parametrisation_off_again_gates_come_out() -> None:
    gated = surgeon.apply(nn.Sequential(Plain(), Gained()), example=X)
    parametrise(gated[1])
    nn.utils.parametrize.remove_parametrizations(gated[1], "gain")
    assert type(surgeon.remove(gated)[1]) is Gained


def test_compiled_models_are_refused() -> None:
    refused(torch.compile(model(), backend="eager"), "torch.compile(surgeon.apply(model))", "_orig_mod")
    part = nn.Sequential(torch.compile(Plain(), backend="eager"), Plain())
    refused(part, "its submodule 0", "compiled by torch.compile")


def test_models_compiled_in_place_are_refused_or_work() -> None:
    plain = model()
    expected = plain(X)
    plain.compile(backend="eager")
    try:
        surgeon.apply(plain, unit="batch", scaling="paper", drop_rate=0.0, example=X)
    except WrappedModelError as error:
        assert "compile" in str(error)  # noqa: PT017
    assert torch.equal(plain(X), expected)


def test_averages_are_refused() -> None:
    refused(torch.optim.swa_utils.AveragedModel(model()), "AveragedModel(surgeon.apply(model))", ".module")


@pytest.mark.parametrize("ema", [ModelEmaV2, ModelEmaV3])
def test_ema_copies_are_refused(ema: type[nn.Module]) -> None:
    refused(ema(model()), "ModelEmaV3(surgeon.apply(model))", ".module")


def test_the_old_ema_which_is_no_module_is_refused() -> None:
    with pytest.raises(SurgeonError, match="ModelEma"):
        surgeon.apply(ModelEma(model()), example=X)  # type: ignore[arg-type]


# --- models that are not ready ------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_children_are_named() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    with pytest.raises(SurgeonError, match="f is TorchScript, which cannot be looked into: use the module"):
        surgeon.find(Outer(), torch.zeros(2, 4))


def test_lazy_modules_are_named_and_stay_lazy() -> None:
    plain = nn.Sequential(nn.LazyLinear(4), Plain())
    with pytest.raises(SurgeonError, match=r"0\.weight|LazyLinear|lazy"):
        surgeon.apply(plain, example=X)
    assert type(plain[0]) is nn.LazyLinear
    assert nn.parameter.is_lazy(plain[0].weight)
    plain(X)
    assert len(surgeon.status(surgeon.apply(plain, example=X)).gates) == 1


def test_a_model_that_fails_says_how_and_keeps_its_state() -> None:
    class Fails(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            if x.shape[-1] == 4:
                raise KeyError("missing: positions")
            return x + self.f(x)

    plain = Net(Fails())
    before = Snapshot.of(plain)
    with pytest.raises(
        RecordError, match=r"Net could not be run on the example.*KeyError.*missing: positions"
    ):
        surgeon.apply(plain, example=X)
    assert before.differences(plain) == []
    assert not any(m._forward_hooks for m in plain.modules())


def test_a_missing_argument_is_named_with_the_whole_signature() -> None:
    class Masked(Branch):
        def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
            return x + self.f(x) * mask * scale

    with pytest.raises(RecordError, match="missing 1 required positional argument: 'mask'") as caught:
        surgeon.find(Masked(), X)
    assert "Its forward takes (x: torch.Tensor, mask: torch.Tensor, scale: float = 1.0)" in str(caught.value)
    assert len(surgeon.find(Masked(), (X, torch.ones(3, 4)))) == 1
    assert len(surgeon.find(Masked(), {"x": X, "mask": torch.ones(3, 4)})) == 1


def test_a_model_without_memory_is_gated_and_filled_later() -> None:
    with torch.device("meta"):
        plain = model()
    gated = surgeon.apply(plain, "uniform", drop_rate=0.0, example=X.to("meta"))
    assert len(surgeon.status(gated).gates) == 3
    other = randomise(model())
    gated.to_empty(device="cpu").load_state_dict(other.state_dict())
    gated.train()
    assert torch.equal(gated(X), other(X))


def test_every_error_is_a_surgeon_error_and_a_builtin_one() -> None:
    import surgeon.errors as module

    kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, SurgeonError)]
    assert len(kinds) > 8
    for kind in kinds:
        assert kind is SurgeonError or issubclass(kind, (ValueError, RuntimeError, TypeError, ImportError))
        assert kind.__doc__


def test_a_failed_apply_leaves_torch_as_it_was() -> None:
    flags = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_cache_enabled())
    for example in (torch.zeros(2, 5), X):
        with contextlib.suppress(SurgeonError):
            surgeon.apply(model(), example=example)
        assert type(torch.zeros(1) + 1) is Tensor
        assert (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_cache_enabled(),
        ) == flags
