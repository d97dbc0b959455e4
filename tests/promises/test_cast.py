"""A model that was cast after `apply`: what was recorded then follows the new type."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Plain, randomise
from torch import Tensor, nn

import surgeon

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Scaled(Plain):
    """A block that is called with a second tensor, or without it, and with whole numbers."""

    def forward(self, x: Tensor, by: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        if index is not None:
            x = x[index]
        y = self.f(x)
        return x + (y if by is None else y * by)


class Net(nn.Module):
    """What stands before its gated blocks takes whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.block, self.last = Scaled(), Plain()

    def forward(self, tokens: Tensor, by: Tensor) -> Tensor:
        out: Tensor = self.last(self.block(self.table(tokens), by))
        return out


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to": lambda m: m.to(torch.float64),
    "twice": lambda m: m.half().double(),
    "there and back": lambda m: m.double().float(),
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("cast", CASTS)
def test_a_model_folds_whatever_type_it_has_become(cast: str, kept: bool) -> None:
    model = surgeon.apply(
        randomise(nn.Sequential(Plain(), Plain())), scaling="paper", keep_eval=kept, example=X
    )
    CASTS[cast](model).eval()
    dtype = next(model.parameters()).dtype
    x = X.to(dtype)
    folded = surgeon.fold(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    near = {torch.float16: 1e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-5)
    torch.testing.assert_close(folded(x), model(x), rtol=near, atol=near)
    plain = surgeon.remove(model)
    if kept:
        torch.testing.assert_close(plain(x), folded(x), rtol=near, atol=near)


@pytest.mark.parametrize("cast", ["double", "half", "there and back"])
def test_whole_numbers_stay_whole_and_masks_follow(cast: str) -> None:
    tokens, by = torch.tensor([[1, 2, 3]]), torch.rand(1, 3, 4)
    model = surgeon.apply(randomise(Net()), scaling="paper", example=(tokens, by))
    CASTS[cast](model).eval()
    by = by.to(model.table.weight.dtype)
    near = 1e-2 if by.dtype is torch.float16 else 1e-5
    torch.testing.assert_close(surgeon.fold(model)(tokens, by), model(tokens, by), rtol=near, atol=near)


def test_another_way_of_calling_a_block_that_came_before_the_cast_counts_still() -> None:
    """Its arguments are made anew in the new type; were they not, nothing could be said of them."""
    model: Any = surgeon.apply(randomise(nn.Sequential(Scaled())), scaling="paper", example=X).eval()
    model[0](X, torch.ones(4))
    model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = surgeon.fold(model)
    torch.testing.assert_close(folded(X.double()), model(X.double()))


@pytest.mark.parametrize("cast", ["double", "there and back"])
def test_a_cast_model_exports_on_the_example_that_is_given(cast: str, tmp_path: Path) -> None:
    model = surgeon.apply(randomise(nn.Sequential(Plain(), Plain())), scaling="paper", example=X)
    CASTS[cast](model)
    report = surgeon.export(model, tmp_path / "m.onnx", example=X.to(next(model.parameters()).dtype))
    assert report.parity.ok and len(report.folded) == 2


def test_export_folds_for_the_example_and_not_for_that_of_apply(tmp_path: Path) -> None:
    """Of other sizes than `apply` saw, which alone would not run any more."""
    model: Any = nn.Sequential(nn.Linear(4, 4), Plain())
    surgeon.apply(model, scaling="paper", example=X)
    model[0] = nn.Linear(6, 4)
    report = surgeon.export(model, tmp_path / "m.onnx", example=torch.zeros(2, 6))
    assert report.parity.ok and report.folded == ("1.add",)


def test_weights_load_into_a_cast_model(tmp_path: Path) -> None:
    trained = surgeon.apply(randomise(nn.Sequential(Plain(), Plain())), scaling="paper", example=X).eval()
    path = surgeon.save_checkpoint(trained, tmp_path / "m.safetensors")
    other = surgeon.apply(nn.Sequential(Plain(), Plain()), scaling="paper", keep_eval=True, example=X)
    surgeon.load(other.double().eval(), path)
    torch.testing.assert_close(other(X.double()), trained.double()(X.double()), rtol=1e-6, atol=1e-6)
