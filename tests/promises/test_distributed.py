"""Gates under DDP and FSDP2: real gloo processes on the CPU, against one process on the joined batch.

Every group of processes has a time limit after which it is killed and the test fails: a hang is a failure.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

LIMIT = 100  # seconds for one group of processes

HEAD = """
import datetime, os, sys
import torch
import torch.distributed as dist
from torch import nn
from blocks import Plain, BasicBlock, randomise
import surgeon
from surgeon._gating.gate import Gate

rank, ranks = (int(a) for a in sys.argv[1:3])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", store=dist.FileStore(sys.argv[3], ranks), rank=rank, world_size=ranks,
    timeout=datetime.timedelta(seconds=40),
)

def network():
    return randomise(nn.Sequential(nn.Linear(4, 4), *(Plain() for _ in range(4)), nn.Linear(4, 2))).double()

def gated(rate, **options):
    return surgeon.apply(network(), "uniform", drop_rate=rate, example=torch.zeros(2, 4).double(), **options)

def data(step):
    return torch.randn(2 * ranks, 4, generator=torch.Generator().manual_seed(step)).double()

def in_step(model):
    for value in model.state_dict().values():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        every = [torch.empty_like(value) for _ in range(ranks)]
        dist.all_gather(every, value)
        assert all(torch.equal(value, other) for other in every), "the replicas have parted"
"""

# A thread of gloo that outlives its group and wants the interpreter lock while Python shuts down ends the
# process by std::terminate, now and then (pytorch/pytorch#179291): a rank that is done leaves at once.
TAIL = """
dist.barrier()
dist.destroy_process_group()
print("done", flush=True)
os._exit(0)
"""


def group(body: str, tmp_path: Path, ranks: int = 2) -> list[tuple[int, str]]:
    """Runs ``body`` in that many processes; exit code (-1: it had to be killed) and output of each."""
    script = tmp_path / "ranks.py"
    script.write_text(HEAD + textwrap.dedent(body) + TAIL)
    tests = Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(ranks), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        )
        for rank in range(ranks)
    ]
    results = []
    for process in processes:
        try:
            out, _ = process.communicate(timeout=LIMIT)
            results.append((process.returncode, out))
        except subprocess.TimeoutExpired:
            process.kill()
            results.append((-1, process.communicate()[0]))
    return results


def succeed(body: str, tmp_path: Path, ranks: int = 2) -> None:
    for code, out in group(body, tmp_path, ranks):
        assert code == 0, out[-3000:]
        assert "done" in out


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_plain_ddp_trains_with_draws_of_its_own_on_every_rank(tmp_path: Path, ranks: int) -> None:
    """Both units, three rates of which one drops nearly everything; the replicas stay equal, bit for bit."""
    succeed(
        """
        from torch.nn.parallel import DistributedDataParallel as DDP
        for unit in ("sample", "batch"):
            model = DDP(gated(0.5, unit=unit, skip=True))
            optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
            torch.manual_seed(rank)
            for step in range(12):
                if step == 8:
                    surgeon.set_drop_rate(model.module, 0.95)
                optimizer.zero_grad()
                model(data(step)[2 * rank : 2 * rank + 2]).square().mean().backward()
                assert all(p.grad is not None for p in model.parameters())
                optimizer.step()
            in_step(model)
        """,
        tmp_path,
        ranks,
    )


def test_ddp_is_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    """Gate i drops on rank i % 2 only: the gradient is the mean of those of two single runs."""
    succeed(
        """
        from torch.nn.parallel import DistributedDataParallel as DDP
        from surgeon._gating.gated import gates_of
        def fate(of, net):
            gates = gates_of(net)
            return lambda gate: gates.index(gate) % 2 != of
        for unit in ("batch", "sample"):
            model = DDP(gated(0.5, unit=unit, skip=True))
            Gate.survives = ours = fate(rank, model)
            Gate.survivors = lambda gate, count: count if ours(gate) else 0
            model(data(0)[2 * rank : 2 * rank + 2]).square().mean().backward()
            sums = None
            for of in range(ranks):
                single = gated(0.5, unit=unit, skip=True, unused="zero")
                Gate.survives = alone = fate(of, single)
                Gate.survivors = lambda gate, count: count if alone(gate) else 0
                single(data(0)[2 * of : 2 * of + 2]).square().mean().backward()
                found = [p.grad for p in single.parameters()]
                sums = found if sums is None else [a + b for a, b in zip(sums, found)]
            for ours, total in zip((p.grad for p in model.parameters()), sums):
                torch.testing.assert_close(ours, total / ranks, rtol=1e-12, atol=1e-14)
        """,
        tmp_path,
    )


@pytest.mark.slow
def test_without_zeros_plain_ddp_stops(tmp_path: Path) -> None:
    """Negative control: what `unused="none"` does there, so that the tests above say something."""
    results = group(
        """
        from torch.nn.parallel import DistributedDataParallel as DDP
        model = DDP(gated(0.5, unit="batch", unused="none"))
        Gate.survives = lambda gate: False
        for step in range(2):
            model(data(step)[:2]).square().mean().backward()
        """,
        tmp_path,
    )
    assert all(code != 0 and "finished reduction" in out for code, out in results)


def test_a_group_that_hangs_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the time limit itself."""
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 8)
    codes = [code for code, _ in group("import time\nif rank == 0:\n    time.sleep(60)", tmp_path)]
    assert -1 in codes


def test_fsdp2_trains_by_block_and_root(tmp_path: Path) -> None:
    """`fully_shard` on every block and on the root, draws differing between the ranks."""
    succeed(
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (ranks,))
        for unit in ("sample", "batch"):
            model = gated(0.5, unit=unit, skip=True)
            for block in model:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
            torch.manual_seed(rank)
            for step in range(8):
                optimizer.zero_grad()
                model(data(step)[2 * rank : 2 * rank + 2]).square().mean().backward()
                assert all(p.grad is not None for p in model.parameters())
                optimizer.step()
            in_step(model)
        """,
        tmp_path,
    )


@pytest.mark.slow
def test_fsdp2_gives_the_gradients_of_ddp(tmp_path: Path) -> None:
    succeed(
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel as DDP
        mesh = init_device_mesh("cpu", (ranks,))
        sides = []
        for sharded in (True, False):
            model = gated(0.5, skip=True)
            if sharded:
                for block in model:
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
            else:
                model = DDP(model)
            torch.manual_seed(rank)
            model(data(0)[2 * rank : 2 * rank + 2]).square().mean().backward()
            found = [p.grad for p in model.parameters()]
            sides.append([g.full_tensor() if sharded else g for g in found])
        torch.testing.assert_close(*sides, rtol=1e-12, atol=1e-14)
        """,
        tmp_path,
    )


# --- the same draws on every rank ---------------------------------------------


def test_synchronised_draws_are_the_same_on_every_rank_whatever_else_a_rank_draws(tmp_path: Path) -> None:
    """Under DDP, both units and masked too; ranks differ in seeds, batches and in what they draw besides."""
    succeed(
        """
        from torch.nn.parallel import DistributedDataParallel as DDP
        from surgeon._gating.gated import gates_of
        seen = []
        for name in ("survives", "survivors", "rows", "mask"):
            def note(gate, *args, original=getattr(Gate, name)):
                value = original(gate, *args)
                if torch.is_tensor(value) and value.ndim == 2:  # a mask: of as many rows as there are here
                    value = value[:2]
                flat = value.flatten().tolist() if torch.is_tensor(value) else value
                seen.append((gates.index(gate), flat))
                return value if not torch.is_tensor(value) or value.ndim != 2 else args[0].new_ones(1, 1)
            setattr(Gate, name, note)
        torch.manual_seed(rank)
        for options in ({"unit": "batch"}, {"skip": True}, {"skip": False}):
            model = DDP(gated(0.5, sync="ranks", **options))
            gates = gates_of(model)
            for step in range(10):
                torch.rand(rank + 1)
                model(data(step)[2 * rank : 2 * rank + 2]).square().mean().backward()
        every = [None] * ranks
        dist.all_gather_object(every, seen)
        assert len(seen) >= 3 * 4 * 10
        assert every[0] == every[1]
        assert len({str(value) for _, value in seen}) > 3  # and they are draws
        """,
        tmp_path,
    )


def test_synchronised_draws_let_a_branch_be_sharded_by_itself(tmp_path: Path) -> None:
    """FSDP2 inside branches: a dropped one is gathered by no rank; the weights are those that DDP gets."""
    succeed(
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel as DDP
        mesh = init_device_mesh("cpu", (ranks,))
        for unit in ("sample", "batch"):
            sides = []
            for sharded in (True, False):
                model = gated(0.5, unit=unit, skip=True, sync="ranks")
                if sharded:
                    for block in list(model)[1:-1]:
                        fully_shard(block.f, mesh=mesh)
                    fully_shard(model, mesh=mesh)
                else:
                    model = DDP(model)
                optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
                torch.manual_seed(rank)
                for step in range(6):
                    optimizer.zero_grad()
                    model(data(step)[2 * rank : 2 * rank + 2]).square().mean().backward()
                    optimizer.step()
                found = [p.detach() for p in model.parameters()]
                sides.append([p.full_tensor() if sharded else p for p in found])
            torch.testing.assert_close(*sides, rtol=1e-12, atol=1e-14)
        """,
        tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", ["unit='batch'", "skip=True", "unit='batch', sync='ranks'"])
def test_norms_over_all_ranks_are_run_by_all(tmp_path: Path, options: str) -> None:
    """PyTorch's own wants a GPU; what counts is its class, and that its sum over the ranks meets on each."""
    body = f"""
    from torch.distributed.nn.functional import all_reduce

    class Norm(nn.SyncBatchNorm):
        def forward(self, x):
            calls.append(1)
            return x - all_reduce(x.mean(0)) / ranks if self.training else x

    calls = []
    model = gated(0.8, {options})
    for block in model[1:5]:
        block.f[1] = Norm(4)
    model.double()
    torch.manual_seed(100 + rank)
    for step in range(12):
        model(data(step)[2 * rank : 2 * rank + 2]).square().sum().backward()
    every = [torch.zeros(()) for _ in range(ranks)]
    dist.all_gather(every, torch.tensor(float(len(calls))))
    assert every[0] == every[1], every
    assert (len(calls) == 48) == ("sync" not in {options!r}), len(calls)
    """
    succeed(body, tmp_path)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_with_other_schedules_are_named_at_the_first_draw(tmp_path: Path, ranks: int) -> None:
    """On every rank, at the first forward, instead of a hang or replicas that part."""
    succeed(
        """
        model = gated(0.5 if rank != 1 else 0.3, unit="batch", sync="ranks")
        try:
            model(data(0))
        except surgeon.SurgeonError as error:
            assert "rank 0 and rank 1 have different schedules" in str(error), error
            assert "gate 1.add: drop rate 0.5 against 0.3" in str(error), error
        else:
            raise SystemExit("not noticed")
        """,
        tmp_path,
        ranks,
    )
