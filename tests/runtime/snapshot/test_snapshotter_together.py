"""Snapshotters of two nodes with two ranks each, as threads: what they do where groups have different snapshots."""

from __future__ import annotations

import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stowplan.runtime.snapshot import snapshotter as module
from stowplan.runtime.snapshot.layout import Geometry
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

    def run(function):
        def on_rank(rank):
            threads.ranks.rank = rank
            model = torch.nn.Linear(1, 1)
            with Snapshotter(model=model, run="job-1", node=f"node-{rank // 2}", idle_seconds=60) as snapshots:
                pids.add(snapshots.status().memory.pid)
                return function(rank, snapshots, model)

        with ThreadPoolExecutor(WORLD_SIZE) as pool:
            return list(pool.map(on_rank, range(WORLD_SIZE)))

    with tempfile.TemporaryDirectory(prefix="stow") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        yield run
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def save(rank, snapshots, model, step):
    model.weight.data.fill_(10 * step + rank)
    assert not snapshots.save(step).skipped
    assert snapshots.wait()
    snapshots._agreement.gather(None)  # all have waited


def damage(snapshots, sequence, area):
    """Flip a bit of a snapshot in memory."""
    client = snapshots._client
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


def test_what_one_group_gave_up_is_discarded_by_the_others_before_the_next(together):
    def body(rank, snapshots, model):
        save(rank, snapshots, model, 1)
        save(rank, snapshots, model, 2)
        if rank == 2:
            snapshots._client.roll_back(1)  # node 1 alone has lost its second one
        snapshots._agreement.gather(None)
        model.weight.data.fill_(30 + rank)
        assert not snapshots.save(3).skipped
        assert snapshots.wait()
        own = next(each for each in snapshots.status().memory.ranks if each.rank == rank % 2)
        return sorted(slot.step for slot in own.slots)

    assert together(body) == [[1, 3]] * WORLD_SIZE
