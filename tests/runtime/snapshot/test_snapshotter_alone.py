"""A Snapshotter in a process of its own: what is saved, skipped, restored, and from where."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

import stowplan
from stowplan.core import host_memory
from stowplan.core.errors import InvalidArgument, UnrecoverableSnapshot
from stowplan.runtime.snapshot.memory import region as memory
from tests.runtime.snapshot.conftest import eventually
from tests.runtime.snapshot.trainings import NUM_STEPS, SNAPSHOT_AT, Training


@pytest.fixture
def snapshotter(monkeypatch):
    """Makes Snapshotters of one run; its memory process ends with the test."""
    made = []
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)

        def make(training, **options):
            state = training.state()
            parts = {name: getattr(state, name) for name in ("model", "optimizer", "scheduler", "scaler", "data")}
            parts["extras"] = state.extras
            made.append(stowplan.Snapshotter(**parts | {"run": "job-1", "idle_seconds": 60} | options))
            return made[-1]

        yield make
        for each in made:
            each.close()
        if made:
            kill(make(Training()))


def kill(snapshots):
    """End its memory process."""
    memory = snapshots.status().memory
    os.kill(memory.pid, signal.SIGKILL)
    eventually(lambda: snapshots.status().memory is None)


def saved(snapshots, training):
    """Save the training's step, and wait until it is complete."""
    said = snapshots.save(training.step)
    assert not said.skipped, said
    assert snapshots.wait()
    return said


def test_a_training_goes_on_to_the_last_bit(snapshotter):
    first = Training()
    with snapshotter(first) as snapshots:
        assert snapshots.restore() is None
        first.run(SNAPSHOT_AT)
        assert saved(snapshots, first).num_bytes > 1000
        losses, ended = first.run(NUM_STEPS), first.fingerprint()
    second = Training()
    with snapshotter(second) as snapshots:
        restored = snapshots.restore()
        assert (restored.step, restored.exact) == (SNAPSHOT_AT, True)
        second.step = restored.step
        assert second.run(NUM_STEPS) == losses
        assert second.fingerprint() == ended


def test_intervals_and_status(snapshotter):
    training = Training()
    training.run(1)
    snapshots = snapshotter(training, interval=2)
    assert snapshots.save(1).skipped == "not due"
    training.run(2)
    last = saved(snapshots, training)
    status = snapshots.status()
    assert (status.num_saved, status.num_skipped, status.last, status.disk) == (1, 0, last, None)
    assert (status.memory.global_sequence, status.memory.reduced) == (1, ())


def test_a_lost_memory_process_costs_one_snapshot(snapshotter):
    training = Training()
    training.run(1)
    snapshots = snapshotter(training)
    saved(snapshots, training)
    kill(snapshots)
    training.run(2)
    assert "memory process was lost" in snapshots.save(2).skipped
    training.run(3)
    saved(snapshots, training)
    assert {slot.step for slot in snapshots.status().memory.ranks[0].slots} == {1, 3}


def test_without_memory_the_copy_on_disk_is_restored(snapshotter, tmp_path):
    first = Training()
    first.run(SNAPSHOT_AT)
    snapshots = snapshotter(first, directory=tmp_path)
    saved(snapshots, first)
    eventually(lambda: snapshots.status().disk.last_step == SNAPSHOT_AT)
    losses = first.run(NUM_STEPS)
    kill(snapshots)
    snapshots.close()
    second = Training()
    restored = snapshotter(second, directory=tmp_path).restore()
    assert restored.step == second.step + SNAPSHOT_AT
    second.step = restored.step
    assert second.run(NUM_STEPS) == losses


def test_damage_that_nothing_can_mend_is_refused(snapshotter):
    training = Training()
    training.run(1)
    snapshots = snapshotter(training)
    saved(snapshots, training)
    _, payload = snapshots._memory.client.read(1)
    place = memoryview(snapshots._memory.client._region.view).obj
    place.seek(place.find(bytes(payload[:64])))
    place.write(b"damage")
    payload.release()
    snapshots.close()
    with pytest.raises(UnrecoverableSnapshot, match="one node alone has no parity"):
        snapshotter(Training()).restore()


def test_a_state_that_grew_is_reserved_anew(snapshotter):
    training = Training()
    training.run(1)
    notes = {"text": "short"}
    snapshots = snapshotter(training, extras=notes)
    saved(snapshots, training)
    notes["text"] = "long" * (1 << 20)
    assert saved(snapshots, training).num_bytes > 4 << 20


def test_a_state_for_which_there_is_no_room_keeps_the_snapshot_that_there_is(snapshotter, monkeypatch):
    training = Training()
    training.run(1)
    notes = {"text": "short"}
    snapshots = snapshotter(training, extras=notes)
    saved(snapshots, training)
    notes["text"] = "long" * (1 << 20)
    training.run(2)
    with monkeypatch.context() as scarce:
        scarce.setattr(host_memory, "available_bytes", lambda: 1 << 20)
        scarce.setattr(memory, "available_bytes", lambda: 1 << 20)
        assert "the state has outgrown its memory; snapshots" in snapshots.save(2).skipped
    assert [slot.step for slot in snapshots.status().memory.ranks[0].slots if slot.state] == [1]
    saved(snapshots, training)


def test_the_newer_of_memory_and_disk_is_restored_and_an_older_copy_where_the_newest_is_damaged(snapshotter, tmp_path):
    first = Training()
    snapshots = snapshotter(first, directory=tmp_path)
    for step in (1, 2):
        first.run(step)
        saved(snapshots, first)
        eventually(lambda step=step: snapshots.status().disk.last_step == step)
    snapshots._memory.client.roll_back(1)  # coding was given up, and the copy on disk was not
    snapshots.close()
    assert snapshotter(Training(), directory=tmp_path).restore().step == 2
    (content,) = (tmp_path / "step_000000000002").glob("*.distcp")
    content.write_bytes(bytes(len(content.read_bytes())))
    restored = snapshotter(Training(), directory=tmp_path).restore()
    assert restored.step == 1
    assert snapshots.generation > 1_700_000_000, "later than what any node may have slept through"


def test_what_cannot_be_is_refused(snapshotter, monkeypatch):
    for variable in ("STOWPLAN_RUN", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InvalidArgument, match="this run has no name"):
        snapshotter(Training(), run=None)
    for name in ("interval", "disk_interval"):
        with pytest.raises(InvalidArgument, match=f"{name}=0: give a whole number"):
            snapshotter(Training(), **{name: 0})
