"""Groups of nodes in one event loop, with plain memory, real connections, and proxies that do harm."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import numpy as np

from stowplan.core.errors import SnapshotPeerRefused
from stowplan.runtime.snapshot.codes import Layout, code_for, encode
from stowplan.runtime.snapshot.exchange.authentication import JobToken
from stowplan.runtime.snapshot.exchange.exchange import Exchange, member_of
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.exchange.node_store import Held, block_crcs, find
from stowplan.runtime.snapshot.exchange.recovery import recover
from stowplan.runtime.snapshot.memory.slots import Snapshot, State

TOKEN = JobToken(b"a token of this job, not of others")
BLOCK_BYTES = 4096
CODES = [("mirror", 1), ("raim5", 1), ("rs", 2)]
QUICK = SnapshotLimits(
    deadline_seconds=100, recovery_seconds=100, timeout_seconds=5, poll_seconds=0.003, most_backoff_seconds=0.05
)


class MemoryStore:
    """Two slots in bytearrays; a table that ``damaged`` names counts as one with a wrong CRC."""

    def __init__(self, block_bytes=BLOCK_BYTES, generation=1):
        self.block_bytes, self.generation = block_bytes, generation
        self.slots = [None, None]
        self.bytes = [{"data": bytearray(), "parity": bytearray()} for _ in self.slots]
        self.crcs = [{"data": None, "parity": None} for _ in self.slots]
        self.others = [{}, {}]
        self.received_bytes = 0  # for the last parity

    def commit(self, snapshot, content, shares=()):
        """What a trainer does: the older slot becomes LOCAL with these bytes."""
        slot = self.rebuild(snapshot, len(content), shares=shares)
        self.data(slot)[:] = content
        self.complete_data(slot, snapshot, block_crcs(memoryview(content), self.block_bytes))
        return slot

    def held(self):
        return [held for held in self.slots if held]

    def data(self, slot):
        return memoryview(self.bytes[slot]["data"])

    def parity(self, slot, num_bytes):
        area = self.bytes[slot]["parity"]
        if len(area) < num_bytes:
            area = self.bytes[slot]["parity"] = bytearray(b"\xa5" * num_bytes)
        return memoryview(area)[:num_bytes]

    def data_crcs(self, slot):
        return self.crcs[slot]["data"]

    def parity_crcs(self, slot):
        return self.crcs[slot]["parity"]

    def tables(self, slot):
        return self.others[slot]

    def keep_table(self, slot, node, table):
        self.others[slot][node] = table

    def _change(self, slot, snapshot, **changes):
        held = self.slots[slot]
        if held is None or held.snapshot != snapshot:
            raise SnapshotPeerRefused("absent", f"{snapshot} is not in slot {slot}")
        self.slots[slot] = replace(held, **changes)

    def complete_parity(self, slot, snapshot, num_bytes, crcs, received_bytes=0):
        state = max(self.slots[slot].state, State.PARITY)
        self._change(slot, snapshot, state=state, parity_bytes=num_bytes)
        self.received_bytes = received_bytes
        self.crcs[slot]["parity"] = list(crcs)

    def complete(self, slot, snapshot):
        assert self.slots[slot].state >= State.PARITY
        self._change(slot, snapshot, state=State.GLOBAL)

    def give_up(self, slot, snapshot):
        self._change(slot, snapshot)
        assert self.slots[slot].state < State.GLOBAL
        self.slots[slot] = None

    def rebuild(self, snapshot, data_bytes, schema_bytes=0, shares=()):
        def order(slot):
            held = self.slots[slot]
            if held is None:
                return (0, 0)
            return (0, 0) if held.snapshot >= snapshot or held.state < State.LOCAL else (1, held.snapshot.sequence)

        slot = min((0, 1), key=order)
        self.slots[slot] = Held(slot, snapshot, State.WRITING, data_bytes, schema_bytes=schema_bytes, shares=shares)
        self.bytes[slot]["data"] = bytearray(b"\x5a" * data_bytes)
        self.crcs[slot] = {"data": None, "parity": None}
        self.others[slot] = {}
        return slot

    def complete_data(self, slot, snapshot, crcs):
        self._change(slot, snapshot, state=max(self.slots[slot].state, State.LOCAL))
        self.crcs[slot]["data"] = list(crcs)

    def roll_back(self, snapshot):
        self.slots = [held if held and held.snapshot <= snapshot else None for held in self.slots]


class Proxy:
    """Passes bytes on between whoever connects and ``target``; ``harm(number, towards_server, bytes)`` may change them.

    ``number`` counts bytes passed in that direction over all connections; None ends the connection.
    """

    def __init__(self, target, harm):
        self.target, self.harm, self.passed, self.connections = target, harm, [0, 0], 0

    async def start(self):
        self.server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[:2]

    async def _connected(self, reader, writer):
        self.connections += 1
        try:
            there = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        flows = [self._pass(reader, there[1], 1), self._pass(there[0], writer, 0)]
        tasks = [asyncio.ensure_future(flow) for flow in flows]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            writer.transport.abort()
            there[1].transport.abort()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass(self, reader, writer, towards_server):
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(1 << 14):
                at, self.passed[towards_server] = self.passed[towards_server], self.passed[towards_server] + len(chunk)
                changed = self.harm(at, towards_server, chunk)
                if changed is None:
                    return
                writer.write(changed)
                await writer.drain()


class Group:
    """Nodes with the given sizes; ``harms`` is {(asking node, asked node): harm}.

    ``shares``: of each node, behind these; copies of the shares of nodes before it follow.
    """

    def __init__(self, name, sizes, limits=QUICK, block_bytes=BLOCK_BYTES, harms=None, seed=0, shares=()):
        n = len(sizes)
        self.sizes, self.limits, self.block_bytes, self.harms = sizes, limits, block_bytes, harms or {}
        self.code = code_for(n, 2 if name == "rs" else 1, name)
        self.owned = [[(i - behind) % n for behind in range(self.code.m + 1)] if shares else [] for i in range(n)]
        self.shares = [tuple(shares[owner] for owner in owned) for owned in self.owned]
        self.seed = seed
        self.stores = [MemoryStore(block_bytes) for _ in sizes]
        self.nodes, self.proxies, self.addresses = {}, {}, {}

    async def __aenter__(self):
        for node in range(len(self.sizes)):
            await self.launch(node)
        await self.connect()
        return self

    async def __aexit__(self, *error):
        for node in list(self.nodes):
            await self.kill(node)
        for proxy in self.proxies.values():
            proxy.server.close()

    async def launch(self, place, token=TOKEN, limits=None, **member):
        member = replace(member_of("run", "group", place, self.code, self.block_bytes), **member)
        self.nodes[place] = Exchange(member, self.code, self.stores[place], token, limits or self.limits)
        self.addresses[place] = await self.nodes[place].start("127.0.0.1")

    async def connect(self):
        for asking, asked in self.harms:
            if (asking, asked) not in self.proxies and asked in self.addresses:
                proxy = self.proxies[asking, asked] = Proxy(self.addresses[asked], self.harms[asking, asked])
                proxy.address = await proxy.start()
        for asking, node in self.nodes.items():
            node.connect(
                {
                    asked: self.proxies[asking, asked].address if (asking, asked) in self.proxies else address
                    for asked, address in self.addresses.items()
                }
            )

    def set_limits(self, limits):
        for node in self.nodes.values():
            node.limits = limits

    async def kill(self, node):
        await self.nodes.pop(node).close()

    def content(self, snapshot, node):
        def made(size, *seed):
            random = np.random.default_rng([self.seed, snapshot.sequence, *seed])
            return random.integers(0, 256, size, dtype=np.uint8).tobytes()

        parts = zip(self.shares[node], self.owned[node], strict=True)
        return made(self.sizes[node], node) + b"".join(made(size, owner, 1) for size, owner in parts)

    def commit(self, snapshot, nodes=None):
        for node in self.nodes if nodes is None else nodes:
            self.stores[node].commit(snapshot, self.content(snapshot, node), self.shares[node])

    @property
    def layout(self):
        sizes = [size + sum(own) for size, own in zip(self.sizes, self.shares, strict=True)]
        return Layout(self.code, sizes, self.shares)

    async def code_all(self, snapshot, nodes=None):
        chosen = list(self.nodes if nodes is None else nodes)
        found = await asyncio.gather(*(self.nodes[node].code(snapshot) for node in chosen))
        return dict(zip(chosen, found, strict=True))

    async def restart(self, lost=(), generation=2):
        """The job starts again, with empty memory in place of lost nodes."""
        for node in list(self.nodes):
            await self.kill(node)
        for node in range(len(self.sizes)):
            if node in lost:
                self.stores[node] = MemoryStore(self.block_bytes)
            self.stores[node].generation = generation
            await self.launch(node)
        for proxy in self.proxies.values():
            proxy.server.close()
        self.proxies = {}
        await self.connect()

    async def recover_all(self, nodes=None, **options):
        """Outcome of each: Restored, or the error."""
        chosen = list(self.nodes if nodes is None else nodes)
        return await asyncio.gather(
            *(recover(self.nodes[node], chosen, **options) for node in chosen), return_exceptions=True
        )

    def check(self, snapshot, nodes=None):
        """All bytes are as they were committed, and parity is what the code says."""
        data = {node: self.content(snapshot, node) for node in range(len(self.sizes))}
        layout = self.layout
        parity = {node: bytearray(layout.parity_bytes) for node in data}
        encode(layout, data, parity)
        for node in data if nodes is None else nodes:
            store = self.stores[node]
            held = find(store, snapshot, State.GLOBAL)
            assert held is not None, (node, store.slots)
            assert held.shares == self.shares[node]
            assert bytes(store.data(held.slot)) == data[node]
            assert bytes(store.parity(held.slot, layout.parity_bytes)) == parity[node]
            assert store.data_crcs(held.slot) == block_crcs(memoryview(data[node]), self.block_bytes)
            assert store.parity_crcs(held.slot) == block_crcs(memoryview(parity[node]), self.block_bytes)
            assert set(store.tables(held.slot)) == set(data) - {node}


def snapshot_id(sequence, generation=1):
    return Snapshot(generation, sequence, 10 * sequence)
