"""Coding of several local ranks, between two memory processes' stores in this process."""

from __future__ import annotations

import pytest

from stowplan.runtime.snapshot.codes import Layout, code_for
from stowplan.runtime.snapshot.exchange.authentication import TOKEN_VARIABLE
from stowplan.runtime.snapshot.exchange.group_coder import GroupCoder
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.memory.layout import Coding, Geometry
from stowplan.runtime.snapshot.memory.slots import Snapshot, State
from stowplan.runtime.snapshot.memory.store import Store

RUN, HOST, NUM_RANKS, NUM_BYTES = "job-1", "127.0.0.1", 6, 4096
CODE = code_for(2, 1, "mirror")
FIRST = Snapshot(0, 1, 10)
LIMITS = SnapshotLimits(deadline_seconds=10, poll_seconds=0.01)


@pytest.fixture
def nodes(monkeypatch):
    """The store and the coder of each of two nodes, whose ranks are LOCAL and have not met."""
    monkeypatch.setenv(TOKEN_VARIABLE, "a token of this job, not of others")
    made = []
    for node in range(CODE.n):
        coder = GroupCoder(RUN, HOST)
        store = Store(RUN, 0, NUM_RANKS, coder)
        made.append((store, coder))
        for rank in range(NUM_RANKS):
            parity_bytes = Layout(CODE, NUM_BYTES).parity_bytes
            store.reserve(rank, Geometry(NUM_BYTES, parity_bytes, CODE.n), Coding(CODE.name, CODE.n, CODE.m, node))
            store.begin(rank, FIRST, NUM_BYTES, 10)
            store.memory(rank).data(1)[:] = bytes([node, rank]) * (NUM_BYTES // 2)
            store.written(rank, 1)
            assert store.wait(rank, 1, State.LOCAL, 60) is State.LOCAL
    yield made
    for store, _ in made:
        store.roll_back(0)
        store.close()


def test_ranks_that_meet_in_different_orders_are_all_coded(nodes):
    addresses = {
        rank: {node: coder.listen(store, rank, LIMITS) for node, (store, coder) in enumerate(nodes)}
        for rank in range(NUM_RANKS)
    }
    orders = list(range(NUM_RANKS)), list(reversed(range(NUM_RANKS)))
    for (store, coder), order in zip(nodes, orders, strict=True):
        for rank in order:
            coder.meet(store, rank, addresses[rank])
    for store, _ in nodes:
        assert [store.wait(rank, 1, State.GLOBAL, 20) for rank in range(NUM_RANKS)] == [State.GLOBAL] * NUM_RANKS
