"""Traces of one block: sizes stay symbolic, control flow sees values, writes and storage are known."""

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Branch, Plain, Snapshot, X
from torch import Tensor, fx, nn

import surgeon
from surgeon._finding.flow import Flow
from surgeon._finding.residual import additions
from surgeon._tracing.record import record
from surgeon._tracing.trace import Trace, trace
from surgeon.errors import TraceError


def traced(block: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    recording = record(block, args, kwargs)
    call = recording.calls[0]
    return trace(block, call.args, call.kwargs, recording.log)


def block(forward: Callable[..., Any]) -> nn.Module:
    made: nn.Module = type("Block", (Branch,), {"forward": forward})()
    return made


def targets(found: Trace) -> list[Any]:
    return [n.target for n in found.graph.nodes if n.op not in ("placeholder", "output")]


def named(found: Trace, name: str) -> fx.Node:
    return next(n for n in found.graph.nodes if n.name == name)


def run(found: Trace, owner: nn.Module, *args: Any) -> Any:
    """The graph as a function, run on real values."""
    return fx.Interpreter(owner, graph=found.graph).run(*args)


def test_children_are_leaves() -> None:
    found = traced(Plain(), X)
    assert targets(found) == ["f", operator.add]
    assert [n.op for n in found.graph.nodes] == ["placeholder", "call_module", "call_function", "output"]
    assert not found.key.exact


def test_sizes_stay_symbolic() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        n, c = x.shape
        half = c // 2
        y = self.f(x).reshape(n, 2, half).flatten(1)
        return x + y.view(x.size(0), -1)

    made = block(forward)
    found = traced(made, X)
    assert not found.key.exact
    for rows in (1, 3, 7):
        x = torch.randn(rows, 4)
        assert torch.equal(run(found, made, x), made(x))


@pytest.mark.parametrize(
    "pins",
    [
        lambda x: 1 if x.shape[0] > 2 else 0,
        lambda x: len(range(x.shape[0])),
        lambda x: int(x.shape[0]) * 0,
        lambda x: bool(x.shape[1] % 2),
        lambda x: max(x.shape[0], 1) * 0,
    ],
)
def test_control_flow_on_sizes_is_exact(pins: Callable[[Tensor], Any]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        pins(x)
        return x + self.f(x)

    assert traced(block(forward), X).key.exact


@pytest.mark.parametrize(
    "free",
    [
        lambda x: x.ndim == 2 and x.dim() == 2,
        lambda x: len(x.shape),
        lambda x: isinstance(x, Tensor),
        lambda x: x is None,
        lambda x: hasattr(x, "shape"),
        lambda x: x.shape[0] + 1,
        lambda x: (round(x.shape[0] * 1.5), round(x.shape[0] / 3, 1)),
        lambda x: (math.floor(x.shape[0] / 2), math.ceil(x.shape[0] / 2), math.trunc(x.shape[0] / 2)),
    ],
)
def test_ranks_types_and_arithmetic_are_not(free: Callable[[Tensor], Any]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        free(x)
        return x + self.f(x)

    found = traced(block(forward), X)
    assert not found.key.exact
    assert targets(found)[-2:] == ["f", operator.add]


def test_none_flags_and_words_are_seen_by_the_forward() -> None:
    def forward(
        self: Any, x: Tensor, mask: Tensor | None = None, mode: str = "a", flip: bool = False
    ) -> Tensor:
        y = self.f(x)
        if mask is not None:
            y = y * mask
        if mode == "b":
            y = y.sin()
        return x - y if flip else x + y

    made = block(forward)
    assert targets(traced(made, X)) == ["f", operator.add]
    assert targets(traced(made, X, X)) == ["f", operator.mul, operator.add]
    assert targets(traced(made, X, None, "b", True)) == ["f", "sin", operator.mul, operator.add]  # x + -1 * y
    assert targets(traced(made, x=X, flip=True)) == ["f", operator.mul, operator.add]
    assert [n.target for n in traced(made, mask=X, x=X).graph.nodes if n.op == "placeholder"] == ["mask", "x"]


def test_in_place_writes_are_known() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.f(x)
        view = out[:, :2]
        view.mul_(2)
        out += x
        return out.relu_()

    found = traced(block(forward), X)
    writes = {n.name: bool(f.writes) for n, f in found.facts.items()}
    assert {n for n, wrote in writes.items() if wrote} == {"mul_", "iadd", "relu_"}
    flow = Flow(found)
    assert flow.precedes(
        named(found, "mul_"), named(found, "iadd")
    )  # through the storage, not through a name
    assert flow.storages(named(found, "f")) == flow.storages(named(found, "relu_"))
    assert named(found, "iadd") in flow.users(named(found, "mul_"))


def test_a_write_nobody_names_is_an_ancestor_of_the_next_reader() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.f(x)
        out.mul_(0.5)
        return x + out

    flow = Flow(traced(block(forward), X))
    (addition,) = additions(flow)
    assert addition.code is None
    assert {n.name for n in addition.region} == {"f", "mul_"}


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a size": lambda x, y: y.view(x.shape),
    "a size in an expression": lambda x, y: y.reshape(len(x), x.shape[1] * 2 // 2),
    "a view as": lambda x, y: y.view_as(x),
    "a type as": lambda x, y: y.double().type_as(x),
    "zeros like it": lambda x, y: y + torch.zeros_like(x),
    "new numbers": lambda x, y: y * x.new_ones(x.shape),
    "a written new tensor": lambda x, y: torch.empty_like(x).copy_(y),
}
NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a product": lambda x, y: y * x,
    "a choice": lambda x, y: torch.where(x > 0, y, 0),
    "a view": lambda x, y: y + x.view(-1).view(y.shape),
    "a write": lambda x, y: torch.empty_like(y).copy_(x),
    "a part written": lambda x, y: (held := y.clone(), held.__setitem__(0, x[0]))[0],
    "a nest": lambda x, y: {"pair": (x, y)}["pair"][0],
}


@pytest.mark.parametrize(("what", "feeds"), [*((f, False) for f in SHAPES), *((f, True) for f in NUMBERS)])
def test_a_shape_feeds_nothing(what: str, feeds: bool) -> None:
    step = (SHAPES | NUMBERS)[what]
    flow = Flow(traced(block(lambda self, x, y: (step(x, y) * 2, x)), X, X.clone()))
    given, (result, _) = flow.order[0], flow.order[-1].args[0]
    assert flow.feeds(given, result) == (given in flow.sources(result)) == feeds


def test_regions_hold_what_runs_for_the_branch_alone() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = x.sin()
        alone = self.f(shared)
        beside = alone.tanh()
        return x + alone * 2, beside + 0

    (addition, *_) = additions(Flow(traced(block(forward), X)))
    assert {n.name for n in addition.region} == {"mul"}

    def simple(self: Any, x: Tensor) -> Tensor:
        scale = torch.ones(4) * 2
        return x + self.f(x.sin()) * scale

    (addition,) = additions(Flow(traced(block(simple), X)))
    assert {n.name for n in addition.region} >= {"sin", "f", "mul", "mul_1"}


def test_facts_hold_values_flops_and_draws() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + y * torch.rand(x.shape[0], 1)

    found = traced(block(forward), X)
    assert found.facts[named(found, "f")].flops == 2 * 2 * 3 * 16
    assert found.facts[named(found, "f")].active
    drawn = [n for n, f in found.facts.items() if any(op.random for op in f.ops)]
    assert [found.facts[n].active for n in drawn] == [False]
    assert tuple(found.facts[named(found, "f")].value.shape) == (3, 4)


def test_weights_in_functions_and_factories_are_in_the_graph() -> None:
    class Block(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            gain = torch.sigmoid(self.gain) + torch.ones(4) + torch.arange(x.shape[1])
            return x + torch.tanh(self.f(x)) * gain

    made = Block()
    found = traced(made, X)
    with torch.no_grad():
        expected = made(X)
        assert torch.equal(run(found, made, X), expected)
        made.gain.zero_()
        assert torch.equal(run(found, made, X), made(X))  # read, not copied
        assert not torch.equal(made(X), expected)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x + self.f(x * self.table),
        lambda self, x: x + self.f(x + self.table.to(x.device)),
        lambda self, x: x + self.f(x) * self.f.table[None, :4],
        lambda self, x: x + self.f(x) * sum(p.sum() for p in self.f.parameters()),
        lambda self, x: x + self.f(x) * list(self.buffers())[0],  # noqa: RUF015
    ],
    ids=["attribute", "method", "of a child", "parameters", "buffers"],
)
def test_tensors_by_any_way_to_them(forward: Callable[..., Any]) -> None:
    made = block(forward)
    made.table, made.f.table = torch.rand(4), torch.rand(6)
    made.register_buffer("counts", torch.rand(4))
    found = traced(made, X)
    for _ in range(2):
        assert torch.equal(run(found, made, X), made(X))
        made.table, made.f.table = torch.rand(4), torch.rand(6)  # read, not copied
        made.counts.mul_(2)
    assert [a.code for a in additions(Flow(found)) if a.code != "bias"] == [None]


def test_tracing_leaves_the_block_as_it_was() -> None:
    class Block(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.seen = nn.BatchNorm1d(4), []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(1)
            return x + self.norm(self.f(x)) * torch.rand(())

    made = Block()
    before, state = Snapshot.of(made), torch.random.get_rng_state()
    with pytest.raises(TraceError, match=r"changes self\.seen"):
        traced(made, X)
    assert before.differences(made) == []
    assert torch.equal(torch.random.get_rng_state(), state)


REFUSED: list[tuple[str, Callable[..., Any], str]] = []


def refuses(message: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def note(forward: Callable[..., Any]) -> Callable[..., Any]:
        REFUSED.append((forward.__name__, forward, message))
        return forward

    return note


@refuses("its forward assigns self.last")
def assigns(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return x + self.f(x)


@refuses("own autocast or grad mode")
def own_grad_mode(self: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    y = self.f(x)
    torch.set_grad_enabled(True)
    return x + y


@refuses("own autocast for xpu")
def own_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("xpu", enabled=False):
        y = self.f(x)
    return x + y


@refuses("a Linear that is not its submodule")
def foreign_child(self: Any, x: Tensor) -> Tensor:
    return x + self.hidden[0](x)


@refuses("KeyError: 'no such luck'")
def raises(self: Any, x: Tensor) -> Tensor:
    if isinstance(x, fx.Proxy):
        raise KeyError("no such luck")
    return x + self.f(x)


@pytest.mark.parametrize(("forward", "message"), [pytest.param(f, m, id=n) for n, f, m in REFUSED])
def test_refusals_say_why(forward: Callable[..., Any], message: str) -> None:
    made = block(forward)
    made.hidden = [nn.Linear(4, 4)]
    with pytest.raises(TraceError, match=message):
        traced(made, X)


def test_a_forward_on_the_instance_is_refused() -> None:
    made = Plain()
    made.forward = made.forward  # type: ignore[method-assign]
    with pytest.raises(TraceError, match="its forward was replaced on the instance"):
        traced(made, X)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x + self.f(x)[..., :],
        lambda self, x: x + torch.cat([p * 2 for p in self.f(x).unbind(0)]).view_as(x),
        lambda self, x: x + torch.stack(list(self.f(x).split(1, 1)), -1).flatten(1),
        lambda self, x: x + (2 - self.f(x)) / (1 + x.abs()) ** 2 @ torch.eye(4),
        lambda self, x: x + 2 ** -self.f(x).abs(),
        lambda self, x: x + self.f(x).max(dim=-1, keepdim=True).values,
        lambda self, x: x + self.f(x).to(x.dtype).to(x.device).contiguous().type_as(x),
        lambda self, x: x + nn.functional.dropout(self.f(x), 0.5, self.training),
        lambda self, x: x + torch.einsum("ij,kj->ik", self.f(x), torch.eye(4)),
        lambda self, x: x + nn.functional.scaled_dot_product_attention(*[self.f(x)[None]] * 3)[0],
        lambda self, x: x + self.f(x).masked_fill(x > 0, 0.0).where(x < 1, x * 0),
        lambda self, x: x + dict(y=self.f(x))["y"],  # noqa: C408
        lambda self, x: x + self.f(x) * x.new_tensor([1.0, 2.0, 3.0, 4.0]),
        lambda self, x: x + self.f(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda self, x: x + self.f(x) * torch.full((x.shape[0], 1), 0.5),
        lambda self, x: x + self.f(x) * float(x.shape[1]) ** -0.5,
        lambda self, x: x + self.f(x).reshape(-1, x.shape[1]).repeat(1, 1)[: len(x)],
        lambda self, x: x + self.f(x).T.T,
        lambda self, x: x + self.f(x).clone().detach_() + self.f(x).data * 0,
        lambda self, x: x + -(~(x > 0)).float() * self.f(x),
        lambda self, x: x + getattr(self, "f")(x),  # noqa: B009
        lambda self, x: x + self._modules["f"](x),
        lambda self, x: x + self.f.forward(x),
        lambda self, x: x + self.f[2](self.f[1](self.f[0](x))),
        lambda self, x: x + nn.functional.linear(x, self.f[0].weight, self.f[0].bias).relu(),
    ],
    ids=range(25),
)
def test_graphs_compute_what_the_forward_computes(forward: Callable[..., Any]) -> None:
    made = block(forward)
    found = traced(made, X)
    for x in (X, torch.randn(3, 4), torch.randn(5, 4)):
        if found.key.exact and x.shape != X.shape:
            continue
        torch.manual_seed(1)
        expected = made(x)
        torch.manual_seed(1)
        assert torch.equal(run(found, made, x), expected)


TABLE = {torch.float32: 2.0, torch.float64: 3.0}


def scripted(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * x


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x + self.f(x.masked_fill(x > 1, torch.finfo(x.dtype).max / 1e30)),
        lambda self, x: x + self.f(x.clamp(max=torch.iinfo(torch.int8).max)),
        lambda self, x: x + self.f(2 * x if torch.is_autocast_enabled(x.device.type) else x),
        lambda self, x: x + self.f(x * TABLE[x.dtype]),
        lambda self, x: x + self.script(self.f(x)),
    ],
    ids=["finfo", "iinfo", "autocast of a device", "key", "script"],
)
def test_types_devices_and_scripted_functions(forward: Callable[..., Any]) -> None:
    """C code and dicts take no proxy for a type or a device."""
    made = block(forward)
    made.script = torch.jit.script(scripted)
    surgeon.apply(made, drop_rate=0.0, unit="batch", example=X)
    for x in (X, torch.randn(5, 4)):
        assert torch.equal(made(x), type(made)._ungated_forward(made, x))
    made.double()
    assert torch.equal(made(X.double()), type(made)._ungated_forward(made, X.double()))


def test_metadata_changed_in_place_is_changed_once() -> None:
    """A child's result is taken from the recording, where the block has already turned it over."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.f(x)
        y.t_()
        return x + y.t() * y.shape[0]

    import surgeon

    made = block(forward)
    expected = made(X)
    findings = surgeon.find(made, X)
    if len(findings):
        surgeon.apply(made, unit="batch", scaling="paper", drop_rate=0.0, example=X)
    assert torch.equal(made(X), expected)
    assert torch.equal(made(X[:2]), Branch.__call__(made, X[:2]))
