"""Private names of PyTorch: in one file, each there and doing what surgeon takes it to do, or refused."""

import ast
import logging
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from surgeon import _torch as private
from surgeon._tracing.undisturbed import replaced

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = re.compile(r"torch(\.\w+)*\._[a-z]\w*")


def names_of_torch(tree: ast.AST) -> set[str]:
    """The private names of torch that a file has: imported, as an attribute, or in a string."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found.add(node.value)
    operators = ("torch.ops.", "torch._version")
    return {name for name in found if PRIVATE.match(name) and not name.startswith(operators)}


def test_one_file_names_what_is_private() -> None:
    named = {
        str(path.relative_to(ROOT)): names_of_torch(ast.parse(path.read_text()))
        for path in (ROOT / "surgeon").rglob("*.py")
    }
    assert {path for path, names in named.items() if names} == {"surgeon/_torch.py"}
    assert "torch._subclasses.fake_tensor.FakeTensor" in named["surgeon/_torch.py"]


@pytest.mark.parametrize(
    "code",
    [
        "from torch._compile import f",
        "from torch.utils import _pytree as p",
        "import torch._dynamo",
        "torch._C._x()",
        "f(torch.utils.checkpoint._y)",
        "look('torch._dynamo.eval_frame')",
    ],
)
def test_a_private_name_is_seen_in_every_spelling(code: str) -> None:
    assert names_of_torch(ast.parse(code))


def test_all_that_is_offered_is_there() -> None:
    assert [name for name in private.__all__ if not hasattr(private, name)] == []


# --- and does what it is taken to do ----------------------------------------------


def test_a_fake_tensor_takes_size_strides_device_and_gradients_over() -> None:
    mode = private.FakeTensorMode(allow_non_fake_inputs=True)
    for asks in (True, False):
        with private.no_dispatch():
            meta = torch.empty(3, 4, device="meta").t()
            made = private.fake_of(mode, meta, torch.device("cpu"), requires_grad=asks)
        assert isinstance(made, private.FakeTensor) and made.device.type == "cpu"
        assert made.shape == (4, 3) and made.stride() == (1, 4) and made.requires_grad is asks
        with mode:
            assert (made @ torch.ones(3, 2)).shape == (4, 2)


def test_real_numbers_can_be_read_within_a_fake_mode() -> None:
    real = torch.arange(3)
    with private.FakeTensorMode(allow_non_fake_inputs=True), private.no_dispatch():
        assert real.tolist() == [0, 1, 2]


def test_the_logger_of_fake_tensors_tells_of_a_fake_run_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger(private.FAKE_LOG)
    log.addHandler(caplog.handler)  # PyTorch 2.6 hands nothing on to the root
    try:
        with private.FakeTensorMode() as mode, pytest.raises(RuntimeError):
            torch.ops.aten.mm(mode.from_tensor(torch.ones(2, 2)), mode.from_tensor(torch.ones(3, 3)))
    finally:
        log.removeHandler(caplog.handler)
    assert {record.name for record in caplog.records} == {private.FAKE_LOG}


def test_a_dispatch_mode_sees_the_parts_of_a_composite_function() -> None:
    seen = []

    class Log(private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Log():
        nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2), torch.ones(2))
    assert torch.ops.aten.addmm in seen


def test_functionalisation_takes_writes_out_and_hands_them_back() -> None:
    start = torch.zeros(2)
    wrapped = private.to_functional(start)
    with private.functionalizing():
        wrapped.add_(1)
    assert private.from_functional(wrapped).tolist() == [1, 1]
    assert start.tolist() == [0, 0]
    assert private.from_functional(start) is start


def test_vmap_is_seen_and_other_transforms_are_not() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(private.under_vmap())
        return x.sum()

    look(torch.ones(2))
    torch.vmap(look)(torch.ones(2, 2))
    torch.func.grad(look)(torch.ones(2))
    assert seen == [False, True, False]


def test_saving_may_change_but_not_under_a_transform() -> None:
    assert private.saves_may_change() is not torch.__version__.startswith("2.6.")
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not private.saves_may_change()


@pytest.mark.skipif(not private.saves_may_change(), reason="PyTorch 2.6 cannot tell")
def test_the_hooks_on_top_are_those_of_who_asked_last() -> None:
    def pack(x: torch.Tensor) -> torch.Tensor:
        return x

    assert private.top_saving_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert tuple(private.top_saving_hooks()) == (pack, pack)


@pytest.mark.parametrize("reentrant", [True, False])
def test_every_checkpoint_goes_through_the_named_place(reentrant: bool) -> None:
    class Seen(Exception):
        pass

    def stop(*args: object, **kwargs: object) -> None:
        raise Seen(args, kwargs)

    def call() -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(torch.add, x, alpha=2, other=x, use_reentrant=reentrant)

    x = torch.ones(1)
    with replaced((*private.CHECKPOINT, stop)), pytest.raises(Seen) as caught:
        call()
    function, args, kwargs, options = private.checkpoint_call(*caught.value.args)
    assert (function, args, kwargs) == (torch.add, (x,), {"alpha": 2, "other": x})
    assert options["use_reentrant"] is reentrant
    with replaced((*private.CHECKPOINT, private.checkpoint_itself)):
        assert reentrant or call() == 3


def test_every_check_goes_through_the_named_place() -> None:
    with mock.patch.object(*private.CHECK, lambda error, condition, message: seen.append((error, condition))):
        seen: list[object] = []
        torch._check(True)
        torch._check_value(True)
    assert seen == [(RuntimeError, True), (ValueError, True)]


def test_fx_asks_for_attributes_by_the_named_function() -> None:
    class Reader(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = Reader()
    model.inner = nn.ReLU()
    asked, original = [], getattr(*private.MODULE_GETATTR)

    def note(module: nn.Module, name: str) -> object:
        asked.append(name)
        return original(module, name)

    with mock.patch.object(*private.MODULE_GETATTR, note):
        torch.fx.symbolic_trace(model)
    assert "inner" in asked


def test_the_compiled_class_has_the_name_by_which_it_is_known() -> None:
    module, name = private.COMPILED
    assert getattr(__import__(module, fromlist=[name]), name).__mro__[1] is nn.Module


# --- or is refused ---------------------------------------------------------------

BREAKS = {
    "too old": ("torch.__version__ = '2.5.1'", "runs on PyTorch 2.6 and newer"),
    "no fake tensors": (
        "import torch._subclasses.fake_tensor as m; del m.FakeTensorMode",
        "cannot import name 'FakeTensorMode'",
    ),
    "no fx lookup": (
        "import torch.fx._symbolic_trace as m; del m._orig_module_getattr",
        "_orig_module_getattr",
    ),
    "no checkpoints": (
        """
import torch.utils.checkpoint as m
vars(m).pop("_checkpoint_impl", None)
m.checkpoint = lambda: None""",
        "__wrapped__",
    ),
    "no functionalization": ("del torch._to_functional_tensor", "_to_functional_tensor"),
}


@pytest.mark.parametrize(("change", "said"), BREAKS.values(), ids=BREAKS)
def test_what_is_missing_is_refused_before_any_work(change: str, said: str) -> None:
    code = (
        f"import torch, surgeon; {change}\n"
        "try:\n    surgeon.find(torch.nn.ReLU(), torch.ones(1))\n"
        "except surgeon.SurgeonError as error:\n"
        "    print(type(error).__name__, isinstance(error, ImportError), error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.startswith("UnsupportedTorchError True surgeon "), done.stderr
    assert said in done.stdout and "pip install 'torch>=2.6,<2.16'" in done.stdout
    assert done.stdout.count("\n") == 1
