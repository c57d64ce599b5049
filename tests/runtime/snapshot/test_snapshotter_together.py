"""Snapshotters of two nodes with two ranks each, as threads: what they do where groups have different snapshots."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stowplan.runtime.snapshot import snapshotter as module
from stowplan.runtime.snapshot.memory.layout import Geometry
from stowplan.runtime.snapshot.memory.schema import Schema, Tensor
from stowplan.runtime.snapshot.memory.slots import State
from stowplan.runtime.snapshot.snapshotter import Snapshotter
from tests.runtime.snapshot.agreement import of_threads

WORLD_SIZE = 4


@pytest.fixture
def together(monkeypatch):
    """Runs a function of a rank and its Snapshotter, over a model of one number, on all ranks; gives their results."""
    threads = of_threads(WORLD_SIZE)
    monkeypatch.setattr(module, "Agreement", threads)
    monkeypatch.setenv("STOWPLAN_JOB_TOKEN", "a token for this test only")
    pids = set()

    def run(function, nodes="0011"):
        def on_rank(rank):
            threads.ranks.rank = rank
            model = torch.nn.Linear(1, 1)
            with Snapshotter(model=model, run="job-1", node=f"node-{nodes[rank]}", idle_seconds=60) as snapshots:
                pids.add(snapshots.status().memory.pid)
                return function(rank, snapshots, model)

        with ThreadPoolExecutor(WORLD_SIZE) as pool:
            return list(pool.map(on_rank, range(WORLD_SIZE)))

    with tempfile.TemporaryDirectory(prefix="stow") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        yield run
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def save(rank, snapshots, model, step):
    model.weight.data.fill_(10 * step + rank)
    assert not snapshots.save(step).skipped
    assert snapshots.wait()
    snapshots._agreement.gather(None)  # all have waited


def damage(snapshots, sequence, area):
    """Flip a bit of a snapshot in memory."""
    client = snapshots._memory.client
    attached = client._attached
    geometry = Geometry(attached.data_bytes, attached.parity_bytes, attached.coding.n)
    own = next(each for each in snapshots.status().memory.ranks if each.rank == attached.rank)
    slot = next(index for index, each in enumerate(own.slots) if each.sequence == sequence)
    client._region.view[getattr(geometry, area)(slot) + 100] ^= 1


def test_groups_that_have_different_snapshots_go_back_to_one_that_all_have(together):
    def first(rank, snapshots, model):
        assert snapshots.restore() is None
        save(rank, snapshots, model, 1)
        save(rank, snapshots, model, 2)
        if rank == 1:  # of the second group data and copy are lost
            damage(snapshots, 2, "data")
        if rank == 3:
            damage(snapshots, 2, "parity")

    def second(rank, snapshots, model):
        restored = snapshots.restore()
        weight = model.weight.item()
        save(rank, snapshots, model, 3)
        return restored.step, weight

    together(first)
    assert together(second) == [(1, 10.0 + rank) for rank in range(WORLD_SIZE)]


def test_a_first_snapshot_that_never_was_complete_is_no_reason_not_to_begin(together):
    def first(rank, snapshots, model):
        assert snapshots.restore() is None
        writing = snapshots._memory.client.begin(1, 1, Schema((Tensor("state", "uint8", (3,), 0, 3),)))
        if rank in (0, 2):  # one rank of each node was quicker than the other
            writing.payload[:] = b"abc"
            snapshots._memory.client.commit(1)
            assert snapshots._memory.client.wait(1, State.LOCAL) >= State.LOCAL
        snapshots._agreement.gather(None)

    def second(rank, snapshots, model):
        restored = snapshots.restore()
        save(rank, snapshots, model, 1)
        return restored

    together(first)
    assert together(second) == [None] * WORLD_SIZE


def test_nodes_may_come_in_another_order(together):
    def first(rank, snapshots, model):
        save(rank, snapshots, model, 1)
        (member,) = snapshots._memory.members.clients
        return member.node

    def second(rank, snapshots, model):
        restored = snapshots.restore()
        (member,) = snapshots._memory.members.clients
        save(rank, snapshots, model, 2)
        return restored.step, member.node

    assert together(first) == [0, 0, 1, 1]
    assert together(second, nodes="1100") == [(1, 1), (1, 1), (1, 0), (1, 0)]


def test_no_trouble_with_a_new_memory_process_ends_training(together, monkeypatch):
    def body(rank, snapshots, model):
        save(rank, snapshots, model, 1)
        if rank == 0:
            monkeypatch.delenv("STOWPLAN_JOB_TOKEN")
            os.kill(snapshots.status().memory.pid, signal.SIGKILL)
        snapshots._agreement.gather(None)
        return [snapshots.save(step).skipped for step in (2, 3)]

    for first, second in together(body):
        assert "a memory process was lost" in first
        assert "no job token" in first or "token" in first
        assert "the exchange between nodes is not connected" in second


def test_what_one_group_gave_up_is_discarded_by_the_others_before_the_next(together):
    def body(rank, snapshots, model):
        save(rank, snapshots, model, 1)
        save(rank, snapshots, model, 2)
        if rank == 2:
            snapshots._memory.client.roll_back(1)  # node 1 alone has lost its second one
        snapshots._agreement.gather(None)
        model.weight.data.fill_(30 + rank)
        assert not snapshots.save(3).skipped
        assert snapshots.wait()
        own = next(each for each in snapshots.status().memory.ranks if each.rank == rank % 2)
        return sorted(slot.step for slot in own.slots)

    assert together(body) == [[1, 3]] * WORLD_SIZE
