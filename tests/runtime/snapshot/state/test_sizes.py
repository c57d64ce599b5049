"""What is predicted of snapshots is what a real memory process takes for them."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

import stowplan
from stowplan.offload.capture.optimizers import steady_states
from stowplan.runtime.snapshot.state.sizes import predicted
from tests.distributed import Ranks
from tests.runtime.snapshot.replicated import Replicated
from tests.runtime.snapshot.trainings import Net, Training

CPU = torch.device("cpu")


@contextlib.contextmanager
def environment(**values: str):
    """Variables of this process, which may be a rank that other tests use after this one."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def reserved(training: Training | Replicated, path: str, rank: int = 0, **options) -> tuple[int, int]:
    """Bytes for one slot's data, and all that the memory process holds after a snapshot of the training."""
    with environment(XDG_RUNTIME_DIR=path, STOWPLAN_JOB_TOKEN="a token for this test only"):
        parts = {"model": training.model, "optimizer": training.optimizer}
        with stowplan.Snapshotter(**parts, run="job-1", idle_seconds=60, **options) as snapshots:
            snapshots.restore()
            training.run(1)
            snapshots.save(1)
            memory = snapshots.status().memory
            try:
                return memory.ranks[0].data_bytes, held_bytes(memory.pid)
            finally:
                snapshots.wait()
                snapshots._agreement.gather(None)
                os.kill(memory.pid, signal.SIGKILL)


def held_bytes(pid: int) -> int:
    """Of all memfds of a process, in pages that are there."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if str(path.readlink()).startswith("/memfd:"):
            status = path.stat()
            found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def expected(training: Training, memory: stowplan.SnapshotMemory) -> tuple[int, int]:
    states = steady_states(training.optimizer, CPU)
    size = predicted(memory, training.model, training.optimizer, states)
    return size.data_bytes, size.total_bytes


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_plain_training_takes_what_was_predicted_before_its_first_step(optimizer):
    training = Training(optimizer=optimizer)
    before = expected(training, stowplan.SnapshotMemory())
    assert not training.optimizer.state
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        assert reserved(training, path) == before
    data_bytes, total_bytes = expected(training, stowplan.SnapshotMemory())
    assert total_bytes == before[1]
    assert abs(data_bytes - before[0]) < 200, "generators' numbers have more digits at some times"


def on_a_rank(rank: int, path: str, nodes: str) -> tuple[tuple[int, int], tuple[int, int]]:
    training = Training(rank, mesh=(2,))
    before = expected(training, stowplan.SnapshotMemory(num_nodes=len(set(nodes))))
    return before, reserved(training, path, rank, node=nodes[rank])


def test_sharded_ranks_of_two_nodes_take_what_was_predicted_with_parity(ranks: Ranks):
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        found = ranks.run(on_a_rank, path, "ab")
    assert {before for before, _ in found} == {after for _, after in found} == {found[0][0]}


def on_a_rank_of_replicas(rank: int, path: str, nodes: str) -> tuple[tuple[int, int], tuple[int, int]]:
    training, num_nodes = Replicated(), len(set(nodes))
    data_bytes, total_bytes = expected(training, stowplan.SnapshotMemory(num_nodes=num_nodes))
    before = data_bytes, total_bytes * len(nodes) // num_nodes  # a memory process has those of all ranks of its node
    return before, reserved(training, path, rank, node=nodes[rank])


@pytest.mark.parametrize("nodes", ["aabb", "abcd"])
def test_replicated_ranks_of_nodes_take_what_was_predicted_with_copies(ranks4: Ranks, nodes: str):
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        found = ranks4.run(on_a_rank_of_replicas, path, nodes)
    assert {before for before, _ in found} == {after for _, after in found} == {found[0][0]}


def grow(rank: int, path: str) -> list[tuple[int, ...]]:
    """What grows has no copies on other nodes; sizes that were reserved before and after."""
    training, words = Replicated(), {"words": torch.zeros(10, dtype=torch.uint8)}
    with environment(XDG_RUNTIME_DIR=path, STOWPLAN_JOB_TOKEN="a token for this test only"):
        parts = {"model": training.model, "optimizer": training.optimizer, "extras": {"more": Growing(words)}}
        with stowplan.Snapshotter(**parts, run="job-1", idle_seconds=60, node=f"node-{rank}") as snapshots:
            snapshots.restore()
            sizes = []
            for step, num_bytes in ((1, 10), (2, 1_000_000), (3, 5_000_000)):
                words["words"] = torch.zeros(num_bytes, dtype=torch.uint8)
                assert not snapshots.save(step).skipped
                assert snapshots.wait()
                (own,) = snapshots.status().memory.ranks
                sizes.append((own.data_bytes, own.parity_bytes, len([slot for slot in own.slots if slot.sequence])))
            snapshots.end()
    return sizes


class Growing:
    def __init__(self, words: dict[str, torch.Tensor]) -> None:
        self.words = words

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.words

    def load_state_dict(self, words: dict[str, torch.Tensor]) -> None:
        self.words = words


def test_what_grows_within_the_reserve_does_not_cost_what_is_held(ranks: Ranks):
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        for first, second, third in ranks.run(grow, path):
            assert second == (*first[:2], 2)
            assert third[0] > second[0]
            assert third[2] == 1, "memory was reserved anew"


@pytest.mark.parametrize("build", ["dry", "meta"])
def test_models_without_data_are_predicted_alike(build):
    real = Training(optimizer="sgd")
    torch.manual_seed(0)
    with stowplan.dry() if build == "dry" else torch.device("meta"):
        model = Net()
        optimizer = torch.optim.SGD(
            [{"params": list(g["params"])} for g in torch.optim.SGD(model.parameters()).param_groups], momentum=0.9
        )
    plain = torch.optim.SGD(real.model.parameters(), lr=1e-3, momentum=0.9)
    memory = stowplan.SnapshotMemory()
    same = predicted(memory, model, optimizer, steady_states(optimizer, CPU))
    assert same == predicted(memory, real.model, plain, steady_states(plain, CPU))


def test_tied_weights_count_once_and_what_is_beside_on_top():
    model = Net()
    alone = predicted(stowplan.SnapshotMemory(), model)
    model.again = model.last.weight
    assert predicted(stowplan.SnapshotMemory(), model).data_bytes < alone.data_bytes + model.last.weight.nbytes
    more = predicted(stowplan.SnapshotMemory(beside="16MiB"), Net())
    assert more.data_bytes == alone.data_bytes + (17 << 20)
