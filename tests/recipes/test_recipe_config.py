"""The recipe's settings: every shipped config is valid, and every mistake is answered with the key's name."""

import inspect
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import surgeon
from surgeon import SurgeonError, _recipes
from surgeon._recommend import recommend
from surgeon.errors import UsageError

HOME = _recipes.locate() / "configs"
CONFIGS = sorted(path.relative_to(HOME).with_suffix("").as_posix() for path in HOME.rglob("*.yaml"))


@pytest.fixture(scope="module")
def settings() -> ModuleType:
    return _recipes.load("finetune_config")


def small(tmp_path: Path, **changes: object) -> str:
    tree: dict[str, object] = {
        "output": str(tmp_path / "run"),
        "model": {"name": "timm:resnet18"},
        "data": {"kind": "fake"},
        "optimizer": {"lr": 0.1},
        "train": {"epochs": 1, "batch_size": 4},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return str(path)


def test_there_are_configs() -> None:
    assert {*CONFIGS} >= {
        *("digits", "imagefolder", "resnet50", "vit_small", "cifar10", "cifar100", "svhn", "fashion_mnist"),
        *("pets", "flowers102", "food101", "imagenet"),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_is_valid_and_says_how_to_run_it(settings: ModuleType, name: str) -> None:
    path = HOME / f"{name}.yaml"
    config = settings.load_config(str(path), [])
    assert f"surgeon finetune {name}" in header(name)
    assert settings.load_config(name, []) == config  # by its bare name too
    assert config.output.name == path.stem
    assert max(map(len, path.read_text().splitlines())) <= 120


@pytest.mark.parametrize("name", CONFIGS)
def test_commands_in_the_headers_are_valid(settings: ModuleType, name: str) -> None:
    commands = re.findall(r"(?:surgeon finetune|recipes/finetune\.py) (\S+)((?: \S+=\S+)*)", header(name))
    assert commands
    for config, overrides in commands:
        settings.load_config(config, overrides.split())


def header(name: str) -> str:
    """The comments at the head of a config."""
    lines = (HOME / f"{name}.yaml").read_text().splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("paper/")])
def test_rates_of_the_configs_are_among_those_recommended(settings: ModuleType, name: str) -> None:
    config = settings.load_config(name, [])
    if config.model.pretrained:
        model = surgeon.load_model(config.model.name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        kind = config.model.name.partition(":")[2]
        found = recommend(kind, millions, images=10_000, epochs=config.train.epochs)
        assert min(found.tries) < config.gates.drop_rate <= max(found.tries)


def test_resolved_config_reads_back_as_itself(settings: ModuleType, tmp_path: Path) -> None:
    config = settings.load_config("digits", ["train.epochs=3", "gates.include=[layer1*, layer2*]"])
    path = tmp_path / "resolved.yaml"
    path.write_text(settings.dump_config(config))
    assert settings.load_config(str(path), []) == config
    assert config.gates.include == ("layer1*", "layer2*")


def test_overrides_are_yaml_and_make_sections(settings: ModuleType, tmp_path: Path) -> None:
    overrides = ["optimizer.lr=3e-4", "pretrain.classes=2", "pretrain.epochs=1", "model.kwargs={depth: 2}"]
    config = settings.load_config(small(tmp_path), overrides)
    assert (config.optimizer.lr, config.pretrain.classes, config.model.kwargs) == (3e-4, 2, {"depth": 2})


def test_a_bare_no_and_a_single_name_are_what_they_seem(settings: ModuleType, tmp_path: Path) -> None:
    given = ["train.precision=no", "log.trackers=wandb", "gates.include=layer1*", "gates=null"]
    config = settings.load_config(small(tmp_path), given[:3])
    assert (config.train.precision, config.log.trackers) == ("no", ("wandb",))
    assert config.gates.include == ("layer1*",)
    assert settings.load_config(small(tmp_path), given[3:]).gates is None


def test_a_file_changes_the_settings_of_its_base(settings: ModuleType, tmp_path: Path) -> None:
    small(tmp_path, model={"name": "timm:resnet18", "kwargs": {"in_chans": 1}})
    path = tmp_path / "more.yaml"
    path.write_text("base: small\ntrain: {epochs: 7}\nmodel: {kwargs: {}}\n")
    config = settings.load_config(str(path), [])
    assert (config.train.epochs, config.train.batch_size, config.model.kwargs) == (7, 4, {})
    path.write_text("base: more\n")
    with pytest.raises(UsageError, match="base leads back to itself"):
        settings.load_config(str(path), [])
    path.write_text("base: elsewhere\n")
    with pytest.raises(UsageError, match="there is no config 'elsewhere'"):
        settings.load_config(str(path), [])


def test_help_lists_every_config_and_key(settings: ModuleType) -> None:
    text = settings.help_text()
    for name in CONFIGS:
        assert f"\n  {name} " in text
    for key in ("gates.keep_eval", "gates.overrides", "train.distill", "train.patience", "data.broken"):
        assert re.search(rf"^  {re.escape(key)} +\[.+\] \S", text, re.MULTILINE), key


def test_all_arguments_of_apply_are_settings(settings: ModuleType) -> None:
    from finetune_settings import Gates  # type: ignore[import-not-found, unused-ignore]  # beside the recipe

    theirs = set(inspect.signature(surgeon.apply).parameters) - {"model", "example"}
    assert theirs <= set(Gates.model_fields)


def test_home_is_expanded_where_the_shell_does_not(settings: ModuleType, tmp_path: Path) -> None:
    config = settings.load_config(small(tmp_path), ["data.root=~/flowers"])
    assert config.data.root == Path.home() / "flowers"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.weigth_decay=1"],
            r"optimizer\.weigth_decay: unknown key; did you mean optimizer\.weight_decay\?",
        ),
        (["pretrain.clases=2"], r"pretrain\.clases: unknown key; did you mean pretrain\.classes\?"),
        (["gate.unit=batch"], r"gate: unknown key; did you mean gates\?"),
        (["colour=red"], r"colour: unknown key; Keys here: output, seed"),
        (["train.epochs=soon"], r"train\.epochs: input should be a valid integer.*, not 'soon'"),
        (["train.epochs=2.5"], r"train\.epochs: input should be a valid integer.*, not 2\.5"),
        (["gates.drop_rate=1.0"], r"gates\.drop_rate: input should be less than 1, not 1\.0"),
        (["train.mixup=true"], r"train: mixup is a number, not true"),
        (["optimizer.lr=.nan"], r"optimizer\.lr: input should be a finite number"),
        (["optimizer.name=adamww"], r"optimizer: name: timm has no optimizer 'adamww'; did you mean adamw\?"),
        (["optimizer.decay=multistep"], r"optimizer: milestones: the epochs of decay: multistep"),
        (
            ["gates.schedule=linaer"],
            r"gates\.schedule: input should be 'linear', .*, not 'linaer'; did you mean linear\?$",
        ),
        (["gates.schedule=[0.1, 1.5]"], r"gates: schedule: drop rates are in \[0, 1\), not 1\.5"),
        (
            ["gates.schedule=[0.1]", "gates.ramp_epochs=2"],
            r"gates: ramp_epochs: a ramp needs a schedule",
        ),
        (["gates.overrides={layer1*: 2}"], r"gates\.overrides: input should be less than 1, not 2"),
        (["gates.skip=maybe"], r"gates\.skip: .*, not 'maybe'"),
        (["gates=null", "compare=true"], r"compare: there are no gates to compare with"),
        (["log.trackers=wandbb"], r"log\.trackers: input should be 'tensorboard', 'wandb' or 'mlflow'"),
        (["data.auto_augment=rand-m9-foo9x"], r"data: auto_augment: timm does not know 'rand-m9-foo9x'"),
        (["gates.unit=pixel"], r"gates\.unit: input should be 'sample' or 'batch', not 'pixel'"),
        (["data.kind=folders"], r"data\.kind: input should be 'folder', 'digits'.*, not 'folders'"),
        (
            ["train.batch_size=5", "train.mixup=0.8"],
            r"train: mixup and cutmix pair images: batch_size must be even",
        ),
        (
            ["model.pretrained=true", "model.checkpoint=x.pt"],
            r"model: pretrained: true and checkpoint both give",
        ),
        (["train.epochs"], r"cannot read the override 'train\.epochs': write key=value"),
        (["train.epochs.more=1"], r"train\.epochs\.more: epochs is a value, 1, and has no keys below it"),
        (["model.kwargs={"], r"model\.kwargs: the value '\{' is not YAML"),
        (["optimizer=null"], r"optimizer: input should be a valid dictionary"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_named(
    settings: ModuleType, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        settings.load_config(small(tmp_path), overrides)


def test_a_missing_setting_is_named(settings: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"optimizer\.lr: missing; give it in the file or as optimizer\.lr=VALUE"
    ):
        settings.load_config(small(tmp_path, optimizer={}), [])


def test_all_mistakes_are_told_at_once(settings: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"small\.yaml: .*seed.*; .*log\.evry"):
        settings.load_config(small(tmp_path), ["seed=x", "log.evry=3"])


def test_unknown_config_lists_the_known_ones(settings: ModuleType) -> None:
    with pytest.raises(
        UsageError, match=r"there is no config 'digit': not a file, .*cifar10, .*Did you mean digits\?"
    ):
        settings.load_config("digit", [])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("", "holds no settings"), ("7", "holds no")]
)
def test_a_file_without_settings_is_refused(
    settings: ModuleType, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        settings.load_config(str(path), [])


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"there is no recipe named 'tune'. Recipes: finetune\."):
        _recipes.load("tune")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "finetune.py").write_text("")
    (tmp_path / "recipe_of_the_test.py").write_text("import package_that_is_not_there")
    monkeypatch.setattr(_recipes, "locate", lambda: tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        SurgeonError,
        match=r"cannot start .*package_that_is_not_there.*pip install 'depth-surgeon\[recipes\]'",
    ):
        _recipes.load("recipe_of_the_test")


def test_recipes_that_are_nowhere_are_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_recipes, "_HERE", tmp_path / "surgeon")
    with pytest.raises(
        SurgeonError, match=r"cannot find the recipes: no finetune\.py in .*Install surgeon again"
    ):
        _recipes.locate()
