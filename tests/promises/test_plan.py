"""A plan says what `apply` will do, in print and as data; apply carries it out, for that model as it was."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Plain, Twice, X, randomise, same
from torch import Tensor, nn

import surgeon
from surgeon._report import Plan
from surgeon.errors import AlreadyGatedError, NoResidualsError, UsageError


class Net(nn.Module):
    """Two blocks and a sum that is no residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Plain(), Twice())
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        out: Tensor = self.a(x) + self.b(x)
        return out


def test_a_plan_changes_nothing_and_says_everything() -> None:
    model = randomise(Net())
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    plan = surgeon.plan(model, drop_rate=0.4, unit="batch", scaling="paper", example=X)
    assert [type(m) for m in model.modules()] == classes
    assert same(dict(model.state_dict()), dict(before))
    assert [gate.name for gate in plan] == ["blocks.0.add", "blocks.1.add", "blocks.1.add_1"]
    assert [gate.survival for gate in plan] == pytest.approx([0.8, 0.6, 0.6])
    assert len(plan) == 3
    (refusal,) = plan.refused
    text = str(plan)
    for said in (
        "3 residual adds",
        "0.800",
        "skipped",
        "left alone: 1 addition",
        refusal.reason,
        "unit batch",
    ):
        assert said in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.schedule = "uniform"  # type: ignore[misc]


@pytest.mark.parametrize(
    "how", [{}, {"unit": "batch", "scaling": "paper"}, {"skip": False, "exclude": ["*add_1"]}]
)
def test_applying_a_plan_is_applying_its_arguments(how: dict[str, Any]) -> None:
    model, other = randomise(Net()), randomise(Net())
    plan = surgeon.plan(model, drop_rate=0.4, example=X, **how)
    assert surgeon.apply(model, plan) is model
    surgeon.apply(other, drop_rate=0.4, example=X, **how)
    assert surgeon.status(model) == surgeon.status(other)
    rows = [
        {f.name: getattr(gate, f.name) for f in dataclasses.fields(type(s))}
        for gate, s in zip(plan, surgeon.status(model), strict=True)
    ]
    assert rows == [dataclasses.asdict(s) for s in surgeon.status(model)]
    runs = []
    for net in (model, other):
        torch.manual_seed(0)
        runs.append([net(X), net.eval()(X)])
    assert same(*runs)


def swapped(model: Any) -> None:
    model.blocks[0] = Plain()


def removed(model: Any) -> None:
    del model.blocks[1]


def appended(model: Any) -> None:
    model.blocks.append(Plain())


def reordered(model: Any) -> None:
    model.blocks = nn.Sequential(model.blocks[1], model.blocks[0])


def another_layer(model: Any) -> None:
    model.blocks[0].f[1] = nn.GELU()


def another_weight(model: Any) -> None:
    model.blocks[0].f[0].weight = nn.Parameter(torch.zeros(4, 4))


def cast(model: Any) -> None:
    model.double()


def wider(model: Any) -> None:
    model.blocks[0].f = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))


def another_forward(model: Any) -> None:
    model.blocks[0].__class__ = type("Plain", (Plain,), {"forward": lambda self, x: self.f(x)})


def gated_meanwhile(model: Any) -> None:
    surgeon.apply(model, example=X)


CHANGES = (
    *(swapped, removed, appended, reordered, another_layer, another_weight, cast, wider, another_forward),
    gated_meanwhile,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_since_takes_no_plan(change: Callable[[Any], None]) -> None:
    model = randomise(Net())
    plan = surgeon.plan(model, example=X)
    change(model)
    classes, names = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(
        (UsageError, AlreadyGatedError), match=r"has changed since the plan was made|has gates"
    ):
        surgeon.apply(model, plan)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == names


def test_a_number_that_the_forward_reads_changes_the_plan() -> None:
    class Switch(Plain):
        on = True

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) if self.on else self.f(x)

    model = nn.Sequential(Switch(), Plain())
    plan = surgeon.plan(model, example=X)
    model[0].on = False
    with pytest.raises(UsageError, match=r"has changed since the plan was made \(first at 0\.add\)"):
        surgeon.apply(model, plan)


def test_training_and_other_values_change_no_plan() -> None:
    model = randomise(Net())
    plan = surgeon.plan(model, example=X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).sum().backward()
    optimizer.step()
    assert len(surgeon.status(surgeon.apply(model.eval(), plan))) == 3


def test_another_model_takes_no_plan() -> None:
    model = randomise(Net())
    plan = surgeon.plan(model, example=X)
    for other in (copy.deepcopy(model), Plain()):
        with pytest.raises(UsageError, match="the plan was made for another model than this"):
            surgeon.apply(other, plan)
        assert type(other) in (Net, Plain)


def test_a_plan_says_it_all() -> None:
    model = randomise(Net())
    plan = surgeon.plan(model, example=X)
    for more in ({"unit": "batch"}, {"drop_rate": 0.2}, {"example": X}, {"overrides": {"*": 0.1}}):
        with pytest.raises(UsageError, match=f"leave out {next(iter(more))}"):
            surgeon.apply(model, plan, **more)


def test_nothing_to_gate_is_an_empty_plan() -> None:
    model = nn.Linear(4, 4)
    plan = surgeon.plan(model, example=X)
    assert len(plan) == 0 and "0 residual adds" in str(plan)
    with pytest.raises(NoResidualsError, match="no residual add to gate"):
        surgeon.apply(model, plan)


# --- results ------------------------------------------------------------------


def results() -> dict[str, Any]:
    model = randomise(Net())
    found, plan = surgeon.find(model, X), surgeon.plan(model, scaling="paper", example=X)
    return {"find": found, "plan": plan, "status": surgeon.status(surgeon.apply(model, plan))}


@pytest.mark.parametrize("name", ["find", "plan", "status"])
def test_results_iterate_and_draw_themselves(name: str) -> None:
    result = results()[name]
    assert len(list(result)) == len(result) == 3 and result[0] is next(iter(result))
    assert json.loads(json.dumps(result.to_dict()))
    text, markup = str(result), result._repr_html_()
    for row in result:
        assert row.name in text and f">{row.name}</td>" in markup
    assert markup.count("<table>") == markup.count("</table>") >= 1


def test_markup_is_escaped() -> None:
    class Odd(Plain):
        """Its name is no markup."""

    Odd.__name__ = "<b>"
    plan = surgeon.plan(nn.Sequential(Odd()), example=X)
    assert isinstance(plan, Plan)
    assert '<td style="text-align: left">&lt;b&gt;</td>' in plan._repr_html_()
