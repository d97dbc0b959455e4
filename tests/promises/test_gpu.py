"""Gates on an accelerator: `pytest -m gpu`, in some minutes. Nothing here has run where there is none."""

import os
from typing import Any

import pytest
import torch
from blocks import Plain, Twice, grads, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

import surgeon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FORMS: list[dict[str, Any]] = [{"unit": "batch"}, {"skip": True}, {"skip": False}, {}]
forms = pytest.mark.parametrize("options", FORMS, ids=str)


def images(*options: Any, **given: Any) -> nn.Module:
    """Six ResNet blocks on the GPU, gated there or before they went."""
    model = randomise(nn.Sequential(*(BasicBlock(16, 16) for _ in range(6))))
    return surgeon.apply(model, "uniform", *options, example=torch.zeros(2, 16, 8, 8), **given).cuda()


def steps(model: nn.Module, x: Tensor, count: int = 4) -> list[Tensor]:
    torch.manual_seed(3)
    return [model(x) for _ in range(count)]


@forms
def test_both_places_of_apply_draw_and_train(options: dict[str, Any]) -> None:
    """Gated before and after it went to the device: the same draws, outputs and gradients."""
    x, sides = torch.randn(8, 4, device="cuda", dtype=torch.float64), []
    for before in (True, False):
        model = randomise(nn.Sequential(*(Twice() for _ in range(3)))).double()
        model = model if before else model.cuda()
        device = next(model.parameters()).device
        surgeon.apply(model, example=torch.zeros(2, 4, device=device, dtype=torch.float64), **options)
        outs = steps(model.cuda(), x)
        sum(out.square().sum() for out in outs).backward()
        sides.append((outs, [g for g in grads(model).values() if g is not None]))
    torch.testing.assert_close(*sides)
    assert len({tuple(out.flatten().tolist()) for out in sides[0][0]}) == 4


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, scaler = (
        images(unused="zero", **options),
        torch.amp.GradScaler("cuda", enabled=dtype == torch.float16),
    )
    optimizer, x = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(8, 16, 8, 8, device="cuda")
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@forms
def test_channels_last_stays(options: dict[str, Any]) -> None:
    model = images(**options).to(memory_format=torch.channels_last)
    x = torch.randn(64, 16, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in steps(model, x))


@forms
def test_checkpointing_replays_the_draws(options: dict[str, Any]) -> None:
    x, sides = torch.randn(6, 4, device="cuda", dtype=torch.float64, requires_grad=True), []
    for replay in (True, False):
        model = randomise(nn.Sequential(*(Plain() for _ in range(4)))).double()
        surgeon.apply(model, example=torch.zeros(2, 4).double(), unused="zero", **options).cuda()
        torch.manual_seed(1)
        y: Tensor = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=False) if replay else block(y)
        y.square().sum().backward()
        sides.append((y, grads(model)))
    torch.testing.assert_close(*sides)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"skip": True}, {"skip": False}], ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_one_graph_and_cuda_graphs(options: dict[str, Any], mode: str) -> None:
    model, x = images(**options), torch.randn(8, 16, 8, 8, device="cuda")
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    outs = []
    for _ in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(x)
        out.sum().backward()
        outs.append(out.detach().clone())
    assert len({tuple(out.flatten().tolist()) for out in outs}) == 8


@pytest.mark.filterwarnings("ignore")
def test_branches_compiled_by_themselves() -> None:
    model = surgeon.compile(images(unit="batch"))
    for _ in range(6):
        model(torch.randn(8, 16, 8, 8, device="cuda")).sum().backward()


@forms
def test_a_step_never_waits_for_the_device(options: dict[str, Any]) -> None:
    model, x = images(**options), torch.randn(8, 16, 8, 8, device="cuda")
    model(x).sum().backward()  # the first step measures what skipping costs
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", FORMS[:2], ids=str)
def test_memory_falls_with_what_is_dropped(options: dict[str, Any]) -> None:
    x, peaks = torch.randn(64, 16, 32, 32, device="cuda"), []
    for rate in (0.0, 0.9):
        model = images(drop_rate=rate, **options)
        taken = []
        for _ in range(8):
            torch.cuda.reset_peak_memory_stats()
            model(x).sum().backward()
            taken.append(torch.cuda.max_memory_allocated())
        peaks.append(sum(taken) / len(taken))
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.filterwarnings("ignore")
@forms
def test_ddp_over_nccl(options: dict[str, Any], tmp_path: Any) -> None:
    """One process; with several GPUs `torchrun` runs the same file with more."""
    import torch.distributed as dist

    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", world_size=ranks, rank=rank)
    try:
        model = nn.parallel.DistributedDataParallel(
            images(**options), device_ids=[torch.cuda.current_device()]
        )
        for _ in range(4):
            model(torch.randn(8, 16, 8, 8, device="cuda")).sum().backward()
    finally:
        dist.destroy_process_group()
