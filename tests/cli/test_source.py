"""The model that a MODEL string names."""

import pytest
import timm
import torchvision
from torch import nn

from surgeon._source import load_model, normalisation, resolve
from surgeon.errors import CheckpointError, UsageError

_NETWORKS = """
from torch import nn

def tiny(width=4, img_size=None):
    made = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
    made.img_size = img_size
    return made

class Nested:
    make = staticmethod(tiny)

def by_image_size(image_size):
    return tiny(img_size=image_size)

def broken():
    raise RuntimeError("no such luck")

def text():
    return "a network"

number = 7
ready = tiny()
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "networks_of_mine.py").write_text(_NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "networks_of_mine", raising=False)
    return "networks_of_mine"


def test_bare_name_of_one_library():
    assert resolve("resnet10t") == "timm:resnet10t"
    assert resolve("shufflenet_v2_x0_5") == "torchvision:shufflenet_v2_x0_5"


def test_bare_name_of_both_is_refused_with_both_spellings():
    with pytest.raises(UsageError, match="write timm:resnet18 or torchvision:resnet18"):
        resolve("resnet18")


def test_bare_unknown_name_gets_suggestions():
    with pytest.raises(
        UsageError, match=r"no model 'resnet10' in timm, torchvision or recipes.*timm:resnet10t"
    ):
        resolve("resnet10")


@pytest.mark.parametrize("spec", ["timm:resnet10t", "torchvision:resnet18", "a.b:c"])
def test_full_spelling_stays(spec):
    assert resolve(spec) == spec


def test_timm_model_with_arguments():
    model = load_model("timm:resnet10t", num_classes=3)
    assert type(model) is timm.models.ResNet
    assert model.fc.out_features == 3


def test_torchvision_model_with_arguments():
    model = load_model("torchvision:shufflenet_v2_x0_5", num_classes=3)
    assert type(model) is torchvision.models.ShuffleNetV2
    assert model.fc.out_features == 3


def test_callable_beside_the_user(networks):
    assert load_model(f"{networks}:tiny", width=6)[0].out_channels == 6
    assert isinstance(load_model(f"{networks}:Nested.make"), nn.Sequential)


@pytest.mark.parametrize(("maker", "size"), [("tiny", 32), ("by_image_size", 32), ("Nested.make", 32)])
def test_image_size_goes_to_makers_that_take_one(networks, maker, size):
    assert load_model(f"{networks}:{maker}", img_size=size).img_size == size


def test_image_size_is_left_out_where_any_size_will_do():
    assert load_model("timm:resnet10t", img_size=64, num_classes=2).num_classes == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet18x", "timm has no model 'resnet18x'. Did you mean timm:resnet18"),
        ("timm:qqqqqqq", "timm has no model 'qqqqqqq'.$"),
        ("torchvision:resnet19", "torchvision has no model 'resnet19'. Did you mean torchvision:resnet18"),
        (
            "no_such_package:thing",
            "cannot import 'no_such_package'.*Known prefixes: timm:, torchvision:, recipes:",
        ),
        ("networks_of_mine:tinny", "networks_of_mine has no 'tinny'. Did you mean tiny"),
        ("networks_of_mine:number", "networks_of_mine:number is a int; name a function or class"),
        ("networks_of_mine:ready", "networks_of_mine:ready is a Sequential; name a function"),
        ("networks_of_mine:text", "networks_of_mine:text returned a str; it must return a torch.nn.Module"),
        ("networks_of_mine:broken", "cannot make networks_of_mine:broken.*RuntimeError: no such luck"),
    ],
)
def test_refused(networks, spec, message):
    with pytest.raises(UsageError, match=message):
        load_model(spec)


def test_refused_argument_is_named(networks):
    with pytest.raises(UsageError, match=r"cannot make networks_of_mine:tiny\(depth=3\): TypeError.*'depth'"):
        load_model(f"{networks}:tiny", depth=3, img_size=8)


def test_missing_checkpoint(networks, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(f"{networks}:tiny", checkpoint=tmp_path / "none.pt")


def test_normalisation_of_torchvision():
    assert normalisation("torchvision:resnet18") == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert normalisation("timm:resnet18") == {}
