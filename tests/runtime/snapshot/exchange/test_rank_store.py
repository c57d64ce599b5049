"""The memory of ranks in three memory processes, coded and recovered by the exchange between them."""

from __future__ import annotations

import asyncio
import os

import pytest

from stowplan.core.errors import InvalidArgument, SnapshotPeerRefused, SnapshotRefused
from stowplan.runtime.snapshot.codes import Layout, code_for
from stowplan.runtime.snapshot.exchange.exchange import Exchange, Verdict, member_of
from stowplan.runtime.snapshot.exchange.rank_store import RankStore
from stowplan.runtime.snapshot.exchange.recovery import recover
from stowplan.runtime.snapshot.memory.layout import CHUNK_BYTES, Coding, Geometry
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.runtime.snapshot.memory.slots import Snapshot, State
from stowplan.runtime.snapshot.memory.store import Store
from tests.runtime.snapshot.nodes import QUICK, TOKEN

NUM_NODES, DATA_BYTES, SCHEMA_BYTES = 3, 50_000, 300
CODE = code_for(NUM_NODES)
GEOMETRY = Geometry(DATA_BYTES, Layout(CODE, DATA_BYTES).parity_bytes, NUM_NODES)
FIRST, SECOND, THIRD = (Snapshot(0, sequence, 10 * sequence) for sequence in (1, 2, 3))


class Uncoded:
    """A coder that leaves everything to the test."""

    def code(self, store, rank, snapshot):
        pass


class Nodes:
    """Stores with an exchange each, in one event loop."""

    def __init__(self):
        self.stores = [self.empty(node) for node in range(NUM_NODES)]
        self.exchanges = []

    def empty(self, node, generation=0):
        store = Store("run", generation, 1, Uncoded())
        store.reserve(0, GEOMETRY, Coding(CODE.name, CODE.n, CODE.m, node))
        return store

    async def connect(self):
        await self.disconnect()
        for node, store in enumerate(self.stores):
            member = member_of("run", "rank-0", node, CODE, CHUNK_BYTES)
            self.exchanges.append(Exchange(member, CODE, RankStore(store, 0), TOKEN, QUICK))
        addresses = {node: await exchange.start("127.0.0.1") for node, exchange in enumerate(self.exchanges)}
        for exchange in self.exchanges:
            exchange.connect(addresses)

    async def disconnect(self):
        for exchange in self.exchanges:
            await exchange.close()
        self.exchanges = []

    def write(self, snapshot, nodes=range(NUM_NODES)):
        for node in nodes:
            store = self.stores[node]
            store.begin(0, snapshot, DATA_BYTES - node, SCHEMA_BYTES)
            store.memory(0).data(snapshot.sequence)[:] = content(snapshot, node)
            store.written(0, snapshot.sequence)
            assert store.wait(0, snapshot.sequence, State.LOCAL, 60) is State.LOCAL

    async def code(self, snapshot):
        return {outcome.verdict for outcome in await asyncio.gather(*(each.code(snapshot) for each in self.exchanges))}

    async def recover(self, generation, lost=()):
        for node in lost:
            self.stores[node].close()
            self.stores[node] = self.empty(node)
        for store in self.stores:
            store.raise_generation(generation)
        await self.connect()
        found = await asyncio.gather(*(recover(each, range(NUM_NODES)) for each in self.exchanges))
        assert len(set(found)) == 1
        return found[0]

    def check(self, snapshot):
        """All bytes, checksums and tables are there."""
        for node, store in enumerate(self.stores):
            assert store.data(0, snapshot) == content(snapshot, node)
            held = next(each for each in RankStore(store, 0).held() if each.snapshot == snapshot)
            assert (held.state, held.schema_bytes) == (State.GLOBAL, SCHEMA_BYTES)
            assert set(RankStore(store, 0).tables(held.slot)) == set(range(NUM_NODES)) - {node}
            assert not any(slot.damaged_data or slot.damaged_parity for slot in store.inspect(0))


def content(snapshot, node):
    return bytes((snapshot.sequence + 7 * node + 3 * index) % 251 for index in range(DATA_BYTES - node))


@pytest.fixture
def nodes():
    made = Nodes()
    yield made
    for store in made.stores:
        store.close()


def run(nodes, body):
    async def whole():
        await nodes.connect()
        try:
            await body()
        finally:
            await nodes.disconnect()

    asyncio.run(whole())


@pytest.mark.parametrize("lost", [(), (0,), (2,)])
def test_a_coded_snapshot_outlives_any_node(nodes, lost):
    async def body():
        for snapshot in (FIRST, SECOND):
            nodes.write(snapshot)
            assert await nodes.code(snapshot) == {Verdict.GLOBAL}
        assert (await nodes.recover(1, lost)).snapshot == SECOND
        nodes.check(SECOND)

    run(nodes, body)


def test_what_is_incomplete_gives_way_to_what_all_can_have(nodes):
    async def body():
        nodes.write(FIRST)
        assert await nodes.code(FIRST) == {Verdict.GLOBAL}
        nodes.write(SECOND, nodes=[0, 1])
        assert (await nodes.recover(1, lost=[2])).snapshot == FIRST
        nodes.check(FIRST)
        assert all(store.memory(0).slots.newest == 1 for store in nodes.stores)

    run(nodes, body)


def test_an_older_one_can_be_recovered_after_a_newer_one_was_discarded(nodes):
    async def body():
        for snapshot in (FIRST, SECOND):
            nodes.write(snapshot)
            assert await nodes.code(snapshot) == {Verdict.GLOBAL}
        assert (await nodes.recover(1, lost=[1])).snapshot == SECOND  # node 1 has this one only
        for store in nodes.stores:
            store.roll_back(1)
        again = (recover(each, range(NUM_NODES), attempt=1) for each in nodes.exchanges)
        assert {found.snapshot for found in await asyncio.gather(*again)} == {FIRST}
        nodes.check(FIRST)

    run(nodes, body)


def test_damage_is_computed_again(nodes):
    async def body():
        nodes.write(FIRST)
        assert await nodes.code(FIRST) == {Verdict.GLOBAL}
        memory = nodes.stores[1].memory(0)
        memory.region.view[GEOMETRY.data(0) + 999] ^= 4
        memory.region.view[GEOMETRY.table(0)] ^= 4
        assert nodes.stores[1].inspect(0)[0].damaged_data
        assert (await nodes.recover(1)).snapshot == FIRST
        nodes.check(FIRST)

    run(nodes, body)


def test_tables_of_others_are_adopted_with_the_memory(nodes):
    async def body():
        nodes.write(FIRST)
        assert await nodes.code(FIRST) == {Verdict.GLOBAL}

    run(nodes, body)
    memory = nodes.stores[0].memory(0)
    before = dict(RankStore(nodes.stores[0], 0).tables(0))
    new = Store("run", 0, 1, Uncoded())
    new.adopt(0, Region.received(os.dup(memory.region.descriptor)), GEOMETRY, memory.coding)
    assert set(before) == {1, 2}
    assert RankStore(new, 0).tables(0) == before
    new.close()


def test_parity_may_be_given_up_and_what_is_global_may_not(nodes):
    nodes.write(FIRST)
    store = RankStore(nodes.stores[0], 0)
    store.complete_parity(0, FIRST, 0, [])
    store.give_up(0, FIRST)
    assert not store.held()
    nodes.write(SECOND, [0])
    store.complete_parity(0, SECOND, 0, [])
    store.complete(0, SECOND)
    with pytest.raises(SnapshotRefused, match="GLOBAL"):
        store.give_up(0, SECOND)


def test_what_is_not_there_is_refused(nodes):
    store = RankStore(nodes.stores[0], 0)
    with pytest.raises(SnapshotPeerRefused, match="slot 0 is FREE"):
        store.data(0)
    nodes.write(FIRST)
    with pytest.raises(SnapshotRefused, match="no longer has snapshot 2"):
        store.complete(0, SECOND)
    with pytest.raises(InvalidArgument, match="does not fit"):
        store.keep_table(0, 1, bytes(GEOMETRY.kept_table_bytes + 1))
    assert RankStore(Store("run", 0, 1), 0).held() == []
