"""``surgeon.load``: what a checkpoint holds goes into whatever model, and evaluates as before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from blocks import Pair, Plain, randomise, same
from torch import Tensor, nn

import surgeon
from surgeon._checkpoint import save_checkpoint
from surgeon._gating.gated import gates_of, is_gated
from surgeon.errors import CheckpointError, UsageError, WrappedModelError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()


def chain(seed: int = 0) -> nn.Module:
    return randomise(nn.Sequential(Plain(), nn.Linear(4, 4), Pair()), seed).double().eval()


def gated(model: nn.Module, kind: str, **arguments: Any) -> nn.Module:
    """The model as it is, or with gates of a kind."""
    if kind == "stock":
        return model
    settings = {
        "inverted": {},
        "gated": {"scaling": "paper"},
        "divided": {"scaling": "paper", "keep_eval": True},
    }[kind]
    return surgeon.apply(model, example=X, **settings, **arguments).eval()  # type: ignore[arg-type]


def by_torch(model: nn.Module, path: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def by_surgeon(model: nn.Module, path: Path) -> Path:
    return save_checkpoint(model, path.with_suffix(".safetensors"))


WAYS: dict[str, Callable[[nn.Module, Path], Path]] = {"torch": by_torch, "surgeon": by_surgeon}
KINDS = {"stock": "stock", "inverted": "stock", "gated": "gated", "divided": "divided"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("into", KINDS)
@pytest.mark.parametrize("source", KINDS)
@torch.no_grad()
def test_any_weights_into_any_model(source: str, into: str, way: str, tmp_path: Path) -> None:
    trained, model = gated(chain(1), source), gated(chain(2), into)
    expected, other = trained(X), model(X)
    assert (expected - other).abs().max() > 1e-3
    path = WAYS[way](trained, tmp_path / "model")
    if KINDS[source] == "stock" and into == "gated":
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(
            CheckpointError,
            match=r"(does not say whether .*scales='model'|holds stock weights).* before surgeon\.apply",
        ):
            surgeon.load(model, path, example=X)
        assert same(dict(model.state_dict()), before)
        return
    report = surgeon.load(model, path, example=X)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-14)
    noted = way == "surgeon" or KINDS[source] != "stock"
    assert (report.found, report.into) == (KINDS[source] if noted else "unknown", KINDS[into])
    assert ("no note of scales: taken as stock weights" in str(report)) == (not noted)
    converts = {KINDS[source], KINDS[into]} not in (
        {"stock"},
        {"gated"},
        {"divided"},
        {"gated", "divided"},
    )
    assert bool(report.converted) == converts
    assert is_gated(model) == (into != "stock")
    if into != "stock":
        torch.testing.assert_close(surgeon.fold(model)(X), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("source", "into"), [("divided", "stock"), ("stock", "divided")])
def test_taking_them_as_they_are_would_differ(source: str, into: str, tmp_path: Path) -> None:
    """The control of the test above."""
    trained, model = gated(chain(1), source), gated(chain(2), into)
    state = {name: value for name, value in trained.state_dict().items() if "extra" not in name}
    model.load_state_dict({**state, **{k: v for k, v in model.state_dict().items() if "extra" in k}})
    assert (model(X) - trained(X)).abs().max() > 1e-2
    surgeon.load(model, by_torch(trained, tmp_path / "model"), example=X)
    torch.testing.assert_close(model(X), trained(X), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["gated", "divided"])
def test_other_scales_are_converted(kind: str, tmp_path: Path) -> None:
    trained, model = gated(chain(1), kind, drop_rate=0.3), gated(chain(2), kind, drop_rate=0.6)
    path = by_torch(trained, tmp_path / "model")
    with pytest.raises(CheckpointError, match="the model's are"):
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    report = surgeon.load(model, path, example=X)
    assert report.converted
    assert [gate.scale for gate in gates_of(model)] == pytest.approx([0.7, 0.4, 0.4])
    torch.testing.assert_close(model(X), trained(X), rtol=1e-12, atol=1e-14)


def test_a_stock_model_stays_one(tmp_path: Path) -> None:
    trained, model = gated(chain(1), "divided"), chain(2)
    kinds, objects = [type(m) for m in model.modules()], [id(p) for p in model.parameters()]
    report = surgeon.load(model, by_surgeon(trained, tmp_path / "model"), example=X)
    assert [type(m) for m in model.modules()] == kinds
    assert [id(p) for p in model.parameters()] == objects
    assert report.scales == {"0.add": 0.75, "2.add": 0.5, "2.add_1": 0.5}
    assert set(report.converted) == {
        f"{n}.{k}" for n in ("0.f.2", "2.f.1", "2.g.1") for k in ("weight", "bias")
    }
    assert str(report).endswith(
        "weights that were divided by evaluation scales into a model with stock weights, "
        "converted in 6 parameters"
    )


def test_the_prefix_of_a_wrapper_comes_off_the_gates_too(tmp_path: Path) -> None:
    trained, model = gated(chain(1), "gated"), chain(2)
    torch.save(nn.ModuleDict({"module": trained}).state_dict(), tmp_path / "ddp.pth")
    surgeon.load(model, tmp_path / "ddp.pth", example=X)
    torch.testing.assert_close(model(X), trained(X), rtol=1e-12, atol=1e-14)


def test_scales_that_nothing_noted_cannot_be_known(tmp_path: Path) -> None:
    """A state dict of the paper's rule that went through other hands has stock keys and no note."""
    trained, model = gated(chain(1), "gated"), chain(2)
    safetensors.torch.save_file(dict(trained.state_dict()), tmp_path / "m.safetensors")
    report = surgeon.load(model, tmp_path / "m.safetensors")
    assert report.found == "unknown"
    assert "no note of scales: taken as stock weights, as they are" in str(report)
    assert "scales=surgeon.status(trained).scales" in str(report)
    assert (model(X) - trained(X)).abs().max() > 1e-2


def test_scales_that_nothing_noted_can_be_told(tmp_path: Path) -> None:
    """Into a stock model by name, and into one with the gates of that training."""
    trained, path = gated(chain(1), "gated"), tmp_path / "m.safetensors"
    safetensors.torch.save_file(dict(trained.state_dict()), path)
    for model in (chain(2), gated(chain(2), "divided")):
        surgeon.load(model, path, scales=surgeon.status(trained).scales, example=X)
        torch.testing.assert_close(model(X), trained(X), rtol=1e-12, atol=1e-14)
    twin = gated(chain(2), "gated")
    assert not surgeon.load(twin, path, scales="model").converted
    torch.testing.assert_close(twin(X), trained(X), rtol=0, atol=0)
    wrong: list[tuple[Any, str]] = [
        ("all", "scales is 'all'; give 'model'"),
        ({"0.add": 1.5}, r"0\.add has 1\.5; an evaluation scale lies in \(0, 1\]"),
        ("model", "the model has no gates with evaluation scales"),
    ]
    for scales, message in wrong:
        with pytest.raises(surgeon.SurgeonError, match=message):
            surgeon.load(chain(2), path, scales=scales, example=X)
    noted = by_surgeon(trained, tmp_path / "noted")
    with pytest.raises(CheckpointError, match="notes its scales itself; leave scales out"):
        surgeon.load(twin, noted, scales="model")


@pytest.mark.parametrize("home", ["config", "pretrained_cfg"])
def test_a_configuration_beside_the_weights_may_note_them(home: str, tmp_path: Path) -> None:
    """As Hugging Face's and timm's savers write it, of a model whose configuration was told the scales."""
    trained, model = gated(chain(1), "gated"), chain(2)
    note = {"surgeon_scales": surgeon.status(trained).scales}
    config = note if home == "config" else {"architecture": "chain", "pretrained_cfg": note}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "pytorch_model.bin"):
        state = {key: value.clone() for key, value in trained.state_dict().items()}
        if name.endswith(".bin"):
            torch.save(state, tmp_path / name)
        else:
            safetensors.torch.save_file(state, tmp_path / name)
        report = surgeon.load(model, tmp_path / name, example=X)
        assert report.found == "gated"
        torch.testing.assert_close(model(X), trained(X), rtol=1e-12, atol=1e-14)


# What cannot be done changes nothing.


class Ending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def refused(model: nn.Module, path: Path, match: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError, match=match):
        surgeon.load(model, path, example=X)
    assert same(dict(model.state_dict()), before)
    assert [type(m) for m in model.modules()] == kinds


def test_a_scale_that_no_weight_takes(tmp_path: Path) -> None:
    make = lambda seed: randomise(nn.Sequential(nn.Linear(4, 4), Ending()), seed).double().eval()  # noqa: E731
    trained = gated(make(1), "gated")
    path = by_surgeon(trained, tmp_path / "m")
    refused(make(2), path, r"no weight takes the scale of 1 gates \(1\.add: the branch ends in silu")
    alike = gated(make(2), "gated")
    surgeon.load(alike, path)
    assert torch.equal(alike(X), trained(X))


def test_a_gate_where_the_model_has_none(tmp_path: Path) -> None:
    path = by_surgeon(gated(chain(1), "divided"), tmp_path / "m")
    refused(
        gated(chain(2), "divided", exclude=["0.add"]), path, r"a gate on 0\.add, where the model has none"
    )


def test_a_gate_that_the_model_cannot_have(tmp_path: Path) -> None:
    path = save_checkpoint(
        nn.Sequential(nn.Linear(4, 4)), tmp_path / "m.safetensors", {"scales": {"0.add": 0.5}}
    )
    refused(nn.Sequential(nn.Linear(4, 4)).double(), path, "the checkpoint's gates do not fit Sequential")


@pytest.mark.parametrize("noted", ["[1]", '{"0.add": "much"}', '{"0.add": 0}', '{"0.add": NaN}', "{"])
def test_notes_that_make_no_sense(noted: str, tmp_path: Path) -> None:
    path = save_checkpoint(chain(1), tmp_path / "m.safetensors", {"scales": noted})
    refused(chain(2), path, "the checkpoint's metadata notes")


def test_a_product_that_overflows(tmp_path: Path) -> None:
    trained, model = chain(1).float(), gated(chain(2).float(), "divided")
    nn.init.constant_(trained[2].g[1].bias, 3e38)  # type: ignore[arg-type, union-attr, index]
    refused(model, by_torch(trained, tmp_path / "m"), r"'2\.g\.1\.bias' overflows torch\.float32")


def test_what_is_not_finite(tmp_path: Path) -> None:
    trained = chain(1)
    nn.init.constant_(trained[2].g[1].bias, float("nan"))  # type: ignore[arg-type, union-attr, index]
    refused(
        gated(chain(2), "divided"), by_torch(trained, tmp_path / "m"), r"not finite: 2\.g\.1\.bias \(4 of 4\)"
    )


def bounded(bound: float) -> nn.Module:
    """A model with a bound that is learned by nobody."""
    model = chain(1)
    model.register_buffer("bound", torch.tensor([0.0, bound]))
    return model


def test_a_buffer_may_be_infinite_on_purpose(tmp_path: Path) -> None:
    """Masks and bounds hold infinities; NaN is wrong there too, and infinity in any weight."""
    path = by_torch(bounded(float("-inf")), tmp_path / "m")
    model = bounded(0.0)
    surgeon.load(model, path)
    assert model.get_buffer("bound")[1] == float("-inf")
    refused(bounded(0.0), by_torch(bounded(float("nan")), tmp_path / "n"), r"not finite: bound \(1 of 2\)")
    trained = chain(1)
    nn.init.constant_(trained[2].g[1].bias, float("inf"))  # type: ignore[arg-type, union-attr, index]
    refused(chain(1), by_torch(trained, tmp_path / "o"), r"not finite: 2\.g\.1\.bias \(4 of 4\)")


def test_another_architecture(tmp_path: Path) -> None:
    path = by_torch(nn.Linear(4, 4), tmp_path / "m")
    refused(gated(chain(2), "divided"), path, "does not fit Sequential.*It holds another architecture")


def test_a_wrapped_model(tmp_path: Path) -> None:
    path = by_torch(chain(1), tmp_path / "m")
    with pytest.raises(WrappedModelError):
        surgeon.load(torch.optim.swa_utils.AveragedModel(chain(2)), path)


def test_a_model_without_memory(tmp_path: Path) -> None:
    path = by_torch(chain(1), tmp_path / "m")
    model = chain(2).to("meta")
    with pytest.raises(UsageError, match=r"0\.f\.0\.weight is on the meta device; call model\.to_empty\("):
        surgeon.load(model, path)
    report = surgeon.load(model.to_empty(device="cpu"), path)
    assert report.found == "unknown"
    assert same(dict(model.state_dict()), dict(chain(1).state_dict()))


class Counting(Plain):
    """A class with an extra state of its own, which is not ours to read."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(1, 2)

    def set_extra_state(self, state: Any) -> None:
        self.count = state


def test_an_extra_state_of_the_model_itself_comes_along(tmp_path: Path) -> None:
    trained, model = (
        randomise(nn.Sequential(Counting(), Pair())).double(),
        nn.Sequential(Counting(), Pair()).double(),
    )
    gated(trained, "divided", exclude=["Counting"])
    report = surgeon.load(model, by_torch(trained, tmp_path / "m"), example=X)
    assert list(report.scales) == ["1.add", "1.add_1"]
    assert model[0].count.shape == (1, 2)
    torch.testing.assert_close(model(X), trained.eval()(X))


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.int64, "int64"), (torch.bool, "bool"), (torch.complex64, "complex64")]
)
def test_numbers_of_another_kind_are_no_weights(dtype: torch.dtype, said: str, tmp_path: Path) -> None:
    """Cast, they would be nonsense: all of a network's weights are 0 as integers."""
    model, state = chain(), chain(1).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(iter(state))
    state[name] = state[name].to(dtype)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=f"1 of another type: {name} is {said}, the model.s is float64"):
        surgeon.load(model, tmp_path / "c.pth")
    assert same(before, model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_real_numbers_of_any_precision_are_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model, state = chain(), chain(1).to(dtype).state_dict()
    torch.save(state, tmp_path / "c.pth")
    surgeon.load(model, tmp_path / "c.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype))


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "module._orig_mod."])
def test_a_prefix_of_all_names_comes_off(prefix: str, tmp_path: Path) -> None:
    """Whoever trains a network as a part of another module (Lightning's) saves its name with the weights."""
    model, state = chain(), chain(1).state_dict()
    torch.save({"state_dict": {prefix + name: value for name, value in state.items()}}, tmp_path / "c.pth")
    surgeon.load(model, tmp_path / "c.pth")
    assert same(dict(state), dict(model.state_dict()))


def test_counters_may_come_as_real_numbers(tmp_path: Path) -> None:
    """Averages of checkpoints hold nothing else."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    state = {name: value.float() for name, value in model.state_dict().items()}
    state["1.num_batches_tracked"] += 3
    torch.save(state, tmp_path / "c.pth")
    surgeon.load(model, tmp_path / "c.pth")
    assert model[1].num_batches_tracked == 3
