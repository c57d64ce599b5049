"""One local rank's memory and the states of its slots, kept in step: headers say what the logic allows.

Methods change one rank and do not wait; ``Store`` calls them one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stowplan.core.errors import SnapshotRefused
from stowplan.runtime.snapshot.fail_points import fail_at
from stowplan.runtime.snapshot.memory.layout import (
    NUM_SLOTS,
    Coding,
    Damage,
    Geometry,
    Header,
    invalidate,
    num_chunks,
    read_header,
    write_header,
    write_table,
)
from stowplan.runtime.snapshot.memory.messages import RankStatus, SlotStatus
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.runtime.snapshot.memory.slots import Slot, Slots, Snapshot, State

__all__ = ["Checksums", "RankMemory", "Times"]


@dataclass(frozen=True, slots=True)
class Checksums:
    """Of a slot's data, or with no ``schema_crc`` of its parity."""

    chunks: Sequence[int]
    schema_crc: int = 0


@dataclass(eq=False)
class Times:
    """How long the last complete snapshot took, from its beginning until it was written, and until it was GLOBAL.

    And how many bytes came from other nodes for its parity.
    """

    last_blocking_seconds: float | None = None
    last_total_seconds: float | None = None
    last_received_bytes: int | None = None
    _sequence: int = 0  # of the snapshot that is on its way
    _began: float = 0.0
    _blocking_seconds: float = 0.0
    _received_bytes: int = 0

    def begin(self, sequence: int) -> None:
        """The trainer may write now."""
        self._sequence, self._began, self._received_bytes = sequence, time.monotonic(), 0

    def written(self, sequence: int) -> None:
        """The trainer goes on training."""
        if sequence == self._sequence:
            self._blocking_seconds = time.monotonic() - self._began

    def received(self, sequence: int, num_bytes: int) -> None:
        """From other nodes."""
        if sequence == self._sequence:
            self._received_bytes = num_bytes

    def complete(self, sequence: int) -> None:
        """It is GLOBAL."""
        if sequence == self._sequence:
            self.last_blocking_seconds = self._blocking_seconds
            self.last_total_seconds = time.monotonic() - self._began
            self.last_received_bytes = self._received_bytes


@dataclass(eq=False)
class RankMemory:
    """``slots`` is what the logic of states says; each change is written into the headers first."""

    run: str
    rank: int
    region: Region
    geometry: Geometry
    coding: Coding
    slots: Slots
    times: Times = field(default_factory=Times)
    headers: dict[int, Header] = field(default_factory=dict)  # by slot, of those that are not FREE
    damaged: dict[int, Damage] = field(default_factory=dict)  # by slot, of those that were looked at

    @classmethod
    def adopted(
        cls, run: str, rank: int, region: Region, geometry: Geometry, coding: Coding, generation: int
    ) -> RankMemory:
        """Memory that a former memory process gave: what its headers say, less what was being written.

        The generation is the newest of ``generation`` and the headers. Raises SnapshotRefused: "size" for another
        geometry or code, "run" for another run's memory.
        """
        if region.num_bytes != geometry.total_bytes:
            raise SnapshotRefused(
                "size",
                f"rank {rank}'s memory has {region.num_bytes} bytes, and with these sizes it would have "
                f"{geometry.total_bytes}: send the sizes that it was reserved with.",
            )
        headers = [read_header(region.view, slot) for slot in range(NUM_SLOTS)]
        for header in filter(None, headers):
            if header.run != run:
                raise SnapshotRefused("run", f"rank {rank}'s memory is of run {header.run!r}, and this is {run!r}.")
            if (header.geometry, header.coding) != (geometry, coding):
                raise SnapshotRefused("size", f"rank {rank}'s memory has {header.geometry} and {header.coding}.")
        found = tuple(header.slot if header else Slot() for header in headers)
        newest = max([generation, *(slot.snapshot.generation for slot in found if slot.snapshot)])
        known = {slot: header for slot, header in enumerate(headers) if header}
        memory = cls(run, rank, region, geometry, coding, Slots(found, newest), headers=known)
        memory.become(memory.slots.survived())
        return memory

    def become(self, slots: Slots) -> None:
        """Take a next state in which slots may have become FREE, and nothing else changed but the generation."""
        for index, (now, then) in enumerate(zip(self.slots.slots, slots.slots, strict=True)):
            if now != then:
                assert then.state is State.FREE
                self._free(index)
        self.slots = slots

    def header(self, sequence: int) -> tuple[int, Header]:
        """The slot of a snapshot, and its header."""
        index = self.slots.find(sequence)
        return index, self.headers[index]

    def begin(
        self,
        snapshot: Snapshot,
        data_bytes: int,
        schema_bytes: int,
        shares: tuple[int, ...] = (),
        *,
        kept: int = 0,
        rebuilding: bool = False,
    ) -> int:
        """The slot that the snapshot may be written into; what it held is invalid from now on, but never ``kept``."""
        self.geometry.data_view(self.region.view, 0, data_bytes)  # raises for what does not fit
        if not 0 < schema_bytes <= data_bytes:
            raise SnapshotRefused("size", f"a schema of {schema_bytes} bytes cannot begin {data_bytes} bytes of data.")
        counted = not shares or (len(shares) == self.coding.m + 1 and min(shares) >= 0)
        if not counted or sum(shares) > data_bytes - schema_bytes:
            raise SnapshotRefused(
                "size",
                f"shares of {shares} bytes do not end {data_bytes} bytes of data, {schema_bytes} of them schema: there "
                f"are {self.coding.m + 1}, or none.",
            )
        slots, index = self.slots.rebuilding(snapshot) if rebuilding else self.slots.begun(snapshot, kept)
        for other, (now, then) in enumerate(zip(self.slots.slots, slots.slots, strict=True)):
            if now != then:
                self._free(other)
        self.headers[index] = Header(
            self.run, State.WRITING, snapshot, self.geometry, data_bytes, schema_bytes, shares=shares,
            coding=self.coding,
        )  # fmt: skip
        write_header(self.region.view, index, self.headers[index])
        self.slots = slots
        self.times.begin(0 if rebuilding else snapshot.sequence)
        return index

    def data(self, sequence: int) -> memoryview:
        """A snapshot's bytes, schema first."""
        index, header = self.header(sequence)
        return self.geometry.data_view(self.region.view, index, header.data_bytes)

    def parity(self, sequence: int, num_bytes: int) -> memoryview:
        """The first bytes for a snapshot's parity."""
        return self.geometry.parity_view(self.region.view, self.slots.find(sequence), num_bytes)

    def make_local(self, sequence: int, sums: Checksums, *, mending: bool = False) -> None:
        """WRITING → LOCAL; ``mending``: of a later state the table is replaced, and the state stays."""
        slots = self._advanced(sequence, State.LOCAL, mending)
        index, header = self.header(sequence)
        crc = write_table(self.region.view, self.geometry, index, 0, sums.chunks)
        state = max(header.state, State.LOCAL)
        fail_at("local")
        changed = replace(header, state=state, data_table_crc=crc, schema_crc=sums.schema_crc)
        self._commit(index, changed, slots)

    def make_parity(self, sequence: int, parity_bytes: int, sums: Checksums, *, mending: bool = False) -> None:
        """LOCAL → PARITY: so many bytes of parity are there; ``mending`` as in ``make_local``."""
        slots = self._advanced(sequence, State.PARITY, mending)
        index, header = self.header(sequence)
        first = num_chunks(self.geometry.data_capacity_bytes)
        crc = write_table(self.region.view, self.geometry, index, first, sums.chunks)
        state = max(header.state, State.PARITY)
        fail_at("parity")
        changed = replace(header, state=state, parity_bytes=parity_bytes, parity_table_crc=crc)
        self._commit(index, changed, slots)

    def make_global(self, sequence: int) -> None:
        """PARITY → GLOBAL."""
        slots = self.slots.advanced(sequence, State.GLOBAL)
        index, header = self.header(sequence)
        fail_at("global")
        self._commit(index, replace(header, state=State.GLOBAL), slots)
        self.times.complete(sequence)

    def mend_header(self, index: int) -> bool:
        """Write a slot's header anew if what is in memory is not what it is known to be; whether that was so."""
        held, known = read_header(self.region.view, index), self.headers.get(index)
        if known is None or (held is not None and replace(held, revision=known.revision) == known):
            return False
        write_header(self.region.view, index, known)
        return True

    def slot_status(self, index: int) -> SlotStatus:
        """For messages."""
        slot = self.slots.slots[index]
        if slot.snapshot is None:
            return SlotStatus(State.FREE)
        header = self.headers[index]
        found = self.damaged.get(index, Damage())
        return SlotStatus(
            slot.state, slot.sequence, slot.snapshot.step, slot.snapshot.generation, header.data_bytes,
            header.schema_bytes, header.parity_bytes, found.data, found.parity,
        )  # fmt: skip

    def status(self, writer_pid: int | None) -> RankStatus:
        """For messages."""
        slots = tuple(self.slot_status(index) for index in range(NUM_SLOTS))
        capacities = self.geometry.data_capacity_bytes, self.geometry.parity_capacity_bytes
        seconds = self.times.last_blocking_seconds, self.times.last_total_seconds
        received_bytes = self.times.last_received_bytes
        return RankStatus(self.rank, *capacities, self.coding, writer_pid, slots, *seconds, received_bytes)

    def _free(self, index: int) -> None:
        invalidate(self.region.view, index)
        self.headers.pop(index, None)
        self.damaged.pop(index, None)

    def _advanced(self, sequence: int, state: State, mending: bool) -> Slots:
        if mending and self.slots.state(sequence) >= state:
            self.damaged.pop(self.slots.find(sequence), None)
            return self.slots
        return self.slots.advanced(sequence, state)

    def _commit(self, index: int, header: Header, slots: Slots) -> None:
        write_header(self.region.view, index, header)
        self.headers[index], self.slots = header, slots
