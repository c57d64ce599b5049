"""What a memory process holds: the way of a snapshot through its states, barriers between ranks, seams for codes."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest

from stowplan.core.errors import InvalidArgument, SnapshotRefused
from stowplan.runtime.snapshot.memory.layout import CHUNK_BYTES, Coding, Geometry, damage, read_header, write_header
from stowplan.runtime.snapshot.memory.messages import Begun, Skipped
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.runtime.snapshot.memory.slots import Snapshot, State
from stowplan.runtime.snapshot.memory.store import Store
from tests.runtime.snapshot.conftest import eventually

RUN = "job-1"
GEOMETRY = Geometry(CHUNK_BYTES + 500, 1000, 3)
CODING = Coding("raim5", 3, 1, 2)
DATA_BYTES, SCHEMA_BYTES, PARITY_BYTES = CHUNK_BYTES + 100, 20, 700
FIRST, SECOND, THIRD = (Snapshot(0, sequence, 10 * sequence) for sequence in (1, 2, 3))


class Recorder:
    """A coder that does nothing until the test does."""

    def __init__(self):
        self.called = []
        self.change = threading.Condition()

    def code(self, store, rank, snapshot):
        with self.change:
            self.called.append((rank, snapshot))
            self.change.notify_all()

    def until(self, number):
        with self.change:
            assert self.change.wait_for(lambda: len(self.called) >= number, 60)
        return self.called


@pytest.fixture
def stores():
    made = []

    def make(num_ranks=1, coder=None, reserved=True, generation=0):
        store = Store(RUN, generation, num_ranks, coder)
        made.append(store)
        for rank in range(num_ranks if reserved else 0):
            store.reserve(rank, GEOMETRY, CODING)
        return store

    yield make
    for store in made:
        store.close()


def content(snapshot, rank=0):
    return bytes([snapshot.sequence + rank]) * DATA_BYTES


def written(store, snapshot, rank=0, state=State.LOCAL):
    assert isinstance(store.begin(rank, snapshot, DATA_BYTES, SCHEMA_BYTES), Begun)
    memory = store.memory(rank)
    memory.data(snapshot.sequence)[:] = content(snapshot, rank)
    store.written(rank, snapshot.sequence)
    assert store.wait(rank, snapshot.sequence, state, 60) >= state


def coded(store, snapshot, rank=0):
    store.parity(rank, snapshot, PARITY_BYTES)[:] = b"p" * PARITY_BYTES
    store.commit_parity(rank, snapshot, PARITY_BYTES)


def handed_over(store, stores, rank=0, **options):
    """A new store that has adopted the memory of another."""
    region = Region.received(os.dup(store.memory(rank).region.descriptor))
    new = stores(reserved=False, **options)
    new.adopt(rank, region, GEOMETRY, CODING)
    return new


def verified(store):
    store.inspect(0)
    return store.reduced()


# ---- one rank ------------------------------------------------------------------------------------------------------
def test_headers_say_what_the_states_are(stores):
    store = stores(coder=Recorder())
    memory = store.memory(0)
    store.begin(0, FIRST, DATA_BYTES, SCHEMA_BYTES)
    assert read_header(memory.region.view, 0).state is State.WRITING
    memory.data(1)[:] = content(FIRST)
    with store.exclusive():
        store.written(0, 1)
        store.written(0, 1)  # told twice
    assert store.wait(0, 1, State.LOCAL, 60) is State.LOCAL
    coded(store, FIRST)
    store.commit_global(0, FIRST)
    header = read_header(memory.region.view, 0)
    assert (header.state, header.snapshot, header.run, header.coding) == (State.GLOBAL, FIRST, RUN, CODING)
    assert (header.data_bytes, header.schema_bytes, header.parity_bytes) == (DATA_BYTES, SCHEMA_BYTES, PARITY_BYTES)
    assert not damage(memory.region.view, 0, header)
    memory.region.view[GEOMETRY.data(0) + CHUNK_BYTES] ^= 1
    memory.region.view[GEOMETRY.parity(0)] ^= 1
    status = store.inspect(0)[0]
    assert status.damaged_data == ((CHUNK_BYTES, 100),)
    assert status.damaged_parity == ((0, PARITY_BYTES),)
    assert store.reduced() == (f"rank 0: {FIRST} is damaged",)


def test_late_codes_skip_snapshots(stores):
    coder = Recorder()
    store = stores(coder=coder)
    written(store, FIRST)
    assert coder.until(1) == [(0, FIRST)]
    assert store.begin(0, SECOND, DATA_BYTES, SCHEMA_BYTES) == Skipped(1, State.LOCAL)
    coded(store, FIRST)
    assert store.begin(0, SECOND, DATA_BYTES, SCHEMA_BYTES) == Skipped(1, State.PARITY)
    store.commit_global(0, FIRST)
    assert store.begin(0, THIRD, DATA_BYTES, SCHEMA_BYTES) == Begun(1)
    assert store.data(0, FIRST) == content(FIRST)


def test_what_was_given_up_is_not_completed(stores):
    store = stores(coder=Recorder())
    store.begin(0, FIRST, DATA_BYTES, SCHEMA_BYTES)
    with store.exclusive():  # the checksums wait for this
        store.written(0, 1)
        store.abandon(0, 1)
        assert store.begin(0, SECOND, DATA_BYTES, SCHEMA_BYTES) == Begun(0)
    assert store.wait(0, 2, State.LOCAL, 0.2) is State.WRITING
    for call in (store.commit_parity, store.commit_global, store.data):
        with pytest.raises(SnapshotRefused):
            call(0, FIRST)


def test_a_writer_that_is_gone_leaves_what_it_had_written_to_the_end(stores):
    store = stores()
    written(store, FIRST, state=State.GLOBAL)
    store.begin(0, SECOND, DATA_BYTES, SCHEMA_BYTES)
    store.abandon_unwritten(0)
    assert store.wait(0, 2, State.LOCAL, 0) is State.FREE
    assert store.holds(0, FIRST, State.GLOBAL)
    with store.exclusive():
        store.begin(0, THIRD, DATA_BYTES, SCHEMA_BYTES)
        store.written(0, 3)
        store.abandon_unwritten(0)
    assert store.wait(0, 3, State.GLOBAL, 60) is State.GLOBAL


def test_waiting_has_an_end(stores):
    store = stores(coder=Recorder())
    written(store, FIRST)
    assert store.wait(0, 1, State.GLOBAL, 0.01) is State.LOCAL
    threading.Timer(0.05, store.roll_back, (0,)).start()
    assert store.wait(0, 1, State.GLOBAL, 60) is State.FREE
    assert store.wait(0, 9, State.LOCAL, 60) is State.FREE


@pytest.mark.parametrize(("data", "schema"), [(0, 0), (10, 0), (10, 11), (GEOMETRY.data_capacity_bytes + 1, 1)])
def test_sizes_have_to_fit(stores, data, schema):
    store = stores()
    with pytest.raises((SnapshotRefused, InvalidArgument)):
        store.begin(0, FIRST, data, schema)
    assert store.begin(0, FIRST, GEOMETRY.data_capacity_bytes, 1) == Begun(0)


# ---- barriers between ranks ----------------------------------------------------------------------------------------
def test_on_one_node_a_snapshot_is_global_when_all_ranks_have_it(stores):
    store = stores(num_ranks=2)
    written(store, FIRST, 0)
    assert store.wait(0, 1, State.GLOBAL, 0.05) is State.LOCAL
    assert store.global_sequence() == 0
    assert store.reduced() == ("no snapshot is GLOBAL on all ranks",)
    written(store, FIRST, 1, State.GLOBAL)
    assert store.wait(0, 1, State.GLOBAL, 60) is State.GLOBAL
    assert (store.global_sequence(), store.reduced()) == (1, ())


def test_ranks_without_memory_hold_everyone_up(stores):
    store = stores(num_ranks=2, reserved=False)
    store.reserve(0, GEOMETRY, CODING)
    written(store, FIRST, 0)
    assert store.wait(0, 1, State.GLOBAL, 0.05) is State.LOCAL
    assert store.reduced() == ("rank 1 has no memory here",)
    with pytest.raises(SnapshotRefused, match="serves 2 ranks"):
        store.reserve(2, GEOMETRY, CODING)


# ---- restarts ------------------------------------------------------------------------------------------------------
def test_a_new_generation_fences_and_a_roll_back_brings_what_is_restored_on_its_way(stores):
    coder = Recorder()
    store = stores(coder=coder)
    written(store, FIRST)
    coder.until(1)
    store.raise_generation(2)
    with pytest.raises(SnapshotRefused, match="is stale"):
        store.begin(0, SECOND, DATA_BYTES, SCHEMA_BYTES)
    store.roll_back(1)
    assert coder.until(2)[1] == (0, FIRST)
    coded(store, FIRST)
    store.commit_global(0, FIRST)
    assert store.begin(0, replace(SECOND, generation=2), DATA_BYTES, SCHEMA_BYTES) == Begun(1)
    store.raise_generation(3)
    assert store.wait(0, 2, State.LOCAL, 0) is State.FREE
    assert read_header(store.memory(0).region.view, 1) is None
    store.roll_back(0)
    assert read_header(store.memory(0).region.view, 0) is None


def test_memory_is_reserved_again_only_where_nothing_is_in_it(stores):
    store = stores()
    memory = store.memory(0)
    assert store.reserve(0, GEOMETRY, CODING) is memory
    written(store, FIRST)
    with pytest.raises(SnapshotRefused, match="roll back to 0"):
        store.reserve(0, Geometry(5), CODING)
    store.roll_back(0)
    assert store.reserve(0, Geometry(5), CODING) is not memory


# ---- adoption ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", [State.LOCAL, State.PARITY, State.GLOBAL])
def test_adopted_memory_is_as_it_was_and_coding_goes_on(stores, state):
    store = stores(coder=Recorder(), generation=4)
    first, second = (replace(each, generation=4) for each in (FIRST, SECOND))
    written(store, first)
    if state >= State.PARITY:
        coded(store, first)
    if state is State.GLOBAL:
        store.commit_global(0, first)
        store.begin(0, second, DATA_BYTES, SCHEMA_BYTES)
    coder = Recorder()
    new = handed_over(store, stores, coder=coder)
    assert new.holds(0, first, state)
    assert new.wait(0, 2, State.LOCAL, 0) is State.FREE
    assert new.generation == 4
    assert new.data(0, first) == content(first)
    assert verified(new) == (() if state is State.GLOBAL else ("no snapshot is GLOBAL on all ranks",))
    if state < State.GLOBAL:
        assert coder.until(1) == [(0, first)]
    with pytest.raises(SnapshotRefused, match="has memory in this process already"):
        new.adopt(0, Region.received(os.dup(store.memory(0).region.descriptor)), GEOMETRY, CODING)


def test_memory_of_another_run_or_shape_is_not_adopted(stores):
    store = stores()
    written(store, FIRST)
    new = stores(reserved=False)
    for geometry, coding in ((Geometry(5), CODING), (replace(GEOMETRY, parity_capacity_bytes=999), CODING),
                             (GEOMETRY, Coding())):  # fmt: skip
        region = Region.received(os.dup(store.memory(0).region.descriptor))
        with pytest.raises(SnapshotRefused) as raised:
            new.adopt(0, region, geometry, coding)
        assert raised.value.reason == "size"
        region.close()
    view = store.memory(0).region.view
    write_header(view, 0, replace(read_header(view, 0), run="another"))
    region = Region.received(os.dup(store.memory(0).region.descriptor))
    with pytest.raises(SnapshotRefused, match="is of run 'another'"):
        new.adopt(0, region, GEOMETRY, CODING)
    region.close()


def test_a_damaged_header_is_mended_by_who_knows_it(stores):
    store = stores()
    written(store, FIRST, state=State.GLOBAL)
    view = store.memory(0).region.view
    known = read_header(view, 0)
    for place in range(0, 4096, 512):
        view[place + 20] ^= 1
    assert read_header(view, 0) is None
    store.inspect(0)
    assert replace(read_header(view, 0), revision=known.revision) == known


# ---- what codes need -----------------------------------------------------------------------------------------------
def test_a_coder_that_fails_is_told_until_a_snapshot_is_global(stores):
    class Failing(Recorder):
        def code(self, store, rank, snapshot):
            super().code(store, rank, snapshot)
            raise OSError("no route to node 3")

    store = stores(coder=Failing())
    written(store, FIRST)
    eventually(lambda: "rank 0: OSError: no route to node 3" in store.reduced())
    store.commit_parity(0, FIRST)
    store.commit_global(0, FIRST)
    assert store.reduced() == ()


def test_what_waits_to_be_coded_is_not_told_twice(stores):
    class Slow(Recorder):
        def __init__(self):
            super().__init__()
            self.go_on = threading.Event()

        def code(self, store, rank, snapshot):
            super().code(store, rank, snapshot)
            self.go_on.wait(60)

    coder = Slow()
    store = stores(num_ranks=2, coder=coder)
    written(store, FIRST, 0)
    coder.until(1)
    for _ in range(5):
        store.resume(0)
    written(store, FIRST, 1)
    assert coder.until(2) == [(0, FIRST), (1, FIRST)], "others are coded meanwhile"
    coder.go_on.set()
    coder.until(3)
    store.roll_back(0)
    written(store, SECOND, 0)
    assert coder.until(4)[2:] == [(0, FIRST), (0, SECOND)], "once more, as what held it up may be gone"


def test_what_cannot_be_completed_is_given_up(stores, monkeypatch):
    store = stores(coder=Recorder())

    def failing(*_):
        raise MemoryError("no room for a table")

    monkeypatch.setattr("stowplan.runtime.snapshot.memory.store.chunk_crcs", failing)
    store.begin(0, FIRST, DATA_BYTES, SCHEMA_BYTES)
    store.written(0, 1)
    assert store.wait(0, 1, State.LOCAL, 5) is State.FREE
    eventually(lambda: "rank 0: MemoryError: no room for a table" in store.reduced())
    monkeypatch.undo()
    written(store, SECOND)


def test_what_cannot_be_begun_to_be_completed_is_given_up(stores, monkeypatch):
    store = stores(coder=Recorder())

    def failing(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(store._checkers, "submit", failing)
    store.begin(0, FIRST, DATA_BYTES, SCHEMA_BYTES)
    store.written(0, 1)
    assert store.wait(0, 1, State.LOCAL, 5) is State.FREE
    assert "rank 0: RuntimeError: can't start new thread" in store.reduced()
    monkeypatch.undo()
    written(store, SECOND)
