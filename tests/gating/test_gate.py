"""The gate's coin and correction: frequencies, means, independence, and timm's and torchvision's own numbers.

Random quantities are tested with exact binomial tests or at six standard errors, on fixed seeds; the stated
false-alarm rate is that of a fresh seed.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Branch, Case, Linear, Plain, Twice, case, coins, grads, randomise, same
from scipy.stats import binomtest, chi2
from timm.layers import DropPath, drop_path
from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth

import surgeon
from surgeon._gating.decided import BranchFacts, Decision
from surgeon._gating.gate import Gate
from surgeon._gating.gated import gates_of

X = torch.zeros(2, 4)
ALARM = 1e-7  # of each test of one frequency; a dozen of them stay below 1e-6 together per test function


def gate(unit: str = "sample", scaling: str = "inverted", drop_rate: float = 0.3) -> Gate:
    scale = 1.0 if scaling == "inverted" else 1 - drop_rate
    return Gate(Decision(unit, scaling), BranchFacts(), drop_rate, scale)  # type: ignore[arg-type]


# --- the coin -----------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_rows_survive_as_often_as_the_binomial_says(rate: float) -> None:
    rows = 20_000
    mask = gate(drop_rate=rate).mask(torch.zeros(rows, 3))
    assert mask.shape == (rows, 1)
    assert binomtest(int((mask > 0).sum()), rows, 1 - rate).pvalue > ALARM


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_batches_survive_as_often_as_the_binomial_says(rate: float) -> None:
    g, tosses = gate("batch", drop_rate=rate), 20_000
    assert binomtest(sum(g.survives() for _ in range(tosses)), tosses, 1 - rate).pvalue > ALARM


def test_the_test_of_frequencies_can_fail() -> None:
    """Negative control: two points of a percent off would raise the alarm."""
    kept = int((gate(drop_rate=0.3).mask(torch.zeros(20_000, 1)) > 0).sum())
    assert binomtest(kept, 20_000, 0.72).pvalue < ALARM


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_the_frequency_of_each_gate_of_a_model(unit: str) -> None:
    """Through whole forwards: each gate follows its own rate of the schedule."""
    model = surgeon.apply(nn.Sequential(*(Plain() for _ in range(4))), unit=unit, example=X)
    rows, forwards = (256, 40) if unit == "sample" else (2, 2000)
    kept = torch.zeros(4, dtype=torch.long)
    for module in model:  # a branch that is the constant one shows its own mask
        module.f = Ones()
    for _ in range(forwards):
        x = torch.zeros(rows, 4)
        for i, module in enumerate(model):
            y = module(x)
            kept[i] += int(((y - x)[:, 0] > 0).sum()) // (rows if unit == "batch" else 1)
            x = y
    total = forwards * (rows if unit == "sample" else 1)
    for i, g in enumerate(surgeon.status(model).gates):
        assert binomtest(int(kept[i]), total, g.survival).pvalue > ALARM


class Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_gates_are_independent_of_each_other_and_of_the_step_before(unit: str) -> None:
    """Chi-squared on the joint frequencies of neighbouring gates, and of one gate at successive draws."""
    p, draws = 0.5, 8000
    block = surgeon.apply(Twice(), "uniform", drop_rate=p, unit=unit, example=X)
    block.f, block.g = Ones(), Ones()
    x = torch.zeros(draws, 4) if unit == "sample" else torch.zeros(1, 4)
    seen: dict[int, list[Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        original = Gate.mask if unit == "sample" else Gate.survives

        def note(g: Gate, *args: Any) -> Any:
            value = original(g, *args)
            seen.setdefault(id(g), []).append(value)
            return value

        patch.setattr(Gate, "mask" if unit == "sample" else "survives", note)
        for _ in range(1 if unit == "sample" else draws):
            block(x)
    drawn = [seen[id(g)] for g in gates_of(block)]
    first, second = (torch.cat([torch.as_tensor(v).flatten() > 0 for v in values]) for values in drawn)
    for a, b in ((first, second), (first[1:], first[:-1]), (second[1:], first[:-1])):
        n = len(a)
        counts = [int((a.eq(i) & b.eq(j)).sum()) for i, j in itertools.product((False, True), repeat=2)]
        statistic = sum((count - n / 4) ** 2 / (n / 4) for count in counts)
        assert chi2.sf(statistic, 3) > ALARM


def test_rows_of_one_batch_are_independent() -> None:
    masks = torch.stack([gate(drop_rate=0.5).mask(torch.zeros(2, 1)).flatten() for _ in range(8000)]) > 0
    counts = [
        int((masks[:, 0].eq(i) & masks[:, 1].eq(j)).sum())
        for i, j in itertools.product((False, True), repeat=2)
    ]
    assert chi2.sf(sum((count - 2000) ** 2 / 2000 for count in counts), 3) > ALARM


# --- the correction -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5), (3, 2, 2, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_mask_has_one_factor_per_row_in_the_branchs_dtype(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for unit in ("sample", "batch"):
        mask = gate(unit, drop_rate=0.5).mask(torch.zeros(shape, dtype=dtype))
        assert mask.dtype == dtype
        assert mask.shape == ((shape[0] if unit == "sample" else 1), *(1 for _ in shape[1:]))
        assert set(mask.unique().tolist()) <= {0.0, 2.0}


def test_corrections() -> None:
    assert gate("batch", "inverted", 0.2).correction() == 1 / 0.8
    assert gate("batch", "paper", 0.2).correction() == 1
    ramped = gate("batch", "paper", 0.2)
    ramped.set_drop_rate(0.5)
    assert (ramped.scale, ramped.survival, ramped.correction()) == (0.8, 0.5, 1.6)
    rows = gate("sample", "paper", 0.2)
    rows.set_drop_rate(0.5)
    assert set(rows.mask(torch.zeros(64, 1, dtype=torch.float64)).flatten().tolist()) == {0.0, 1.6}
    still = gate("batch", "paper", 0.2)
    still.set_drop_rate(0.0)
    assert still.correction() == 0.8  # never dropped, and the expectation is still c


@pytest.mark.parametrize("ramped", [None, 0.1, 0.6, 0.0])
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_the_mean_training_output_is_the_evaluation_output(
    unit: str, scaling: str, ramped: float | None
) -> None:
    """Over many draws of a chain linear in its branches; six standard errors, false alarm 2e-9 each."""
    model = randomise(nn.Sequential(*(Linear() for _ in range(3)))).double()
    surgeon.apply(model, drop_rate=0.5, unit=unit, scaling=scaling, example=X.double())
    if ramped is not None:
        surgeon.set_drop_rate(model, ramped)
    x = torch.randn(1, 4, dtype=torch.float64)
    with torch.no_grad():
        rows, forwards = (60_000, 1) if unit == "sample" else (1, 1500)
        outs = torch.cat([model(x.expand(rows, 4)) for _ in range(forwards)])
        expected = model.eval()(x)
    error = outs.std(0) / len(outs) ** 0.5
    deviation = (outs.mean(0) - expected[0]).abs()
    assert bool((deviation <= 6 * error + 1e-12).all())
    if ramped != 0.0:
        wrong = expected[0] * 1.3  # negative control: thirty percent off is far outside
        assert bool(((outs.mean(0) - wrong).abs() > 6 * error).any())


@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_rate_zero_draws_nothing_and_changes_nothing(scaling: str) -> None:
    for unit in ("sample", "batch"):
        model, plain = randomise(Twice()), randomise(Twice())
        surgeon.apply(model, drop_rate=0.0, unit=unit, scaling=scaling, example=X)
        x = torch.randn(3, 4)
        state = torch.random.get_rng_state()
        assert same(model(x), plain(x))
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_a_rate_next_to_one_stays_finite(unit: str) -> None:
    model = surgeon.apply(randomise(Plain()), "uniform", drop_rate=1 - 2**-24, unit=unit, example=X)
    for _ in range(20):
        assert bool(model(torch.randn(3, 4)).isfinite().all())
    with coins(True):
        assert bool(model(torch.randn(3, 4)).isfinite().all())


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_evaluation_draws_nothing(unit: str) -> None:
    for scaling in ("inverted", "paper"):
        model = surgeon.apply(randomise(Twice()), unit=unit, scaling=scaling, example=X).eval()
        x, state = torch.randn(3, 4), torch.random.get_rng_state()
        assert same(model(x), model(x))
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_the_same_seed_gives_the_same_step(unit: str) -> None:
    model = surgeon.apply(randomise(nn.Sequential(*(Plain() for _ in range(8)))), unit=unit, example=X)
    x = torch.randn(6, 4)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out: Tensor = model(x)
        return out

    assert same(run(3), run(3))
    assert len({tuple(run(seed).flatten().tolist()) for seed in range(12)}) > 6
    torch.manual_seed(9)
    model(x)
    state = torch.random.get_rng_state()
    ahead = [model(x) for _ in range(3)]
    torch.random.set_rng_state(state)
    assert same([model(x) for _ in range(3)], ahead)


def test_a_gate_is_no_part_of_the_state() -> None:
    model = Twice()
    keys = list(model.state_dict())
    surgeon.apply(model, example=X)
    assert list(model.state_dict()) == keys
    assert not any("gate" in name or "surgeon" in name for name, _ in model.named_buffers())


# --- the same numbers as the libraries' own stochastic depth ------------------


def step(model: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor | None]]:
    model.train().zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out: Tensor = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out, x.grad, grads(model)


def compare(own: nn.Module, ours: nn.Module, x: Tensor, *, exact: bool = True) -> None:
    ours.load_state_dict(own.state_dict())
    for seed in range(2):
        a, b = step(own, x, seed), step(ours, x, seed)
        if exact:
            assert same(a[0], b[0])
            assert same(a[1], b[1])
            assert same(a[2], b[2])
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    other = step(own, x, 17)
    assert not same(other[0], a[0])  # the draws matter, so the equality says something


TIMM = {
    "vit_tiny_patch16_224": "linear-from-zero",
    "convnext_atto": "linear-from-zero",
    "swin_tiny_patch4_window7_224": "linear-from-zero",
    "mixer_s32_224": "uniform",
    "resnet18": None,
    "resnet50": None,
    "nf_resnet26": None,
    "poolformerv2_s12": "linear-from-zero",
    "levit_128s": None,
    "xcit_nano_12_p16_224": None,
    "cait_xxs24_224": None,
    "convnextv2_atto": "linear-from-zero",
}
FAST = ("vit_tiny_patch16_224", "convnext_atto", "resnet18", "mixer_s32_224")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in TIMM]
)
def test_the_same_seed_gives_timms_own_training_step(name: str) -> None:
    """Outputs and gradients, bit for bit, against the model that timm builds with a drop path rate."""
    c = case(f"timm:{name}")
    own = randomise(c.build(drop_path_rate=0.3))
    drops = [m for m in own.modules() if isinstance(m, DropPath)]
    assert drops
    schedule: Any = TIMM[name]
    rates = schedule or own_rates(own, c)
    ours = surgeon.apply(c.build(), rates, drop_rate=0.3, skip=False, example=c.input())
    # The NFNets scale their branch behind the drop path: the same product, rounded in another order.
    if name == "nf_resnet26":
        compare(own.double(), ours.double(), c.input().double(), exact=False)
    else:
        compare(own, ours, c.input())


def own_rates(own: nn.Module, c: Case) -> list[float]:
    """One rate per residual add, read off the DropPath module that stands on it; 0 where none does."""
    rates = {name: float(m.drop_prob or 0) for name, m in own.named_modules() if isinstance(m, DropPath)}
    return [rates[r.replaces[0]] if r.replaces else 0.0 for r in surgeon.find(own, c.input())]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnext_tiny", {"stochastic_depth_prob": 0.4}),
        pytest.param("swin_t", {}, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", {"stochastic_depth_prob": 0.4}, marks=pytest.mark.slow),
    ],
)
def test_the_same_seed_gives_torchvisions_own_training_step(name: str, options: dict[str, Any]) -> None:
    """torchvision's StochasticDepth, mode "row", with its own rates as an explicit schedule."""
    c = case(f"torchvision:{name}")
    own = randomise(c.build(**options))
    modules = dict(own.named_modules())
    slots = [modules[r.replaces[0]] if r.replaces else None for r in surgeon.find(own, c.input())]
    rates = [m.p if isinstance(m, StochasticDepth) else 0.0 for m in slots]
    assert max(rates) > 0.1
    ours = surgeon.apply(copy.deepcopy(own), rates, skip=False, example=c.input())
    compare(own, ours, c.input())


def test_the_unit_batch_mask_is_torchvisions_batch_mode() -> None:
    branch = torch.randn(5, 3)
    torch.manual_seed(3)
    expected = [StochasticDepth(0.3, "batch").train()(branch) for _ in range(20)]
    torch.manual_seed(3)
    assert same([branch * gate("batch").mask(branch) for _ in range(20)], expected)


def test_gates_stand_in_for_drop_paths_that_are_there() -> None:
    """Never a gate on top of a drop path: with every coin kept, nothing else is drawn."""
    c = case("timm:vit_tiny_patch16_224")
    own = randomise(c.build(drop_path_rate=0.3))
    plain = c.build()
    plain.load_state_dict(own.state_dict())
    surgeon.apply(own, scaling="paper", example=c.input())
    called: list[nn.Module] = []
    for m in own.modules():
        if isinstance(m, DropPath):
            m.register_forward_hook(lambda m, *_: called.append(m))
    with coins(True):
        assert same(own.train()(c.input()), plain.train()(c.input()))
    assert not called
    surgeon.remove(own)
    own(c.input())
    assert called  # and the model's own are live again after remove


def rescaled(y: Tensor, p: float, training: bool) -> Tensor:
    """The first published drop path: the survivors are rescaled outside of the mask."""
    if not training:
        return y
    mask = (1 - p) + torch.rand((y.shape[0],) + (1,) * (y.ndim - 1))
    return y.div(1 - p) * mask.floor_()


FUNCTIONS: dict[str, Callable[[Tensor, float, bool], Tensor]] = {
    "timm": drop_path,
    "torchvision row": lambda y, p, training: stochastic_depth(y, p, "row", training),
    "torchvision batch": lambda y, p, training: stochastic_depth(y, p, "batch", training),
    "rescaled before": rescaled,
    "rescaled after": lambda y, p, training: (
        y * (torch.rand(y.shape[0], 1) < 1 - p) / (1 - p) if training else y
    ),
    "by hand": lambda y, p, training: y * (torch.rand(y.shape[0], 1) < 1 - p).to(y.dtype) if training else y,
}


@pytest.mark.parametrize("unit", ["batch", "sample"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_stochastic_depth_written_as_a_function(name: str, unit: str) -> None:
    """Stood in for as a whole, or the addition is refused; never the half of it, never two on one branch."""
    function = FUNCTIONS[name]

    class Block(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return x + function(self.f(x), 0.25, self.training)

    block, x = randomise(Block()), torch.randn(3, 4)
    if not len(surgeon.find(block, x)):
        assert surgeon.find(block, x).refused
        return
    surgeon.apply(block, unit=unit, scaling="paper", example=x)
    with coins(True):
        assert same(block(x), x + block.f(x))
    with coins(False):
        torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_status_and_gates_agree() -> None:
    model = surgeon.apply(
        nn.Sequential(Plain(), Twice()), drop_rate=0.4, unit="batch", scaling="paper", example=X
    )
    for state, g in zip(surgeon.status(model).gates, gates_of(model), strict=True):
        assert (state.survival, state.scale) == (g.survival, g.scale)
        assert state.survival == state.scale == 1 - state.drop_rate
        assert (state.unit, state.scaling, state.skips, state.note) == ("batch", "paper", True, "")
