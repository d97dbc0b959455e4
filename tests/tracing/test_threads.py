"""A trace patches PyTorch's own classes for a while; other threads notice nothing of it."""

import sys
import threading
from queue import SimpleQueue
from typing import Any

import torch
from blocks import Of, Plain, randomise
from torch import Tensor, nn

import surgeon

INPUT = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def elsewhere(network: nn.Module) -> Tensor:
    """What another thread may be doing: modules, factories, regions, autograd functions."""
    with torch.no_grad():
        return Double.apply(network(INPUT)) + torch.arange(4.0) + torch.zeros(4)


def test_another_thread_runs_on_while_a_block_is_traced() -> None:
    network = randomise(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)))  # part of the block, too
    expected, seen = elsewhere(network), SimpleQueue[Any]()

    def note() -> None:
        try:
            seen.put(elsewhere(network))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            seen.put(error)

    def forward(self: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()
        return x + self.f(x)

    block = Of(forward, f=nn.Sequential(network, nn.ReLU()))
    assert len(surgeon.find(block, example=INPUT)) == 1
    assert seen.qsize() >= 2  # in the recording and in the trace
    while not seen.empty():
        value = seen.get()
        assert isinstance(value, Tensor), value
        assert torch.equal(value, expected)


def test_threads_operate_on_models_of_their_own_at_once() -> None:
    call, getattr_ = nn.Module.__call__, nn.Module.__getattr__
    models = [nn.Sequential(*(Plain() for _ in range(6))) for _ in range(4)]
    outcomes: list[Any] = [None] * len(models)
    together = threading.Barrier(len(models))

    def operate(place: int) -> None:
        together.wait()
        try:
            outcomes[place] = len(surgeon.status(surgeon.apply(models[place], example=INPUT)).gates)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            outcomes[place] = error

    switched = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=operate, args=(place,)) for place in range(len(models))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switched)
    assert outcomes == [6] * len(models)
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getattr_
