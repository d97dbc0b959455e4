"""Gates on the new features of dense blocks against references written by hand, with forced coins."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import surgeon
from surgeon import _recipes
from surgeon._gating.gate import Gate
from surgeon.errors import UsageError

X = torch.randn(5, 6, 6, 6, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """Given features, makes new ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, 3, 3, 1, 1)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias)

    def forward(self, x):
        x = torch.cat(x, 1) if isinstance(x, list | tuple) else x
        return self.conv(torch.relu(self.bn(x)))


class Dense(nn.Module):
    """Three layers, each of which reads all before, in several spellings."""

    def __init__(self, spelling="list") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.c = Layer(6), Layer(9), Layer(12)
        self.read = nn.Sequential(nn.BatchNorm2d(15), nn.ReLU(), nn.Conv2d(15, 2, 1))
        self.how = spelling

    def forward(self, x):
        return self.read(SPELLINGS[self.how](self, x))


def by_list(m, x):
    features = [x]
    for layer in (m.a, m.b, m.c):
        features.append(layer(features))
    return torch.cat(features, 1)


def by_steps(m, x):
    for layer in (m.a, m.b, m.c):
        x = torch.cat((x, layer(x)), dim=1)
    return x


def by_concat(m, x):
    for layer in (m.a, m.b, m.c):
        x = torch.concat([x, layer(x)], -3)
    return x


def by_hand(m, x):
    a = m.a(x)
    b = m.b([x, a])
    c = m.c([x, a, b])
    return torch.cat(tensors=(x, a, b, c), dim=1)


def tuples(m, x):
    features = (x,)
    for layer in (m.a, m.b, m.c):
        features = (*features, layer(features))
    return torch.concatenate(features, dim=1)


SPELLINGS = {"list": by_list, "steps": by_steps, "concat": by_concat, "by hand": by_hand, "tuples": tuples}


def gated(model, **kwargs):
    return surgeon.apply(model, "uniform", include=["concat"], **{"example": X, **kwargs})


def forced(monkeypatch, kept):
    turns = iter(kept)
    monkeypatch.setattr(Gate, "survives", lambda self: next(turns))


def reference(model, x, factors):
    """Factors of the new features, a number or one for each sample."""
    features = [x]
    for layer, factor in zip((model.a, model.b, model.c), factors, strict=True):
        width = [len(features[0]), 3, *x.shape[2:]]
        if isinstance(factor, float):
            features.append(layer(features) * factor if factor else torch.zeros(width))
        else:
            features.append(layer(features) * factor.view(-1, 1, 1, 1))
    return model.read(torch.cat(features, 1))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kept", [(True, False, True), (False, False, False), (True, True, True)])
@pytest.mark.parametrize("scaling", ["inverted", "paper"])
def test_dropped_features_are_zeros(spelling, kept, scaling, monkeypatch):
    model = Dense(spelling)
    twin = copy.deepcopy(model)
    gated(model, drop_rate=0.25, unit="batch", scaling=scaling)
    assert [g.kind for g in surgeon.status(model).gates] == ["concat"] * 3
    forced(monkeypatch, kept)
    y = model(X)
    factor = 4 / 3 if scaling == "inverted" else 1.0
    wanted = reference(twin, X, [factor if k else 0.0 for k in kept])
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if q[1].grad is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q[1].grad, msg=name)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)  # a layer that did not run has seen no batch


@pytest.mark.parametrize("skip", [True, False])
def test_samples_have_coins_of_their_own(skip, monkeypatch):
    model = Dense().eval()
    for module in model.modules():  # statistics over rows are another matter
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.track_running_stats = 0.0, True
    twin = copy.deepcopy(model)
    gated(model, drop_rate=0.4, unit="sample", skip=skip)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    rows = torch.tensor([0, 3, 4])
    keep = torch.zeros(5).index_fill(0, rows, 1.0)
    monkeypatch.setattr(Gate, "survivors", lambda self, count: 3)
    monkeypatch.setattr(Gate, "rows", lambda self, *_: rows)
    monkeypatch.setattr(Gate, "mask", lambda self, branch: keep.view(-1, 1, 1, 1) / 0.6)
    torch.testing.assert_close(model(X), reference(twin, X, [keep / 0.6] * 3))


def test_nothing_is_gated_unless_asked_for():
    assert not surgeon.find(Dense(), X).residuals
    with pytest.raises(surgeon.SurgeonError, match="no residual add"):
        surgeon.apply(Dense(), example=X)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_paper_scaling_folds(spelling):
    model = Dense(spelling).double()
    x = X.double()
    gated(model, drop_rate=0.3, scaling="paper", example=x)
    y = model.eval()(x)
    plain = surgeon.fold(model)
    assert type(plain) is Dense
    torch.testing.assert_close(plain(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, reference(Dense().double().eval(), x, [0.7] * 3))
    assert not torch.allclose(Dense(spelling).double().eval()(x), y)  # else any fold would look right


def test_evaluation_stays_under_inverted_scaling():
    model = Dense().eval()
    before = model(X)
    assert torch.equal(gated(model).eval()(X), before)
    assert torch.equal(surgeon.remove(model)(X), before)


def test_stochastic_depth_of_its_own_is_taken_over(monkeypatch):
    model = timm.create_model(
        *("rdnet_tiny",),
        drop_path_rate=0.3,
        num_blocks_list=(2, 2),
        growth_rates=(8, 8),
        is_downsample_block=(None, True),
        block_type=("Block", "BlockESE"),
        num_init_features=8,
        num_classes=3,
    )
    x = torch.randn(2, 3, 32, 32)
    stocked = [n for n, m in model.named_modules() if isinstance(m, timm.layers.DropPath) and m.drop_prob]
    found = surgeon.find(model, x, include=["concat"])
    assert [name for r in found for name in r.replaces] == stocked
    surgeon.apply(model, "uniform", drop_rate=0.5, unit="batch", include=["concat"], example=x)
    ran = []
    for name in stocked:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    forced(monkeypatch, [True] * 4)
    model.train()(x)
    assert not ran


class Heads(Dense):
    """Reads the features of its second layer by their number as well."""

    def forward(self, x):
        features = [x]
        for layer in (self.a, self.b, self.c):
            features.append(layer(features))
        return self.read(torch.cat(features, 1)), features[2].mean()


def test_features_that_are_read_by_their_number_are_refused():
    model = Heads()
    found = surgeon.find(model, X, include=["concat"])
    assert [r.name for r in found] == ["cat", "cat_2"]
    assert [(r.name, r.code) for r in found.refused] == [("cat_1", "alone")]
    with pytest.raises(
        UsageError, match=r"'cat_1' asks for cat_1: .*without those.*read their shortcut, too"
    ):
        surgeon.apply(model, include=["cat_1"], example=X)
    assert type(model) is Heads


PICKS = {
    "slice": lambda y: y[:, 9:12],
    "narrow": lambda y: y.narrow(1, 9, 3),
    "split": lambda y: y.split([9, 3, 3], dim=1)[1],
    "chunk": lambda y: torch.chunk(y, 5, 1)[3],
}


class Picks(Dense):
    """Reads some of the concatenated channels by their numbers."""

    def forward(self, x):
        y = by_list(self, x)
        return self.read(y), PICKS[self.how](y).mean()


@pytest.mark.parametrize("how", PICKS)
def test_channels_that_are_read_by_their_number_are_refused(how):
    with pytest.raises(UsageError, match=r"'concat' asks for cat: but its new features are also read"):
        surgeon.apply(Picks(how), include=["concat"], example=X)


class Beside(nn.Module):
    """Parallel paths side by side: none was computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Layer(6), Layer(6)

    def forward(self, x):
        return torch.cat((self.a(x), self.b(x)), 1)


class Halves(nn.Module):
    """A path without layers is no new feature."""

    def forward(self, x):
        return torch.cat((x, x.relu()), 1)


class Batches(nn.Module):
    """What is concatenated are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return torch.cat((x, self.conv(x).relu()))


@pytest.mark.parametrize("model", [Beside(), Halves(), Batches()])
def test_no_new_features(model):
    with pytest.raises(UsageError, match="'concat' matches no residual add"):
        surgeon.find(model, X, include=["concat"])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301 - own
def test_copies(twin):
    model = gated(Dense(), unit="batch")
    other = twin(model)
    for seed in range(3):
        results = []
        for one in (model, other):
            torch.manual_seed(seed)
            results.append(one(X))
        assert torch.equal(*results)


def test_layers_count_as_blocks_where_many_follow_on_one_another():
    model = _recipes.models()["densenet40_12"]()
    surgeon.apply(model, include=["concat"], unit="batch")
    rates = [gate.drop_rate for gate in surgeon.status(model).gates]
    assert rates == pytest.approx([l / 36 * 0.5 for l in range(1, 37)])
    assert all(gate.skips for gate in surgeon.status(model).gates)
