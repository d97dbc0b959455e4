"""Every way of calling a gated block: optional, keyword and structured arguments, shapes, flags, modes.

With every coin kept and no correction a gated step must be the plain one, bit for bit. A call unlike the
example's takes a graph of its own or a clear error, never a wrong result.
"""

import dataclasses
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from blocks import Branch, Net, Of, Plain, X, coins, randomise, same, step
from torch import Tensor, nn

import surgeon
from surgeon.errors import NoResidualsError, UnseenCallError


def exercise(block: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor = X) -> None:
    """Kept coins must give the ungated training numbers, in both units; evaluation too."""
    plain = Net(block, call)
    reference, evaluated = step(plain, plain, x), plain.eval()(x)
    plain.train()
    for unit, scaling in (("batch", "paper"), ("sample", "paper"), ("sample", "inverted")):
        surgeon.apply(plain, unit=unit, scaling=scaling, drop_rate=0.0, example=x)
        got = step(plain, plain, x)
        assert same(got, reference), unit
        assert same(plain.eval()(x), evaluated)
        plain.train()
        surgeon.remove(plain)


class Optional(Branch):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, flip: bool = False, factor: float = 1.0
    ) -> Tensor:
        y = self.f(x)
        if mask is not None:
            y = y * mask
        if flip:
            y = y.flip(0)
        return x + factor * y


@pytest.mark.parametrize(
    "call",
    [
        lambda b, x: b(x),
        lambda b, x: b(x, None),
        lambda b, x: b(x, mask=None, flip=True),
        lambda b, x: b(x, x > 0),
        lambda b, x: b(x, mask=(x > 0).float()),
        lambda b, x: b(mask=x.sign(), x=x),
        lambda b, x: b(x, flip=True, factor=0.5),
        lambda b, x: b(x, factor=2),
    ],
    ids=range(8),
)
def test_optional_and_keyword_arguments(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    exercise(Optional(), call)


def test_arguments_may_change_from_call_to_call() -> None:
    """Calls unlike the example's take a graph of their own; none of them a wrong one."""
    x = torch.randn(3, 4)
    calls: list[Callable[[nn.Module], Tensor]] = [
        lambda b: b(x),
        lambda b: b(x, x.sign()),
        lambda b: b(x, flip=True),
        lambda b: b(x, mask=x, factor=0.25),
        lambda b: b(x, factor=0.75),
        lambda b: b(x, None, flip=False),
        lambda b: b(x=x),
        lambda b: b(x),
    ]
    for unit in ("batch", "sample"):
        gated, plain = randomise(Optional()), randomise(Optional())
        surgeon.apply(gated, unit=unit, scaling="paper", example=x)
        for i, call in enumerate(calls + calls[::-1]):
            with coins(True):
                assert same(call(gated), call(plain)), i
            with coins(False):
                torch.testing.assert_close(call(gated), x, rtol=0, atol=0)


def test_paper_evaluation_of_calls_not_seen_on_the_example() -> None:
    block = surgeon.apply(randomise(Optional()), scaling="paper", drop_rate=0.25, example=X).eval()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            x = torch.randn(3, 4)
            assert same(block(x, x.sign(), flip=True), x + 0.75 * (1.0 * (block.f(x) * x.sign()).flip(0)))


class ByDtype(Branch):
    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x + self.f(x.to(dtype).float())


def test_a_dtype_argument_is_not_frozen() -> None:
    block = surgeon.apply(ByDtype(), unit="batch", scaling="paper", drop_rate=0.0, example=(X, torch.float32))
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
        assert same(block(X, dtype), X + block.f(X.to(dtype).float()))


class VarArgs(Branch):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        x, *rest = args
        for other in rest:
            x = x * other
        y = self.f(x)
        for name in sorted(kwargs):
            y = y * kwargs[name]
        return x + y


@pytest.mark.parametrize(
    "call", [lambda b, x: b(x), lambda b, x: b(x, x), lambda b, x: b(x, x, b=x, a=x.sin())], ids=range(3)
)
def test_variadic_blocks(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    exercise(VarArgs(), call)


@pytest.mark.parametrize(
    "name",
    ["gates", "block", "self_", "input", "shortcut", "branch", "gate", "x_1", "getitem", "torch", "args"],
)
def test_argument_names_do_not_clash_with_generated_ones(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward(self, x, {name}):\n    return x + self.f(x) * {name} + 0", scope)  # noqa: S102
    block = type("Block", (Branch,), {"forward": scope["forward"]})()
    exercise(block, lambda b, x: b(x, x.cos()))
    exercise(block, lambda b, x: b(x, **{name: x.cos()}))


class Pair(NamedTuple):
    x: Tensor
    mask: Tensor | None


@dataclasses.dataclass
class Output:
    last: Tensor
    hidden: Tensor | None = None


class Structured(Branch):
    def forward(self, inputs: Any) -> Output:
        x, mask = (inputs["x"], inputs.get("mask")) if isinstance(inputs, dict) else inputs
        y = self.f(x)
        if mask is not None:
            y = y * mask
        return Output(x + y)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("form", ["dict", "list", "tuple", "namedtuple"])
def test_structured_arguments_and_dataclass_results(form: str, masked: bool) -> None:
    def pack(x: Tensor) -> Any:
        mask = x.sign() if masked else None
        forms: dict[str, Any] = {"dict": {"x": x, "mask": mask}, "list": [x, mask], "tuple": (x, mask)}
        return Pair(x, mask) if form == "namedtuple" else forms[form]

    exercise(Structured(), lambda b, x: b(pack(x)).last)


def test_none_inside_an_argument_may_become_a_tensor() -> None:
    block = surgeon.apply(
        Structured(), unit="batch", scaling="paper", drop_rate=0.0, example=({"x": X, "mask": None},)
    )
    assert same(block({"x": X, "mask": X}).last, X + block.f(X) * X)
    assert same(block({"x": X, "mask": None}).last, X + block.f(X))
    assert same(block({"x": X}).last, X + block.f(X))


class ByShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            return x + torch.tanh(self.large(x))
        return x + torch.tanh(self.small(x))


def test_a_block_that_branches_on_shape_takes_the_path_of_each_shape() -> None:
    block = surgeon.apply(ByShape(), unit="batch", scaling="paper", drop_rate=0.0, example=X)
    for rows in (2, 3, 4, 5, 3):
        x = torch.randn(rows, 4)
        assert same(block(x), x + torch.tanh((block.large if rows > 3 else block.small)(x)))


class ByLength(Branch):
    def forward(self, xs: list[Tensor]) -> Tensor:
        x = xs[0]
        for other in xs[1:]:
            x = x + torch.tanh(self.f(other)) if len(xs) < 4 else x
        return x + torch.tanh(self.f(x))


def test_a_list_argument_of_another_length_is_no_wrong_result() -> None:
    block = surgeon.apply(ByLength(), unit="batch", scaling="paper", drop_rate=0.0, example=([X],))
    assert same(block([X]), ByLength.forward(block, [X]))
    for xs in ([X, X.sin()], [X, X, X, X]):
        try:
            out = block(xs)
        except UnseenCallError as error:
            assert "add" in str(error)  # noqa: PT017 - either answer is right, a third is not
        else:
            assert same(out, ByLength.forward(block, xs))


class ByPieces(Branch):
    def forward(self, x: Tensor) -> Tensor:
        y, total = self.f(x), 0
        for piece in y.split(1, 0):
            total = total + piece.mean()
        first, *rest = y.unbind(0)
        return x + y * total * len(rest) * first


def test_pieces_of_another_number() -> None:
    """How many pieces a split gives depends on the batch: three of five rows would be a silent loss."""
    block = surgeon.apply(ByPieces(), unit="batch", scaling="paper", drop_rate=0.0, example=X)
    for rows in (3, 5, 2, 3):
        x = torch.randn(rows, 4)
        assert same(block(x), ByPieces.forward(block, x))


def test_a_block_that_lacks_its_add_on_another_path_says_so() -> None:
    class Sometimes(Branch):
        def forward(self, x: Tensor, bare: bool = False) -> Tensor:
            return self.f(x) if bare else x + self.f(x)

    model = surgeon.apply(Net(Sometimes(), lambda b, x: b(x)), example=X)
    with pytest.raises(UnseenCallError, match=r"block is called in a way.*block\.add.*exclude"):
        model.block(X, bare=True)
    assert same(model.eval().block(X, bare=True), model.block.f(X))


def test_a_way_that_cannot_be_traced_says_what_to_do() -> None:
    class Drawing(Branch):
        def forward(self, x: Tensor, bare: bool = False) -> Tensor:
            return x + self.f(x) * (random.random() if bare else 1.0)  # noqa: S311 - nothing depends on it

    model = surgeon.apply(Net(Drawing(), lambda b, x: b(x)), example=X)
    with pytest.raises(
        UnseenCallError,
        match=r"failed: .*\. Leave the block out \(exclude='block'\) or call it as on the example$",
    ):
        model.block(X, bare=True)


class ByNumber(Branch):
    def forward(self, x: Tensor, strength: float) -> Tensor:
        return x + self.f(x) * (strength if strength > 0 else 1.0)


def test_a_number_that_keeps_changing_is_said_once_to_cost_a_trace_each_time() -> None:
    net = surgeon.apply(ByNumber(), drop_rate=0.0, example=(X, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(63):  # the example's 0.5 among them
            net(X, number / 10)
        with pytest.warns(UserWarning, match=r"traced for 64 ways .* 7\.5\).*exclude='ByNumber'") as told:
            net(X, 7.5)
        net(X, 0.3)
        net(X, 8.5)
    assert len(told) == 1
    torch.testing.assert_close(net(X, 7.5), net._ungated_forward(X, 7.5))


def test_attributes_read_by_the_forward_stay_live() -> None:
    class Block(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.flip = 1.0, False

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x).flip(0) if self.flip else self.f(x)
            return x + self.alpha * y

    block = surgeon.apply(Block(), unit="batch", scaling="paper", drop_rate=0.0, example=X)
    for alpha, flip in ((1.0, False), (0.5, False), (0.5, True), (1.0, False)):
        block.alpha, block.flip = alpha, flip
        assert same(block(X), Block.forward(block, X)), (alpha, flip)


def test_weights_swapped_after_apply_are_used() -> None:
    block = surgeon.apply(Plain(), unit="batch", scaling="paper", drop_rate=0.0, example=X)
    block.f = nn.Sequential(nn.Linear(4, 4))
    assert same(block(X), X + block.f(X))
    block.f[0].weight = nn.Parameter(torch.zeros(4, 4))
    assert same(block(X), X + block.f[0].bias.expand(3, 4))
    new = {n: torch.ones_like(p) for n, p in block.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(block, new, (X,)), X + X.sum(1, keepdim=True) + 1)


ASKS: dict[str, Callable[[], bool]] = {  # each asked as code asks it: of the module `torch`
    "gradients": lambda: torch.is_grad_enabled() is True,
    "autocast on the CPU": lambda: torch.is_autocast_enabled("cpu"),
    "the type of autocast": lambda: torch.get_autocast_dtype("cpu") is torch.float16,
    "inference mode": lambda: torch.is_inference_mode_enabled() is True,
}
MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", dtype=torch.float16),
}


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_modes_that_the_forward_asks_for_are_not_frozen(asks: Callable[[], bool]) -> None:
    class Block(Branch):
        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x) if asks() else 2 * self.f(x)
            return x + y

    model = Net(Block())
    try:
        surgeon.apply(model, unit="batch", scaling="paper", drop_rate=0.0, example=X)
    except NoResidualsError:
        assert asks is ASKS["inference mode"]  # no trace runs in it
        return
    for mode in MODES.values():
        with mode():
            out = model(X)
            assert same(out, model.head(Block.forward(model.block, model.stem(X))))


def test_errors_that_the_forward_catches() -> None:
    """What a way that failed has left behind is in neither the record nor the graph."""

    class Raising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).view(-1, 5)

    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            y = self.fast(x)
        except RuntimeError:
            y = x
        try:
            y = y.view(3, 5)
        except RuntimeError:
            y = 2 * y
        return x + self.f(y)

    model = nn.Sequential(Of(forward, f=Plain().f, fast=Raising()), Plain()).train()
    assert [r.name for r in surgeon.find(model, X)] == ["0.add", "1.add"]
    expected = [model(x) for x in (X, X[:2])]
    surgeon.apply(model, drop_rate=0.0, unit="batch", example=X)
    assert all(same(model(x), want) for x, want in zip((X, X[:2]), expected, strict=True))


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_apply_and_retracing_inside_autocast_leave_real_numbers(seen: bool) -> None:
    """Autocast keeps cast weights for the length of its region; no fake one may stay there."""
    model, plain = randomise(Optional()), randomise(Optional())
    arguments = (X,) if seen else (X, X.sign())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(*arguments)
        surgeon.apply(model, unit="batch", scaling="paper", drop_rate=0.0, example=X)
        out = model(*arguments)
        assert type(out) is Tensor
        assert same(out, plain(*arguments))


def test_a_hook_that_looks_at_numbers_is_named() -> None:
    """Traces run on fake tensors, and so do the hooks on the block's children."""

    def finite(_: nn.Module, __: object, out: Tensor) -> None:
        assert bool(out.isfinite().all())

    model = surgeon.apply(Net(Optional()), drop_rate=0.0, example=X)
    model.block.f[0].register_forward_hook(finite)
    with pytest.raises(UnseenCallError, match=r"\(f\.0, a Linear, has a forward hook, which cannot"):
        model.block(X, X)


def test_torch_fx_is_told_to_take_the_folded_model() -> None:
    model = surgeon.apply(nn.Sequential(Plain()), scaling="paper", example=X)
    with pytest.raises(UnseenCallError, match=r"Give it surgeon\.fold\(model\), or the model before"):
        torch.fx.symbolic_trace(model)
    assert torch.fx.symbolic_trace(surgeon.fold(model)) is not None
