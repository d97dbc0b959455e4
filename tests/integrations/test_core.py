"""What all integrations share, without any library: which network, notes on models, what cannot be folded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blocks import Plain, X
from torch import nn

import surgeon
from surgeon._gating.gated import gated_network
from surgeon._note import put_note
from surgeon.errors import UsageError
from surgeon.integrations.core import GateTraining


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Plain(), nn.Sequential(Plain()))


class Holder(nn.Module):
    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, one in networks.items():
            setattr(self, name, one)


def gated(model: nn.Module | None = None, **how: object) -> nn.Module:
    return surgeon.apply(model or network(), example=X, **({"scaling": "paper"} | how))  # type: ignore[arg-type]


def test_which_part_of_a_model_is_the_network() -> None:
    assert gated_network(network()) is None
    assert gated_network(gated()) == ""
    assert gated_network(Holder(inner=Holder(net=gated()))) == "inner.net"
    assert gated_network(Holder(one=gated(), two=gated())) == ""  # two of them: all of it
    alone = Holder(part=gated()[2])
    assert gated_network(alone) == ""  # a part of one


class Settings(SimpleNamespace):
    """As the configuration of a network of Hugging Face's."""

    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))


@pytest.mark.parametrize(
    ("name", "home"), [("config", Settings(size=4)), ("pretrained_cfg", {"size": 4})], ids=["object", "dict"]
)
@pytest.mark.parametrize("out", [surgeon.fold, surgeon.remove])
def test_a_note_on_the_model_goes_with_its_gates(name: str, home: object, out: object) -> None:
    model = network()
    setattr(model, name, home)
    gated(model)
    put_note(model)
    told = home if isinstance(home, dict) else vars(home)
    assert told["surgeon_scales"] == surgeon.status(model).scales and len(surgeon.status(model).scales) == 2
    plain = out(model)  # type: ignore[operator]
    left = getattr(plain, name)
    assert (left if isinstance(left, dict) else vars(left)) == {"size": 4}


def test_a_note_of_what_a_fold_leaves_is_of_that() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), nn.SiLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.f(x)

    model = nn.Sequential(Plain(), Ends())
    model.pretrained_cfg = {}  # type: ignore[assignment]
    gated(model)
    put_note(model)
    with pytest.warns(UserWarning, match="1 of 2 gates keep one multiplication"):
        plain = surgeon.fold(model)
    assert plain.pretrained_cfg == {"surgeon_scales": {"1.add": 0.5}}


def test_other_configurations_are_left_alone() -> None:
    class Frozen(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: object, value: object) -> None:
            raise AssertionError("frozen")

    model = network()
    model.config = Frozen(size=4)  # type: ignore[assignment]
    model.pretrained_cfg = None  # type: ignore[assignment]
    put_note(gated(model))
    assert model.config == {"size": 4}
    inverted = network()
    inverted.pretrained_cfg = {}  # type: ignore[assignment]
    put_note(gated(inverted, scaling="inverted"))
    assert inverted.pretrained_cfg == {}


def test_a_model_that_cannot_be_folded_in_the_end_is_refused_at_the_start(tmp_path: Path) -> None:
    model = Holder(net=gated())
    model.net.add_module("3", nn.DataParallel(nn.Linear(4, 4)))  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"cannot be folded at the end of .*; leave deliver out"):
        GateTraining(deliver=tmp_path).start(model)
    GateTraining().start(model)
    (tmp_path / "file").write_text("")
    with pytest.raises((UsageError, FileExistsError)):
        GateTraining(deliver=tmp_path / "file").start(gated())


def test_a_shape_by_name_and_a_count_from_outside() -> None:
    model = gated(scaling="inverted")
    training = GateTraining(ramp={"drop_rate": 0.5, "shape": "cosine"})
    training.start(model, total=4, done=2)
    assert training.ramp is not None and training.ramp.rate == pytest.approx(0.25)
    training.step(4)
    assert training.ramp.rate == 0.5
    assert training.end() is None and training.plain is None


def test_timm_takes_the_note_along(tmp_path: Path) -> None:
    """Its own saver, as it is: the weights with their scales, and without a note when they are folded."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("huggingface_hub")
    x = torch.randn(2, 3, 32, 32)
    model, stock = (timm.create_model("resnet10t", num_classes=3).eval() for _ in range(2))
    surgeon.apply(model, unit="batch", scaling="paper", example=x)
    GateTraining().start(model)
    timm.models.save_for_hf(model, tmp_path / "gated", safe_serialization=True)
    assert surgeon.load(stock, tmp_path / "gated" / "model.safetensors", example=x).found == "gated"
    torch.testing.assert_close(stock(x), model(x), rtol=1e-4, atol=1e-5)
    timm.models.save_for_hf(surgeon.fold(model), tmp_path / "plain", safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    again = timm.create_model("resnet10t", num_classes=3)
    assert surgeon.load(again, tmp_path / "plain" / "model.safetensors").found == "unknown"
