"""Gradient by length of path: against a network whose paths can be written down, and its refusals."""

import itertools
import math

import pytest
import torch
from blocks import Plain, randomise
from torch import Tensor, nn

import surgeon
from surgeon.errors import UsageError

X = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """``x + a x``: its branch multiplies the gradient by ``a``, its shortcut by 1."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LeakyReLU(1.0))
        self.f[0].weight.data = a * torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_paths_of_a_linear_network_are_products_of_its_branches() -> None:
    """The mean over all paths of k branches is an elementary symmetric polynomial over their number."""
    scales = (0.5, 2.0, 0.25)
    model = nn.Sequential(*map(Scaled, scales))
    found = surgeon.path_gradients(model, [(X, torch.tensor([1]))], draws=400, example=X)
    whole = X.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(whole), torch.tensor([1]))
    (grad,) = torch.autograd.grad(loss, whole)
    one = grad.norm().item() / math.prod(1 + a for a in scales)  # of the path past all branches
    for k, got in zip(found.lengths, found.gradients, strict=True):
        products = [math.prod(some) for some in itertools.combinations(scales, k)]
        assert got == pytest.approx(one * sum(products) / len(products), rel=0.1)
    expected = [math.comb(3, k) * g for k, g in enumerate(found.gradients)]
    assert found.share == pytest.approx([e / sum(expected) for e in expected])
    assert sum(found.paths) == pytest.approx(1) and found.peak == 1
    assert found.gradients[0] == pytest.approx(one, rel=1e-4)
    assert found.gradients[3] == pytest.approx(one * math.prod(scales), rel=1e-4)


def test_the_model_stays_and_a_gated_one_will_do() -> None:
    model = randomise(nn.Sequential(*(Plain() for _ in range(4)))).train()
    x = torch.randn(5, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = surgeon.path_gradients(model, [x], example=x)
    assert model.training
    gated = surgeon.apply(model, drop_rate=0.5, example=x)
    assert surgeon.path_gradients(gated, [x], example=x).gradients == pytest.approx(plain.gradients, rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert surgeon.status(gated).expected_depth < 4
    assert "95 % of the gradient comes through" in str(plain) and len(plain.lengths) == 5


def test_what_is_refused() -> None:
    model = nn.Sequential(Scaled(1.0), Scaled(1.0))
    with pytest.raises(UsageError, match="lengths has 3; the network has 2 branches, so give 0 to 2"):
        surgeon.path_gradients(model, [X], lengths=[3], example=X)
    with pytest.raises(UsageError, match="one tensor of floating point"):
        surgeon.path_gradients(model, [{"input": X}], example=X)
