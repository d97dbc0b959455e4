"""The recipe's settings: every shipped config is valid, and every mistake is answered with the key's name."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from surgeon import SurgeonError, _recipes
from surgeon.errors import UsageError

CONFIGS = sorted((_recipes.locate() / "configs").rglob("*.yaml"))


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
    assert {path.stem for path in CONFIGS} >= {"digits", "resnet50", "vit_small"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid_and_says_how_to_run_it(settings: ModuleType, path: Path) -> None:
    config = settings.load_config(str(path), [])
    assert f"surgeon finetune {path.stem}" in path.read_text().split("output:")[0]
    assert settings.load_config(path.stem, []) == config  # by its bare name too


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_commands_in_the_headers_are_valid(settings: ModuleType, path: Path) -> None:
    header = path.read_text().split("output:")[0]
    commands = re.findall(r"(?:surgeon finetune|recipes/finetune\.py) (\S+)((?: \S+=\S+)*)", header)
    assert commands
    for name, overrides in commands:
        settings.load_config(name, overrides.split())


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
        (["gates.unit=pixel"], r"gates\.unit: input should be 'sample' or 'batch', not 'pixel'"),
        (["data.kind=folders"], r"data\.kind: input should be 'folder', 'digits' or 'fake', not 'folders'"),
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
        UsageError, match=r"there is no config 'digit': not a file, and not one of digits, resnet50"
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
        SurgeonError, match=r"needs package_that_is_not_there.*pip install 'depth-surgeon\[recipes\]'"
    ):
        _recipes.load("recipe_of_the_test")


def test_recipes_that_are_nowhere_are_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_recipes, "_HERE", tmp_path / "surgeon")
    with pytest.raises(
        SurgeonError, match=r"cannot find the recipes: no finetune\.py in .*Install surgeon again"
    ):
        _recipes.locate()
