"""Forwards that a graph may not hold are refused with a reason, or right; never wrong, never a crash.

Grad and autocast regions, checkpoints, custom autograd functions, assignments to self, children in plain
lists, branches on data: each is compared with the plain block, inside and outside of autocast.
"""

from typing import Any

import pytest
import torch
from blocks import Branch, Net, X, randomise, same, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgeon
from surgeon.errors import NoResidualsError


class AssignsSelf(Branch):
    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return x + self.f(self.x)


class NoGrad(Branch):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.f(x).abs().mean()
        return x + self.f(x) * scale


class Autocast(Branch):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.f(x)
        return x + y.float()


class AutocastOff(Branch):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.f(x.float())
        return x + y


class PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.Tanh()]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y


class Checkpointed(Branch):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.f, x, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] * grad  # not 2: a trace through forward alone would show


class OwnFunction(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + Square.apply(self.f(x))


class Detached(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x.detach()) * x.data.mean()


class Item(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * float(x.shape[0]) * self.f[0].weight.shape[0]


class DataDependent(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if x.sum() > 0 else x


class TryExcept(Branch):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.f(x).view(3, 2, 2).flatten(1)
        except RuntimeError:
            y = self.f(x)
        return x + y


class Numpy(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * float(x.detach().numpy().mean())


ODD = [
    *(AssignsSelf, NoGrad, Autocast, AutocastOff, PlainList, Checkpointed, CheckpointedReentrant),
    *(OwnFunction, Detached, Item, TryExcept),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("odd", ODD, ids=lambda o: o.__name__)
def test_odd_forwards_are_refused_with_a_reason_or_right(odd: type[nn.Module]) -> None:
    plain, outer = randomise(Net(odd())), torch.autocast("cpu", dtype=torch.bfloat16)
    findings = surgeon.find(plain, X)
    if not len(findings):
        (refusal,) = findings.refused
        assert refusal.code == "untraceable"
        assert refusal.name == "block.add"
        assert len(refusal.reason) > len("the block could not be traced: ")
        with pytest.raises(NoResidualsError, match="could not be traced"):
            surgeon.apply(plain, example=X)
        return
    reference = step(plain, plain, X)
    with outer:
        cast = step(plain, plain, X)
    for unit in ("batch", "sample"):
        surgeon.apply(plain, unit=unit, scaling="paper", drop_rate=0.0, example=X)
        assert same(step(plain, plain, X), reference)
        with outer:
            assert same(step(plain, plain, X), cast)
        surgeon.remove(plain)


@pytest.mark.parametrize("odd", [DataDependent, Numpy], ids=lambda o: o.__name__)
def test_forwards_on_data_fail_with_a_surgeon_error_or_work(odd: type[nn.Module]) -> None:
    model = randomise(Net(odd()))
    expected = model(X)
    try:
        surgeon.apply(model, unit="batch", scaling="paper", drop_rate=0.0, example=X)
    except surgeon.SurgeonError as error:
        assert len(str(error)) > 40  # noqa: PT017
    assert same(model(X), expected)
