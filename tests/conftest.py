"""What every test gets: a fixed seed, one thread, and the caller's environment left alone."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers in every order of tests, and the global stream as it was afterwards."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.random.set_rng_state(state)


def pytest_configure() -> None:
    torch.set_num_threads(1)
