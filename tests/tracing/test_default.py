"""The example that a model is recorded on if nobody gives one: what the model tells of its input."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import surgeon
from surgeon._tracing.default import candidates
from surgeon._tracing.example import default_call, default_input
from surgeon.errors import UsageError


class Sized(nn.Module):
    """Takes images of one size alone, as a model with a table of positions does."""

    def __init__(self, channels: int, side: int, tells: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 1)
        self.table = nn.Parameter(torch.zeros(4, side, side))
        self.body = nn.Conv2d(4, 4, 1)
        if tells:
            self.stem.img_size = side, side

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.table
        return x + self.body(x)


@pytest.mark.parametrize(
    ("model", "shape", "tried"),
    [
        (nn.Conv2d(3, 4, 1), (2, 3, 224, 224), 1),
        (Sized(3, 224), (2, 3, 224, 224), 1),
        (Sized(3, 96), (2, 3, 96, 96), 2),
        (Sized(1, 96), (2, 1, 96, 96), 4),
        (Sized(12, 224), (2, 12, 224, 224), 2),
        (nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 4, 1)), (2, 3, 224, 224), 2),
    ],
)
def test_layers_that_contradict_the_declared_size_are_asked(
    model: nn.Module, shape: tuple[int, ...], tried: int
) -> None:
    assert default_input(model).shape == shape
    assert len(candidates(model)) == tried


def test_a_model_for_one_size_that_does_not_tell_which_is_tried() -> None:
    model = Sized(3, 160, tells=False)
    model.pretrained_cfg = {"input_size": (3, 224, 224), "fixed_input_size": True}
    assert default_input(model).shape == (2, 3, 160, 160)
    del model.pretrained_cfg["fixed_input_size"]
    assert default_input(model).shape == (2, 3, 224, 224)


def test_trying_leaves_the_model_as_it_was() -> None:
    model = Sized(1, 96).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    default_input(model)
    assert model.training and model.stem.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("name", "made", "shape"),
    [
        ("resnet10t", {"in_chans": 1}, (2, 1, 176, 176)),
        ("vit_tiny_patch16_224", {"img_size": 96, "depth": 1}, (2, 3, 96, 96)),
        ("vit_tiny_patch16_224", {"img_size": 64, "in_chans": 5, "depth": 1}, (2, 5, 64, 64)),
    ],
)
def test_models_of_timm_made_for_other_images(
    name: str, made: dict[str, Any], shape: tuple[int, ...]
) -> None:
    model = timm.create_model(name, **made)
    assert default_input(model).shape == shape
    assert surgeon.status(surgeon.apply(model)).gates


class Text(nn.Module):
    """As models of Hugging Face are: a configuration, and the name of the main input."""

    main_input_name = "input_ids"

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.embed = nn.Embedding(16, 4).double()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double()

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {
            "input_ids": torch.tensor([[7, 6, 0, 1], [1, 2, 3, 0], [0, 0, 4, 5]]),
            "unknown": torch.ones(1),
        }

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = self.embed(input_ids)
        return x + self.body(x)


class Pixels(Text):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return pixel_values + self.body(pixel_values[..., :4]).mean()


class Both(Text):
    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:  # type: ignore[override]
        assert pixel_values is not None
        return super().forward(input_ids)


class Sound(Text):
    main_input_name = "input_values"

    def forward(self, input_values: Tensor) -> Tensor:  # type: ignore[override]
        return input_values


def test_a_configuration_beside_a_main_input_tells_the_arguments() -> None:
    args, kwargs = default_call(Text())
    assert args == () and list(kwargs) == ["input_ids"]
    assert kwargs["input_ids"].dtype == torch.int64
    assert len(surgeon.status(surgeon.apply(Text())).gates) == 1

    args, kwargs = default_call(Pixels(image_size=32, num_channels=1))
    assert args == () and list(kwargs) == ["pixel_values"]
    assert (kwargs["pixel_values"].shape, kwargs["pixel_values"].dtype) == ((2, 1, 32, 32), torch.float64)
    assert default_call(Pixels(image_size=[8, 16]))[1]["pixel_values"].shape == (2, 3, 8, 16)

    vision = SimpleNamespace(image_size=16, num_channels=3)
    _, kwargs = default_call(Both(vision_config=vision))
    assert kwargs["input_ids"].shape[0] == kwargs["pixel_values"].shape[0] == 3
    assert kwargs["pixel_values"].shape == (3, 3, 16, 16)


def test_a_main_input_of_unknown_size_is_asked_for() -> None:
    with pytest.raises(UsageError, match="Sound takes input_values, of unknown size; give example="):
        surgeon.apply(Sound())
