"""``surgeon audit``: what is known to be wrong in timm is found, and by behaviour alone."""

import json
from typing import Any

import pytest
import timm
import torch
import torchvision
from blocks import Snapshot
from click.testing import CliRunner
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from surgeon._audit import AuditReport, audit
from surgeon._surgery import apply
from surgeon.cli.main import main
from surgeon.errors import RecordError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

# Counted in timm 1.0.31 at drop_path_rate 0.3: sites, never called, without a shortcut.
KNOWN: dict[str, tuple[int, int, int]] = {
    "lcnet_050": (12, 12, 0),
    "mobilenetv3_small_050": (11, 4, 0),
    "ese_vovnet19b_slim": (3, 0, 3),
    "efficientnet_b0": (15, 6, 0),
    "hgnetv2_b0": (4, 3, 0),
    "rexnet_100": (15, 4, 0),
    "mobilevit_xxs": (24, 0, 4),
    "rdnet_tiny": (20, 0, 20),
    "convnext_atto": (11, 0, 0),
}
# Three drop what the downsampling shortcut takes; what the others give is read by nothing.
ON_SHORTCUT = {"resnest14d": (3, 3), "resnest26d": (7, 3)}
FAST = ("lcnet_050", "mobilenetv3_small_050", "ese_vovnet19b_slim")
SPREADS = {"rdnet_tiny"}  # dense blocks: what came before goes on beside the zeros


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.zoo]) for n in KNOWN]
)
def test_what_is_known_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.3)
    report = audit(model, torch.zeros(2, 3, 64, 64, device="meta"))
    verdicts = [site.verdict for site in report]
    counted = (len(report), verdicts.count("never-called"), verdicts.count("no-shortcut"))
    assert counted == KNOWN[name]
    assert {s.silences for s in report if s.verdict == "no-shortcut"} <= {name not in SPREADS}
    assert report.ok == (counted[1:] == (0, 0))


class Rows(nn.Module):
    """Stochastic depth that no library wrote: ``scaled`` or not, a coin per row or one for all."""

    def __init__(self, rate: float, *, scaled: bool = True, one: bool = False) -> None:
        super().__init__()
        self.rate, self.scaled, self.one = rate, scaled, one

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        shape = (1 if self.one else x.shape[0],) + (1,) * (x.ndim - 1)
        mask = (torch.rand(shape, device=x.device) >= self.rate).to(x.dtype)
        return x * mask / (1 - self.rate if self.scaled else 1)


class Net(nn.Module):
    """One site on a branch, one on the only path, one that nobody calls."""

    def __init__(self, *, alone: bool = True) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.on_branch, self.unused = Rows(0.25), Rows(0.125)
        self.alone = Rows(0.5) if alone else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.on_branch(self.first(x))
        return self.alone(self.second(x))


def test_the_three_verdicts() -> None:
    model = Net()
    before = Snapshot.of(model)
    state = torch.random.get_rng_state()
    report = audit(model, X)
    assert before.differences(model) == []
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {(s.name, s.rate, s.verdict, s.adds, s.silences) for s in report} == {
        ("on_branch", 0.25, "residual", ("add",), False),
        ("unused", 0.125, "never-called", (), False),
        ("alone", 0.5, "no-shortcut", (), True),
    }
    assert [s.name for s in report.wrong] == ["unused", "alone"]
    assert report.summary == "1 of 3 never called, 1 of 3 without a shortcut"
    assert "no shortcut beside it: where it drops, the whole signal becomes zero" in str(report)


def test_a_gradient_agrees_that_the_signal_is_gone() -> None:
    """The verdict comes from a graph; numbers say the same."""
    model = Net().train()
    for rate, lost in ((0.0, False), (1.0, True)):
        model.alone = Rows(rate, scaled=False)
        x = X.clone().requires_grad_()
        model(x).sum().backward()
        assert (x.grad.abs().sum() == 0) == lost
    model.alone.rate = 0.5
    assert next(s for s in audit(model, X) if s.name == "alone").silences


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("one", [False, True])
def test_rates_are_read_from_what_a_module_does(rate: float, one: bool) -> None:
    """Exact where survivors are scaled; else a share, within four standard deviations (64 batches of 256)."""
    for scaled in (True, False):
        model = Net(alone=False)
        model.on_branch = Rows(rate, scaled=scaled, one=one)
        found = next((s for s in audit(model, X) if s.name == "on_branch"), None)
        trials = 64 if one else 64 * 256
        if found is None:  # not one coin in 64 fell
            assert not scaled and one and rate == 0.01
            continue
        tolerance = 1e-6 if scaled else 4 * (rate * (1 - rate) / trials) ** 0.5
        assert found.rate == pytest.approx(rate, abs=tolerance)


@pytest.mark.parametrize(
    "other",
    [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.ReLU(), nn.Identity(), Rows(0.0), nn.AlphaDropout(0.2)],
    ids=lambda m: type(m).__name__,
)
def test_what_is_no_stochastic_depth(other: nn.Module) -> None:
    assert audit(nn.Sequential(other), torch.zeros(2, 4, 4, 4)) == AuditReport(())


def test_torchvisions_own() -> None:
    model = torchvision.models.convnext_tiny()
    assert sum(isinstance(m, StochasticDepth) and m.p > 0 for m in model.modules()) == 17
    report = audit(model, torch.zeros(2, 3, 32, 32))
    assert report.ok and len(report) == 17
    assert [s.rate for s in report] == pytest.approx([0.1 * i / 17 for i in range(1, 18)], abs=1e-5)


def test_nothing_to_list_and_nothing_to_run() -> None:
    assert audit(nn.Linear(4, 4), X) == AuditReport(())
    assert audit(nn.Linear(4, 4), X).ok
    with pytest.raises(RecordError, match="Net could not be run on the example"):
        audit(Net(), torch.zeros(2, 5))


def test_a_gated_model_is_audited_without_its_gates() -> None:
    """Gates hold no module of their own, and the sites they stand in for are still where they were."""
    model = apply(Net(), example=X)
    assert {s.name for s in audit(model, X)} == {"on_branch", "unused", "alone"}


def surge(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["audit", *map(str, arguments)])


def test_the_command() -> None:
    wrong = surge("timm:lcnet_050", "--drop-rate", 0.3, "--img-size", 32)
    assert wrong.exit_code == 1
    assert wrong.stderr == ""
    lines = wrong.stdout.splitlines()
    assert lines[0] == "timm:lcnet_050: 12 of 12 never called"
    assert len(lines) == 14
    assert lines[-1].split() == [
        "blocks.5.1.drop_path",
        "DropPath",
        "0.277",
        *["never", "called:", "it", "drops", "nothing"],
    ]
    found = json.loads(surge("timm:lcnet_050", "--drop-rate", 0.3, "--img-size", 32, "--json").stdout)
    assert found["model"] == "timm:lcnet_050"
    assert (found["ok"], found["exit_code"], len(found["sites"])) == (False, 1, 12)
    assert found["sites"][0]["verdict"] == "never-called"


def test_the_command_on_what_is_well_and_on_what_has_none() -> None:
    well = surge("timm:convnext_atto", "--drop-rate", 0.1, "--img-size", 32)
    assert well.exit_code == 0
    assert well.stdout.startswith("timm:convnext_atto: 11 of 11 sites on a residual add\n")
    none = surge("timm:resnet10t")
    assert (none.exit_code, none.stdout) == (4, "")
    assert none.stderr.startswith("surgeon: timm:resnet10t has no stochastic depth; --drop-rate 0.3 builds")
    assert json.loads(surge("timm:resnet10t", "--json").stdout)["exit_code"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("torchvision:resnet18", "--drop-rate", 0.2), "--drop-rate is for timm's models"),
        (("timm:resnet10t", "--drop-rate", 1.5), "1.5 is not in the range"),
        (("timm:no_such_model",), "no_such_model"),
    ],
)
def test_usage(arguments: tuple[Any, ...], words: str) -> None:
    done = surge(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_help_shows_examples_and_exit_codes() -> None:
    text = surge("--help").stdout
    assert "surgeon audit timm:efficientnet_b0 --drop-rate 0.3" in text
    assert "Exit codes:" in text


class Shortcut(nn.Module):
    """Its stochastic depth acts on the shortcut, as a step of its own or inside one."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.drop = nn.Identity() if inside else Rows(0.25)
        self.project = nn.Sequential(Rows(0.25) if inside else nn.Identity(), nn.Linear(4, 4))
        self.f = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.drop(x)) + self.f(x)


@pytest.mark.parametrize(("inside", "name"), [(False, "0.drop"), (True, "0.project.0")])
def test_a_site_on_the_shortcut(inside: bool, name: str) -> None:
    """A drop loses the shortcut's input, which a gradient confirms; the branch goes on."""
    model = nn.Sequential(Shortcut(inside=inside))
    report = audit(model, X)
    assert [(s.name, s.verdict, s.adds, s.silences) for s in report] == [
        (name, "on-shortcut", ("0.add",), False)
    ]
    assert report.summary == "1 of 1 on a shortcut"
    assert "on the shortcut of 0.add: where it drops, the input is lost there" in str(report)
    assert report.wrong == report.sites
    model.get_submodule(name).rate = 1.0
    model.get_submodule(name).scaled = False
    model[0].f.requires_grad_(False).apply(lambda m: m.weight.zero_() if isinstance(m, nn.Linear) else None)
    x = X.clone().requires_grad_()
    model.train()(x).sum().backward()
    assert x.grad.abs().sum() == 0


def test_a_site_before_both_sides_is_on_no_shortcut() -> None:
    model = nn.Sequential(Rows(0.25), Shortcut(inside=True))
    assert [(s.name, s.verdict) for s in audit(model, X)] == [
        ("0", "no-shortcut"),
        ("1.project.0", "on-shortcut"),
    ]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.zoo) for n in ON_SHORTCUT])
def test_shortcuts_dropped_in_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.3)
    report = audit(model, torch.zeros(2, 3, 64, 64, device="meta"))
    found = [site for site in report if site.verdict == "on-shortcut"]
    assert (len(report), len(found)) == ON_SHORTCUT[name]
    assert {s.verdict for s in report} <= {"on-shortcut", "unused"}
    assert all(s.adds == (s.name.replace("drop_path", "add"),) and not s.silences for s in found)


class Unheard(nn.Module):
    """Its stochastic depth acts on a value that nothing reads, as in timm's ResNeSt."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 4), StochasticDepth(0.2, "row")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).relu()
        self.drop(x)
        return out + x


def test_a_site_without_effect() -> None:
    report = audit(Unheard(), X)
    assert [site.verdict for site in report] == ["unused"]
    assert report.summary == "1 of 1 without effect"
    assert "nothing reads what it gives" in str(report)
    assert not report.ok
