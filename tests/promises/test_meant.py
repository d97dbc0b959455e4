"""What a user may have meant is said: the call, the schedule, the pattern, the name."""

import inspect
import pickle

import pytest
import timm
import torch
from torch import nn

import surgeon
from surgeon._meant import did_you_mean, matching, nearest, says_the_call
from surgeon.errors import UsageError


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet18")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda m: surgeon.apply(m, "linear", 0.2), "surgeon.apply(model, 'linear', drop_rate=0.2)"),
        (lambda m: surgeon.plan(m, "linear", 0.2), "surgeon.plan(model, 'linear', drop_rate=0.2)"),
        (lambda m: surgeon.apply(m, drop_path_rate=0.2), "surgeon.apply(model, drop_rate=0.2)"),
        (
            lambda m: surgeon.apply(m, "uniform", drop_path=0.2, unit="batch"),
            "surgeon.apply(model, 'uniform', drop_rate=0.2, unit='batch')",
        ),
        (
            lambda m: surgeon.apply(m, p=0.2, mode="batch"),
            "surgeon.apply(model, drop_rate=0.2, unit='batch')",
        ),
        (lambda m: surgeon.apply(m, modell=0), "its arguments are model, schedule, drop_rate, unit"),
        (lambda m: surgeon.apply(m, 0.2), "write drop_rate=0.2"),
        (lambda m: surgeon.apply(m, survival=0.8), "its arguments are model, schedule, drop_rate, unit"),
        (lambda m: surgeon.set_drop_rate(m, drop_rate=0.2), "surgeon.set_drop_rate(model, rate=0.2)"),
        (
            surgeon.export,
            "missing a required argument: 'path'; write surgeon.export(model, path)",
        ),
        (lambda m: surgeon.find(m, input=torch.zeros(2, 3, 8, 8)), "surgeon.find"),
    ],
)
def test_a_call_of_another_form_is_answered_with_the_right_one(model, call, line):
    with pytest.raises(UsageError) as told:
        call(model)
    assert line in str(told.value)
    with pytest.raises(surgeon.SurgeonError, match="has no gates"):
        surgeon.status(model)


def test_the_line_that_is_named_works(model):
    with pytest.raises(UsageError) as told:
        surgeon.plan(model, "linear", 0.2)
    line = str(told.value).rpartition("; write ")[2]
    assert len(eval(line, {"surgeon": surgeon, "model": model}).gates) == 8  # noqa: S307 - our own words


def test_public_functions_say_it_and_stay_what_they_are():
    functions = [getattr(surgeon, name) for name in surgeon.__all__ if name[0].islower()]
    assert len(functions) >= 19
    for function in functions:
        with pytest.raises(UsageError, match=f"surgeon.{function.__name__}: "):
            function(*[None] * 20)
        assert pickle.loads(pickle.dumps(function)) is function  # noqa: S301 - our own
        assert "self" not in inspect.signature(function).parameters


def test_an_error_inside_is_left_alone():
    @says_the_call
    def adds(one, other=2):
        return one + other

    with pytest.raises(TypeError, match="unsupported operand") as told:
        adds("a" and 1, None)
    assert not isinstance(told.value, UsageError)
    assert adds(1) == 3


def test_a_warning_is_of_the_line_that_calls():
    model = nn.Sequential(_Ends())
    surgeon.apply(model, scaling="paper", example=torch.zeros(2, 4))
    with pytest.warns(UserWarning, match="keep one multiplication") as told:
        surgeon.fold(model)
    assert told[0].filename == __file__


class _Ends(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + nn.functional.silu(self.fc(x))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"exclude": "layer1"}, "Did you mean 'layer1*'?"),
        ({"include": ["layer1."]}, "Did you mean 'layer1*'?"),
        ({"include": ["basicblock"]}, "Did you mean 'BasicBlock'?"),
        ({"include": [r"^layer4\..*"]}, "Did you mean 'layer4.*'?"),
        ({"exclude": ["1.0.add"]}, r"Did you mean '*1.0.add*'?"),
        ({"exclude": "layr1.0.add"}, "Did you mean 'layer1.0.add'?"),
        ({"overrides": {"layer4": 0.1}}, "Did you mean 'layer4*'?"),
        ({"schedule": "liner"}, "Did you mean 'linear'?"),
        ({"schedule": "linear_from_zero"}, "Did you mean 'linear-from-zero'?"),
        ({"schedule": "Uniform"}, "Did you mean 'uniform'?"),
    ],
)
def test_patterns_and_schedules(model, given, meant):
    with pytest.raises(UsageError) as told:
        surgeon.plan(model, **given)
    assert meant.rstrip("?") in str(told.value)
    if "overrides" not in given and "schedule" not in given:
        (name,) = given
        suggested = meant.split("'")[1]
        assert surgeon.plan(model, **{name: [suggested]}).gates


@pytest.mark.parametrize("given", [{"exclude": "zzz"}, {"schedule": "cosine"}, {"include": ["*.*.*.*.*"]}])
def test_where_nothing_is_near_nothing_is_named(model, given):
    with pytest.raises(UsageError) as told:
        surgeon.plan(model, **given)
    assert "Did you mean" not in str(told.value)


def test_every_pattern_that_is_named_matches():
    names = ["layer1.0.add", "layer1.0", "blocks.3.attn_add", "BasicBlock"]
    for wrong in ("attn", "LAYER1", ".*attn.*", "layer1.*.add2", "basic", "3", "*attn", "blocks.[0-9].attn"):
        found = matching(wrong, names)
        assert found == "" or __import__("fnmatch").filter(names, found), wrong
    assert matching("attn", names) == "*attn*"
    assert matching("", names) == matching("***", names) == ""


def test_names():
    assert nearest("ResNet18", ["resnet18", "vgg"]) == ["resnet18"]
    assert nearest("res", ["resnet18", "resnet18d"], most=2) == ["resnet18", "resnet18d"]
    assert nearest("nothing", ["resnet18"]) == []
    assert did_you_mean([]) == ""
