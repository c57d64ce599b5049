"""Replicas of all kinds on several nodes: shares, copies and what is coded make each rank's bytes again."""

from __future__ import annotations

import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stowplan import InvalidArgument, RankFailed
from stowplan.runtime.snapshot.snapshotter import Saved, Snapshotter
from tests.distributed import Ranks
from tests.runtime.snapshot.conftest import eventually
from tests.runtime.snapshot.trainings import raw

pytestmark = pytest.mark.slow
NEIGHBOURS, CROSSED, UNEVEN = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1, 2, 3]]


def net(seed: int) -> nn.Module:
    """Tied ends, a buffer that differs between ranks, what is frozen, and what is too small to be divided."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(67, 301), nn.BatchNorm1d(301), nn.Linear(301, 67), nn.Linear(67, 301))
    made[3].weight = made[0].weight
    made.frozen = nn.Parameter(torch.randn(5, 3001), requires_grad=False)
    made.waves = nn.Parameter(torch.randn(3, 7, 2, dtype=torch.complex64))
    return made


def replicated(ranks: list[list[int]], seed: int) -> nn.Module:
    groups = [dist.new_group(each) for each in ranks]
    mine = next(group for each, group in zip(ranks, groups, strict=True) if dist.get_rank() in each)
    return DistributedDataParallel(net(seed + min(dist.get_process_group_ranks(mine))), process_group=mine)


def sharded(ranks: list[list[int]], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(67, 301), nn.BatchNorm1d(301), nn.Linear(301, 67))
    fully_shard(made, mesh=DeviceMesh("cpu", torch.tensor(ranks), mesh_dim_names=("replicas", "shards")))
    return made


MODELS = {
    "all": lambda seed: {"one": replicated([[0, 1, 2, 3]], seed)},
    "groups": lambda seed: {
        "all": replicated([[0, 1, 2, 3]], seed),
        "crossed": replicated(CROSSED, seed + 10),
        "uneven": replicated(UNEVEN, seed + 20),
    },
    "hsdp": lambda seed: {"one": sharded(NEIGHBOURS, seed)},
    "both": lambda seed: {"shards": sharded(CROSSED, seed), "replicas": replicated(NEIGHBOURS, seed + 10)},
    "small": lambda seed: {"one": DistributedDataParallel(nn.Linear(5, 5))},
}


class Training:
    """Steps with gradients that are the same on all ranks, so that replicas are."""

    def __init__(self, kind: str, seed: int) -> None:
        self.models = MODELS[kind](seed)
        trained = [p for model in self.models.values() for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)

    def step(self, number: int) -> None:
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter) * (0.01 * number)
        self.optimizer.step()
        for buffer in (buffer for model in self.models.values() for buffer in model.buffers()):
            buffer.add_(dist.get_rank() + number)

    def depart(self) -> None:
        """The largest tensor differs on rank 1 from now on."""
        largest = max((p for model in self.models.values() for p in model.parameters()), key=torch.Tensor.numel)
        local = largest.data.to_local() if isinstance(largest.data, DTensor) else largest.data
        local.view(-1)[5] += dist.get_rank() == 1

    def bytes(self) -> dict[str, bytes]:
        """All of this rank's."""
        tensors = {f"{key}.{name}": t for key, model in self.models.items() for name, t in model.state_dict().items()}
        states = enumerate(self.optimizer.state.values())
        tensors |= {f"{index}.{name}": tensor for index, state in states for name, tensor in state.items()}
        return {name: raw(t.to_local() if isinstance(t, DTensor) else t) for name, t in tensors.items()}


def lose(
    rank: int, sockets: str, kind: str, nodes: str, m: int, lost: str, then: str, differ: bool, options: dict[str, Any]
) -> tuple[list[Saved], set[str], int]:
    """What was saved, which tensors were restored with other bytes, at which step."""
    os.environ |= {"XDG_RUNTIME_DIR": sockets, "STOWPLAN_JOB_TOKEN": "a token for this test only"}
    warnings.simplefilter("ignore", RuntimeWarning)  # of what differs

    def snapshotter(training: Training, names: str) -> Snapshotter:
        parts = {"model": training.models, "optimizer": training.optimizer}
        return Snapshotter(**parts, run="job-1", node=names[rank], m=m, idle_seconds=60, **options)

    training, saved = Training(kind, 0), []
    with snapshotter(training, nodes) as snapshots:
        assert snapshots.restore() is None
        for step in (1, 2, 3):
            training.step(step)
            if differ and step == 2:
                training.depart()
            saved.append(snapshots.save(step))
            assert snapshots.wait()
            if "directory" in options:
                assert snapshots._disk.wait(60)
            dist.barrier()
        memory, found = snapshots.status().memory.pid, training.bytes()
    dist.barrier()
    if nodes[rank] in lost and nodes.index(nodes[rank]) == rank:
        os.kill(memory, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{memory}/cmdline").exists())
    dist.barrier()
    training = Training(kind, 77)
    with snapshotter(training, then) as snapshots:
        restored = snapshots.restore()
        wrong = {name for name, content in training.bytes().items() if found[name] != content}
        training.step(4)
        saved.append(snapshots.save(4))
        assert snapshots.wait()
        snapshots.end()
    return saved, wrong, restored.step


@pytest.mark.parametrize(
    ("kind", "nodes", "m", "lost", "then", "differ"),
    [
        ("all", "abcd", 1, "b", "dxca", False),
        ("all", "aabb", 1, "a", "bbcc", True),
        ("groups", "abab", 1, "a", "ccbb", False),
        ("groups", "abcd", 2, "bd", "xayc", False),
        ("hsdp", "aabb", 1, "b", "aacc", False),
        ("hsdp", "abcd", 2, "ac", "xbyd", True),
        ("both", "abab", 1, "b", "acac", False),
        ("small", "abcd", 1, "c", "abxd", False),
    ],
)
def test_a_lost_node_is_made_again(
    ranks4: Ranks, kind: str, nodes: str, m: int, lost: str, then: str, differ: bool
) -> None:
    with tempfile.TemporaryDirectory(prefix="stow", ignore_cleanup_errors=True) as sockets:
        answers = ranks4.run(lose, sockets, kind, nodes, m, lost, then, differ, {})
    for saved, wrong, step in answers:
        assert not any(each.skipped for each in saved)
        assert (wrong, step) == (set(), 3)


def test_a_mirror_of_four_nodes_stands_two_that_are_no_neighbours(ranks4: Ranks) -> None:
    with tempfile.TemporaryDirectory(prefix="stow", ignore_cleanup_errors=True) as sockets:
        answers = ranks4.run(lose, sockets, "groups", "abcd", 1, "ac", "xbyd", False, {"code": "mirror"})
    assert [(wrong, step) for _, wrong, step in answers] == [(set(), 3)] * 4


def test_copies_on_disk_have_all_shares(ranks4: Ranks, tmp_path: Path) -> None:
    """Buffers that differ between ranks are those of one of them there."""
    with tempfile.TemporaryDirectory(prefix="stow", ignore_cleanup_errors=True) as sockets:
        answers = ranks4.run(lose, sockets, "all", "abcd", 1, "abcd", "wxyz", False, {"directory": tmp_path})
    for _, wrong, step in answers:
        assert step == 3
        assert {name for name in wrong if "running" not in name and "num_batches" not in name} == set()


def save_in_disorder(rank: int, sockets: str) -> str:
    os.environ["XDG_RUNTIME_DIR"] = sockets
    with Snapshotter(model=sharded([[3, 1], [0, 2]], 0), run="job-1", node="a", idle_seconds=60) as snapshots:
        with pytest.raises((InvalidArgument, RankFailed)) as raised:
            snapshots.save(1)
        snapshots.end()
    return str(raised.value)


def test_a_mesh_whose_ranks_do_not_ascend_where_it_shards_is_refused(ranks4: Ranks) -> None:
    with tempfile.TemporaryDirectory(prefix="stow") as sockets:
        for said in ranks4.run(save_in_disorder, sockets):
            assert "[[3, 1], [0, 2]] has ranks that do not ascend along dimension 1" in said
