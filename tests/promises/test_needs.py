"""What is not torch, numpy or safetensors: missing or too old, it is named before any work."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import surgeon
from surgeon import _recipes
from surgeon._needs import installed, need
from surgeon.cli.main import main
from surgeon.errors import MissingPackageError, SurgeonError
from surgeon.integrations.core import GateTraining

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("click", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "pydantic", "rich", "timm", "torchvision")


def without(code: str, *packages: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in which some packages are not to be found."""
    hide = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util as _util
_find = _util.find_spec
_util.find_spec = lambda name, *a: None if name in {packages!r} else _find(name, *a)
"""
    return subprocess.run(
        [sys.executable, "-c", hide + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


NETWORK = """
import torch, surgeon
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    def forward(self, x):
        return x + self.body(x)
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), Block(), Block(), nn.Flatten(), nn.LazyLinear(2))
x = torch.randn(8, 3, 6, 6)
def made(**gates):
    model = network()
    model(x)
    return surgeon.apply(model, example=x, **gates) if gates else model
"""


def test_all_but_onnx_and_names_works_with_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    code = f"""
for unit in ("sample", "batch"):
    made(unit=unit).train()(x).sum().backward()
model = made(scaling="paper").eval()
folded = surgeon.fold(model, example=x)
print(torch.allclose(folded(x), model(x), atol=1e-5), len(surgeon.status(model).gates))
surgeon.save_checkpoint(model, {str(tmp_path / "m.safetensors")!r})
other = made(scaling="paper").eval()
surgeon.load(other, {str(tmp_path / "m.safetensors")!r})
print(torch.equal(other(x), model(x)))
surgeon.set_drop_rate(model, 0.1)
surgeon.remove(model)
print(sorted(set({BESIDE!r}) & set(sys.modules)))
"""
    done = without(NETWORK + code, *BESIDE)
    assert done.stdout.splitlines() == ["True 2", "True", "[]"], done.stderr


MISSING = {
    "surgeon.export needs onnx (not installed) and onnxscript from 0.7.2 (not installed): "
    "pip install onnx 'onnxscript>=0.7.2'": ("export", (None, "m.onnx"), ("onnx", "onnxscript")),
    "surgeon.verify needs onnx-ir (not installed) and onnxruntime (not installed): "
    "pip install onnx-ir onnxruntime": ("verify", (None, "m.onnx"), ("onnxruntime", "onnx_ir")),
    "a model of timm needs timm (not installed): pip install timm": (
        *("load_model", ("timm:resnet18",), ("timm",)),
    ),
    "'resnet18', a name without its library, needs torchvision (not installed): pip install torchvision": (
        "load_model",
        ("resnet18",),
        ("torchvision",),
    ),
}


@pytest.mark.parametrize(("said", "call"), MISSING.items())
def test_what_is_missing_is_named_with_the_line_that_installs_it(
    said: str, call: tuple[str, tuple[Any, ...], tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, arguments, missing = call
    monkeypatch.delitem(vars(surgeon), name, raising=False)
    monkeypatch.setattr("surgeon._needs.find_spec", lambda name: None if name in missing else object())
    with pytest.raises(MissingPackageError) as caught:
        getattr(surgeon, name)(*arguments)
    assert str(caught.value) == said


def test_the_command_says_what_it_is_made_with() -> None:
    done = without("from surgeon.__main__ import main; main()", "click")
    assert done.returncode == 1
    assert done.stderr == "surgeon: the surgeon command needs click (not installed): pip install click\n"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("sys.modules['pydantic'] = None", "import of pydantic halted"),
        ("import timm.models; del timm.models.save_for_hf", "cannot import name 'save_for_hf'"),
    ],
)
def test_a_recipe_says_what_is_missing_or_too_old(change: str, why: str) -> None:
    run = "from surgeon.__main__ import main; sys.argv[1:] = ['finetune', 'digits']; main()"
    done = without(f"{change}\n{run}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"surgeon: the recipe finetune cannot start ({why}"), done.stderr
    assert done.stderr.endswith("): pip install 'depth-surgeon[recipes]'\n")


def test_an_old_version_is_named_with_the_one_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for old, enough in {"0.6.2": False, "0.7.2": True, "0.7.10": True, "0.8.0.dev20": True}.items():
        monkeypatch.setattr("surgeon._needs.version", lambda name, old=old: old)
        if enough:
            need("surgeon.export", "onnxscript>=0.7.2")
            continue
        with pytest.raises(MissingPackageError, match=r"from 0\.7\.2 \(0\.6\.2 is installed\): pip install"):
            need("surgeon.export", "onnxscript>=0.7.2")


WHERE: dict[str, Callable[[], Any]] = {
    "surgeon.export": lambda: surgeon.export(None, "never.onnx"),
    "surgeon.latency": lambda: surgeon.latency(None),
    "onnx=True": lambda: GateTraining(deliver="never", onnx=True),
    "surgeon export": lambda: CliRunner().invoke(main, ["export", "never:made", "-o", "never.onnx"]).stderr,
    "deliver.onnx=true": lambda: _recipes.load().main("digits", ["deliver.onnx=true", "output=never"]),
}
LACKS = {
    "a package": ("surgeon._needs.version", lambda name: "0.6.2", "needs onnxscript from 0.7.2 (0.6.2 is"),
    "PyTorch": ("torch.__version__", "2.6.0+cu1", "cannot be done by PyTorch 2.6.0+cu1, whose ONNX exporter"),
}


@pytest.mark.parametrize(("what", "call"), WHERE.items(), ids=WHERE)
@pytest.mark.parametrize(("name", "value", "why"), LACKS.values(), ids=LACKS)
def test_an_export_is_refused_before_any_work(
    what: str, call: Callable[[], Any], name: str, value: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in ("export", "latency"):
        monkeypatch.delitem(vars(surgeon), asked, raising=False)
    monkeypatch.setattr(name, value)
    try:
        said = call()
    except SurgeonError as error:
        said = str(error)
    assert said.removeprefix("surgeon: ").startswith(f"{what} {why}")
    assert not Path("never").exists()


def test_a_package_of_another_name_with_the_same_module_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu is imported as onnxruntime."""
    assert installed("onnxruntime-by-another-name") is None
    monkeypatch.setattr("surgeon._needs.installed", lambda name: None)
    need("surgeon.verify", "onnxruntime>=1.23")
