"""A local rank's memory as the exchange sees it: one node of the group that is made of this rank on every host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from stowplan.core.errors import SnapshotPeerRefused, SnapshotRefused
from stowplan.runtime.snapshot.codes import crc32c
from stowplan.runtime.snapshot.exchange.node_store import Held
from stowplan.runtime.snapshot.memory.layout import Header, keep_table, kept_tables, num_chunks, read_table
from stowplan.runtime.snapshot.memory.rank_memory import Checksums, RankMemory
from stowplan.runtime.snapshot.memory.slots import Snapshot, State
from stowplan.runtime.snapshot.memory.store import Store

__all__ = ["RankStore"]


class RankStore:
    """``NodeStore`` over one rank of a ``Store``; blocks are the chunks that have a CRC (4 MiB)."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self.rank = store, rank

    @property
    def generation(self) -> int:
        """The newest that this node has been told of."""
        return self._store.generation

    def held(self) -> Sequence[Held]:
        """Slots that are not FREE; none where there is no memory."""
        with self._store.exclusive():
            if self.rank not in self._store.members():
                return []
            return [_held(slot, header) for slot, header in sorted(self._memory.headers.items())]

    def data(self, slot: int) -> memoryview:
        """The bytes of a slot's schema and payload."""
        memory, header = self._slot(slot)
        return memory.geometry.data_view(memory.region.view, slot, header.data_bytes)

    def parity(self, slot: int, num_bytes: int) -> memoryview:
        """The first bytes of the slot's parity. Raises InvalidArgument: fewer were reserved."""
        memory, _ = self._slot(slot)
        return memory.geometry.parity_view(memory.region.view, slot, num_bytes)

    def data_crcs(self, slot: int) -> Sequence[int] | None:
        """None where that table is damaged."""
        memory, header = self._slot(slot)
        count = num_chunks(header.data_bytes)
        return read_table(memory.region.view, memory.geometry, slot, 0, count, header.data_table_crc)

    def parity_crcs(self, slot: int) -> Sequence[int] | None:
        """None where that table is damaged, or not there."""
        memory, header = self._slot(slot)
        if header.state < State.PARITY:
            return None
        first, count = num_chunks(memory.geometry.data_capacity_bytes), num_chunks(header.parity_bytes)
        return read_table(memory.region.view, memory.geometry, slot, first, count, header.parity_table_crc)

    def tables(self, slot: int) -> Mapping[int, bytes]:
        """Other nodes' packed tables of this slot's snapshot, those that are whole."""
        memory, header = self._slot(slot)
        return kept_tables(memory.region.view, memory.geometry, slot, header.snapshot)

    def keep_table(self, slot: int, node: int, table: bytes) -> None:
        """Keep another node's packed table beside the slot. Raises InvalidArgument: it is too long."""
        memory, _ = self._slot(slot)
        keep_table(memory.region.view, memory.geometry, slot, node, table)

    def complete_parity(
        self, slot: int, snapshot: Snapshot, num_bytes: int, crcs: Sequence[int], received_bytes: int = 0
    ) -> None:
        """LOCAL becomes PARITY; of a later state the table is replaced."""
        with self._having(slot, snapshot) as memory:
            memory.times.received(snapshot.sequence, received_bytes)
            memory.make_parity(snapshot.sequence, num_bytes, Checksums(crcs), mending=True)

    def complete(self, slot: int, snapshot: Snapshot) -> None:
        """The slot becomes GLOBAL, if it is not."""
        with self._having(slot, snapshot) as memory:
            if memory.headers[slot].state < State.GLOBAL:
                self._store.commit_global(self.rank, snapshot)

    def give_up(self, slot: int, snapshot: Snapshot) -> None:
        """The slot becomes FREE, also from PARITY."""
        with self._having(slot, snapshot) as memory:
            memory.become(memory.slots.abandoned(snapshot.sequence, by_all=True))

    def rebuild(self, snapshot: Snapshot, data_bytes: int, schema_bytes: int, shares: tuple[int, ...]) -> int:
        """A slot, WRITING, for what was lost."""
        with self._store.exclusive():
            return self._memory.begin(snapshot, data_bytes, schema_bytes, shares, rebuilding=True)

    def complete_data(self, slot: int, snapshot: Snapshot, crcs: Sequence[int]) -> None:
        """WRITING becomes LOCAL; of a later state the table is replaced."""
        _, header = self._slot(slot)
        schema_crc = crc32c(self.data(slot)[: header.schema_bytes])
        with self._having(slot, snapshot) as memory:
            memory.make_local(snapshot.sequence, Checksums(crcs, schema_crc), mending=True)

    def roll_back(self, snapshot: Snapshot) -> None:
        """Newer slots of this rank become FREE."""
        with self._store.exclusive():
            self._memory.become(self._memory.slots.rolled_back(snapshot.sequence))

    @property
    def _memory(self) -> RankMemory:
        return self._store.memory(self.rank)

    def _slot(self, slot: int) -> tuple[RankMemory, Header]:
        with self._store.exclusive():
            memory = self._memory
            if slot not in memory.headers:
                raise SnapshotPeerRefused("absent", f"rank {self.rank}'s slot {slot} is FREE.")
            return memory, memory.headers[slot]

    @contextmanager
    def _having(self, slot: int, snapshot: Snapshot) -> Iterator[RankMemory]:
        with self._store.exclusive():
            memory, header = self._slot(slot)
            if header.snapshot != snapshot:
                raise SnapshotRefused("order", f"rank {self.rank}'s slot {slot} no longer has {snapshot}.")
            yield memory


def _held(slot: int, header: Header) -> Held:
    sizes = header.data_bytes, header.parity_bytes, header.schema_bytes
    return Held(slot, header.snapshot, header.state, *sizes, header.shares)
