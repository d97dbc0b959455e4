"""What every test gets: a fixed seed, one thread, and the caller's environment left alone."""

import functools
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from surgeon import _torch
from surgeon.errors import UnsupportedTorchError


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers in every order of tests, and the global stream as it was afterwards."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.random.set_rng_state(state)


@pytest.fixture(scope="module")
def one_registry() -> Iterator[None]:
    """The exporter parses the source of its 500 operators at each call, half of its time; once will do."""
    from torch.onnx._internal.exporter import _registration

    kept = functools.cache(_registration.ONNXRegistry.from_torchlib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(kept))
        yield


# What skip="auto" decides must not depend on the machine that tests.
os.environ.setdefault("SURGEON_COST", "cpu:5.4e-4,1.1e-10,1.8e-11")


def _can_export(what: str, check: Callable[[str], None] = _torch.check_exporter) -> None:
    """A test that comes to an export is skipped where PyTorch cannot, with what surgeon says of it."""
    try:
        check(what)
    except UnsupportedTorchError as error:
        pytest.skip(str(error))


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors on the newest PyTorch; what other versions warn of is no fault of surgeon's."""
    torch.set_num_threads(1)
    if torch.__version__.startswith(f"{_torch.NEWEST}."):
        config.addinivalue_line("filterwarnings", "error")
    if torch.__version__.startswith("2.6."):
        _torch.check_exporter = _can_export
