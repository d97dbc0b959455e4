"""What every test gets: a fixed seed, one thread, and the caller's environment left alone."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from surgeon._torch import NEWEST, check_exporter
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


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors on the newest PyTorch; what other versions warn of is no fault of surgeon's."""
    torch.set_num_threads(1)
    if torch.__version__.startswith(f"{NEWEST}."):
        config.addinivalue_line("filterwarnings", "error")


@contextmanager
def _exported() -> Iterator[None]:
    """A test that comes to an export is skipped where PyTorch cannot, with what surgeon says of it."""
    try:
        yield
    except UnsupportedTorchError as error:
        try:
            check_exporter("an export")
        except UnsupportedTorchError:
            pytest.skip(str(error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[Any]:
    with _exported():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[Any]:
    with _exported():
        return (yield)
