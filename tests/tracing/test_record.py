"""The recording: calls in order, operators, additions, FLOPs by hand; no arithmetic, nothing left behind."""

import time
from typing import Any

import pytest
import torch
from blocks import BasicBlock, Branch, Net, Plain, Snapshot, Twice, X, case
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import surgeon
from surgeon._tracing.example import default_input, inputs
from surgeon._tracing.record import record
from surgeon._tracing.undisturbed import mode, untouched
from surgeon.errors import RecordError

aten = torch.ops.aten


def calls(model: nn.Module, x: Tensor = X) -> list[str]:
    names = {m: n for n, m in model.named_modules()}
    return [names[c.module] for c in record(model, (x,), {}).calls]


def test_calls_are_in_the_order_of_entry_with_their_parents() -> None:
    model = Net(Twice())
    recording = record(model, (X,), {})
    names = {m: n for n, m in model.named_modules()}
    order = [names[c.module] for c in recording.calls]
    assert order == [
        "",
        "stem",
        "block",
        "block.f",
        "block.f.0",
        "block.f.1",
        "block.g",
        "block.g.0",
        "block.g.1",
        "head",
    ]
    parents = [names[recording.calls[c.parent].module] if c.parent >= 0 else None for c in recording.calls]
    assert parents[:4] == [None, "", "", "block"]
    assert all(c.parent < i for i, c in enumerate(recording.calls))
    assert all(c.first_op <= c.last_op for c in recording.calls)


def test_a_module_called_twice_is_two_calls() -> None:
    model = Net(Plain(), lambda b, x: b(b(x)))
    assert calls(model).count("block") == 2
    assert calls(model).count("block.f") == 2


def test_arguments_are_noted_as_given_and_fake() -> None:
    class Wants(Branch):
        def forward(self, x: Tensor, scale: float, *, mask: Tensor | None = None) -> Tensor:
            return x + self.f(x) * scale

    model = Net(Wants(), lambda b, x: b(x, 0.5, mask=None))
    (call,) = (c for c in record(model, (X,), {}).calls if c.module is model.block)
    assert isinstance(call.args[0], FakeTensor)
    assert call.args[0].shape == X.shape
    assert call.args[1:] == (0.5,)
    assert call.kwargs == {"mask": None}


def test_additions_are_those_of_the_modules_own_forward() -> None:
    model = Net(Twice())
    counted = {type(c.module).__name__: c.additions for c in record(model, (X,), {}).calls if c.additions}
    assert counted == {"Twice": 2}


def test_shape_arithmetic_and_biases_are_no_additions() -> None:
    class Block(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[0] + x.shape[1] + 1
            steps = torch.arange(4) + torch.ones(4)
            return self.f(x) + self.bias + steps + x.new_zeros(n)[:1]

    (call,) = (c for c in record(Block(), (X,), {}).calls if type(c.module).__name__ == "Block")
    assert call.additions == 0
    assert call.biases == 3


def test_flops_by_hand() -> None:
    assert record(nn.Linear(4, 7), (X,), {}).flops == 2 * 3 * 4 * 7
    conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
    assert record(conv, (torch.zeros(2, 3, 5, 5),), {}).flops == 2 * 2 * 25 * 8 * 3 * 9
    assert record(nn.ReLU(), (X,), {}).flops == 0


def test_published_flops() -> None:
    """ResNet-18: 1.8 G multiply-adds at 224 x 224, two FLOPs each; for a batch of two."""
    c = case("torchvision:resnet18")
    flops = record(c.build(), (torch.zeros(2, 3, 224, 224),), {}).flops
    assert flops == pytest.approx(2 * 2 * 1.814e9, rel=0.01)


def test_random_draws_are_noted() -> None:
    ops = record(nn.Dropout(0.5), (X,), {}).log.ops
    assert sum(op.random for op in ops) == X.numel()
    assert sum(op.random for op in record(nn.Tanh(), (X,), {}).log.ops) == 0


def test_depthwise_convolutions_are_noted() -> None:
    x = torch.zeros(2, 4, 5, 5)
    for groups, depthwise in ((4, True), (2, False), (1, False)):
        ops = record(nn.Conv2d(4, 4, 3, groups=groups), (x,), {}).log.ops
        assert [op.depthwise for op in ops if op.func.overloadpacket is aten.convolution] == [depthwise]


@pytest.mark.parametrize("training", [True, False])
def test_the_training_forward_is_recorded_whatever_the_flags_say(training: bool) -> None:
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x) if self.norm.training else self.b(x))

    model = Says().train(training)
    model.norm.eval()
    before = Snapshot.of(model)
    assert calls(model)[1] == "a"
    assert record(model, (X,), {}).training
    assert before.differences(model) == []


def test_a_model_that_cannot_train_on_the_example_is_recorded_in_evaluation() -> None:
    model = nn.Sequential(Plain(), nn.BatchNorm1d(4)).train()
    before = Snapshot.of(model)
    assert len(surgeon.find(model, X[:1])) == 1
    assert before.differences(model) == []


def test_writes_after_return_are_noted() -> None:
    def rewritten(call: Any) -> bool:
        model = Net(Plain(), call)
        return next(c.rewritten for c in record(model, (X,), {}).calls if c.module is model.block)

    assert not rewritten(lambda b, x: b(x))
    assert rewritten(lambda b, x: b(x).relu_())
    assert rewritten(lambda b, x: b(x).view(-1).mul_(2).view(3, 4))
    assert not rewritten(lambda b, x: b(x.relu_()))


def test_no_weight_is_read_and_no_arithmetic_is_done() -> None:
    """Weights of NaN do not matter, and a model whose forward takes a while is recorded in a moment."""
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    start = time.process_time()
    recording = record(model, (torch.zeros(64, 64, 224, 224),), {})  # two TFLOPs
    assert time.process_time() - start < 5
    assert recording.flops == 8 * 2 * 64 * 224 * 224 * 64 * 64 * 9


def test_buffers_written_by_the_forward_stay() -> None:
    model, x = BasicBlock(), torch.zeros(2, 4, 5, 5)
    for m in (model.bn1, model.bn2):
        m.running_mean.fill_(3.0)
    record(model, (x,), {})
    assert float(model.bn1.running_mean[0]) == 3.0
    assert int(model.bn1.num_batches_tracked) == 0


def test_a_failure_names_model_shapes_and_error_and_leaves_no_hooks() -> None:
    model = Net(Plain())
    with pytest.raises(
        RecordError,
        match=r"Net could not be run on the example \(float32\[2, 9\], flag=True\).*example=tensor",
    ):
        record(model, (torch.zeros(2, 9),), {"flag": True})
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_hooks_of_the_user_are_kept() -> None:
    model = Net(Plain())
    handle = model.block.register_forward_hook(lambda *_: None)
    record(model, (X,), {})
    assert list(model.block._forward_hooks) == [handle.id]


def test_the_example_in_every_form() -> None:
    model = nn.Linear(4, 4)
    assert inputs(model, X) == ((X,), {})
    assert inputs(model, (X, 3)) == ((X, 3), {})
    assert inputs(model, {"x": X}) == ((), {"x": X})
    default, _ = inputs(model, None)
    assert (default[0].shape, default[0].dtype) == ((2, 3, 224, 224), torch.float32)


def test_the_default_input_follows_config_dtype_and_device() -> None:
    model = nn.Linear(4, 4).double().to("meta")
    model.pretrained_cfg = {"input_size": (1, 28, 28)}
    x = default_input(model)
    assert (x.shape, x.dtype, x.device.type) == ((2, 1, 28, 28), torch.float64, "meta")
    assert default_input(nn.ReLU()).shape == (2, 3, 224, 224)
    model.pretrained_cfg = {"input_size": None}
    assert default_input(model).shape == (2, 3, 224, 224)


def test_mode_and_untouched_restore_after_errors() -> None:
    model = Net(Plain())
    model.block.eval()
    model.memory = {"a": 1}
    before = Snapshot.of(model)

    def disturb() -> None:
        with untouched(model), mode(model, training=True):
            assert model.block.training
            model.memory["b"] = 2
            model.block.extra = 3
            raise KeyError

    with pytest.raises(KeyError):
        disturb()
    assert before.differences(model) == []


def test_recording_is_the_same_twice() -> None:
    c = case("timm:convnext_atto")
    model = c.build()
    first, second = surgeon.find(model, c.input()), surgeon.find(model, c.input())
    assert first == second
    assert str(first) == str(second)
