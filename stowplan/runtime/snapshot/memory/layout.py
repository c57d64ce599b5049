"""Where things are in a rank's memory, and the checksums that show any bit that is not as it was written.

    header A | header B | table A | table B | data A | data B | parity A | parity B

Headers take a page each, tables begin at pages, data and parity at 2 MiB. A slot's data begins with its schema; the
payload follows at the next 64 bytes. Its table has a CRC-32C for each 4 MiB of data and then for each 4 MiB of parity.

Note: how a header changes at once. A header page has two places for records. A change is written into the place that is
not in use, with a higher revision and a CRC over all of the record: whoever is killed on the way leaves the former
record in force. ``invalidate`` wipes both, before the slot is written again.

Only the memory process writes headers and tables. It is told to do so through a socket, after the bytes: the kernel's
calls in between order the writes on every processor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from stowplan.core.errors import InvalidArgument
from stowplan.core.units import MIB
from stowplan.runtime.snapshot.codes import crc32c
from stowplan.runtime.snapshot.exchange.node_store import MOST_SHARES, Table, packed_shares
from stowplan.runtime.snapshot.memory.slots import Slot, Snapshot, State

__all__ = [
    "CHUNK_BYTES",
    "NUM_SLOTS",
    "Coding",
    "Damage",
    "Geometry",
    "Header",
    "chunk_crcs",
    "damage",
    "invalidate",
    "keep_table",
    "kept_tables",
    "num_chunks",
    "payload_offset",
    "read_header",
    "read_table",
    "write_header",
    "write_table",
]

CHUNK_BYTES = 4 * MIB
NUM_SLOTS = 2
VERSION = 2
_MAGIC = b"STOWSNAP"
_PAGE_BYTES = 4096
_ALIGNMENT_BYTES = 2 * MIB
_RECORD_BYTES = 512
_PLACES = (0, _PAGE_BYTES // 2)
_PAYLOAD_ALIGNMENT_BYTES = 64
_CODE_BYTES = 8
# magic, version, state, slot, code, n, m, index, run; revision, generation, sequence, step, capacities of data and
# parity, bytes of data, schema and parity; CRCs of schema, data's table and parity's table; bytes of shares, how many
_FIELDS = struct.Struct(f"<8sHBB8sHHHx64sQQQQQQQQQIII{MOST_SHARES}QI")
_CRC = struct.Struct("<I")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Coding:
    """The erasure code of a rank's group, and which member it is; without a code the group is one node."""

    code: str = "none"
    n: int = 1
    m: int = 0
    index: int = 0

    def __post_init__(self) -> None:
        numbers = (self.n, self.m, self.index)
        if len(self.code.encode()) > _CODE_BYTES or not all(0 <= number < 1 << 16 for number in numbers):
            raise InvalidArgument(f"{self.code!r}, n={self.n}, m={self.m}, index={self.index} is no erasure code's.")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Offsets in a region whose slots hold up to so many bytes of data (schema and payload) and of parity.

    In a group of several nodes there is room for the others' packed tables of CRCs, all with as much data at most.
    """

    data_capacity_bytes: int
    parity_capacity_bytes: int = 0
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 <= value < 1 << 48 or (each.name != "parity_capacity_bytes" and not value):
                raise InvalidArgument(f"{each.name}={value} is no number of bytes that a slot can have.")

    @property
    def num_table_bytes(self) -> int:
        """Of one table, all its entries used."""
        return _CRC.size * (num_chunks(self.data_capacity_bytes) + num_chunks(self.parity_capacity_bytes))

    def table(self, slot: int) -> int:
        """Where a slot's table begins."""
        return NUM_SLOTS * _PAGE_BYTES + slot * self._table_stride_bytes

    @property
    def kept_table_bytes(self) -> int:
        """Of another node's packed table, the longest that there is room for."""
        return Table.packed_bytes(self.data_capacity_bytes, CHUNK_BYTES)

    @property
    def _table_stride_bytes(self) -> int:
        others = self.num_nodes * (_LENGTH.size + self.kept_table_bytes) if self.num_nodes > 1 else 0
        return _aligned(self.num_table_bytes + others, _PAGE_BYTES)

    def kept_table(self, slot: int, node: int) -> int:
        """Where the place for a node's packed table begins: its length, and then the table."""
        if not 0 <= node < self.num_nodes or self.num_nodes == 1:
            raise InvalidArgument(f"node {node}'s table cannot be kept in a group of {self.num_nodes}.")
        return self.table(slot) + self.num_table_bytes + node * (_LENGTH.size + self.kept_table_bytes)

    def data(self, slot: int) -> int:
        """Where a slot's data begins."""
        start = _aligned(self.table(NUM_SLOTS), _ALIGNMENT_BYTES)
        return start + slot * _aligned(self.data_capacity_bytes, _ALIGNMENT_BYTES)

    def parity(self, slot: int) -> int:
        """Where a slot's parity begins."""
        return self.data(NUM_SLOTS) + slot * _aligned(self.parity_capacity_bytes, _ALIGNMENT_BYTES)

    @property
    def total_bytes(self) -> int:
        """What the region takes."""
        return self.parity(NUM_SLOTS)

    def data_view(self, region: memoryview, slot: int, num_bytes: int) -> memoryview:
        """The first bytes of a slot's data, to be read or written."""
        return _part(region, self.data(slot), num_bytes, self.data_capacity_bytes, "data")

    def parity_view(self, region: memoryview, slot: int, num_bytes: int) -> memoryview:
        """The first bytes of a slot's parity, to be read or written."""
        return _part(region, self.parity(slot), num_bytes, self.parity_capacity_bytes, "parity")


@dataclass(frozen=True, slots=True)
class Header:
    """What a slot says of itself; ``data_bytes`` has the schema and the payload, ``shares`` are as of codes' Layout."""

    run: str
    state: State
    snapshot: Snapshot
    geometry: Geometry
    data_bytes: int
    schema_bytes: int
    parity_bytes: int = 0
    schema_crc: int = 0
    data_table_crc: int = 0
    parity_table_crc: int = 0
    shares: tuple[int, ...] = ()
    coding: Coding = field(default_factory=Coding)
    revision: int = 0

    @property
    def slot(self) -> Slot:
        """For the logic of states."""
        return Slot(self.state, self.snapshot)

    def packed(self, slot: int) -> bytes:
        """A record; its last four bytes are the CRC of all before."""
        coding, snapshot = self.coding, self.snapshot
        body = _FIELDS.pack(
            _MAGIC, VERSION, self.state, slot, coding.code.encode(), coding.n, coding.m, coding.index,
            self.run.encode(), self.revision, snapshot.generation, snapshot.sequence, snapshot.step,
            self.geometry.data_capacity_bytes, self.geometry.parity_capacity_bytes, self.data_bytes, self.schema_bytes,
            self.parity_bytes, self.schema_crc, self.data_table_crc, self.parity_table_crc,
            *packed_shares(self.shares),
        ).ljust(_RECORD_BYTES - _CRC.size, b"\0")  # fmt: skip
        return body + _CRC.pack(crc32c(body))

    @classmethod
    def unpacked(cls, record: bytes, slot: int) -> Header | None:
        """None for what no ``packed`` for this slot gave."""
        body, (crc,) = record[: -_CRC.size], _CRC.unpack(record[-_CRC.size :])
        values = _FIELDS.unpack_from(body)
        if crc != crc32c(body) or values[:2] != (_MAGIC, VERSION) or values[2] not in set(State) or values[3] != slot:
            return None
        _, _, state, _, code, n, m, index, run, revision, *snapshot, data_capacity, parity_capacity = values[:15]
        data_bytes, schema_bytes, parity_bytes, schema_crc, data_table_crc, parity_table_crc = values[15:21]
        *shares, num_shares = values[21:]
        return cls(
            run=_text(run),
            state=State(state),
            snapshot=Snapshot(*snapshot),
            geometry=Geometry(data_capacity, parity_capacity, max(n, 1)),
            data_bytes=data_bytes,
            schema_bytes=schema_bytes,
            parity_bytes=parity_bytes,
            schema_crc=schema_crc,
            data_table_crc=data_table_crc,
            parity_table_crc=parity_table_crc,
            shares=tuple(shares[:num_shares]),
            coding=Coding(_text(code), n, m, index),
            revision=revision,
        )


@dataclass(frozen=True, slots=True)
class Damage:
    """What of a slot is not as it was written: spans (offset, bytes) of its data and its parity."""

    data: tuple[tuple[int, int], ...] = ()
    parity: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.data or self.parity)


def num_chunks(num_bytes: int) -> int:
    """Each has a CRC."""
    return -(-num_bytes // CHUNK_BYTES)


def payload_offset(schema_bytes: int) -> int:
    """Where the payload begins in a slot's data."""
    return _aligned(schema_bytes, _PAYLOAD_ALIGNMENT_BYTES)


def read_header(region: memoryview, slot: int) -> Header | None:
    """The record in force; None where there is none that is whole."""
    found = [header for _, header in _records(region, slot) if header]
    return max(found, key=lambda header: header.revision, default=None)


def write_header(region: memoryview, slot: int, header: Header) -> None:
    """Put it in force at once: who is killed on the way leaves the former one in force."""
    records = dict(_records(region, slot))
    revisions = {place: held.revision if held else -1 for place, held in records.items()}
    place = min(revisions, key=lambda place: revisions[place])
    record = replace(header, revision=max(revisions.values()) + 1).packed(slot)
    region[place : place + _RECORD_BYTES] = record


def invalidate(region: memoryview, slot: int) -> None:
    """Nothing that the slot said counts from now on: it is FREE."""
    for place, _ in _records(region, slot):
        region[place : place + _RECORD_BYTES] = bytes(_RECORD_BYTES)


def write_table(region: memoryview, geometry: Geometry, slot: int, first: int, crcs: Sequence[int]) -> int:
    """Put CRCs of chunks into the slot's table from entry ``first`` on; gives the CRC of what was put."""
    entries = struct.pack(f"<{len(crcs)}I", *crcs)
    begin = geometry.table(slot) + first * _CRC.size
    region[begin : begin + len(entries)] = entries
    return crc32c(entries)


def read_table(region: memoryview, geometry: Geometry, slot: int, first: int, count: int, crc: int) -> list[int] | None:
    """``count`` entries from ``first`` on; None where they have not this CRC."""
    begin = geometry.table(slot) + first * _CRC.size
    entries = bytes(region[begin : begin + count * _CRC.size])
    return list(struct.unpack(f"<{count}I", entries)) if crc32c(entries) == crc else None


def keep_table(region: memoryview, geometry: Geometry, slot: int, node: int, table: bytes) -> None:
    """Put another node's packed table beside the slot's own. Raises InvalidArgument: there is no room for it."""
    begin = geometry.kept_table(slot, node)
    if len(table) > geometry.kept_table_bytes:
        raise InvalidArgument(
            f"node {node}'s table of {len(table)} bytes does not fit in {geometry.kept_table_bytes}: reserve as much "
            f"data on all nodes."
        )
    content = _LENGTH.pack(len(table)) + table
    region[begin : begin + len(content)] = content


def kept_tables(region: memoryview, geometry: Geometry, slot: int, snapshot: Snapshot) -> dict[int, bytes]:
    """Packed tables of this snapshot that are whole, by node."""
    found = {}
    for node in range(geometry.num_nodes if geometry.num_nodes > 1 else 0):
        begin = geometry.kept_table(slot, node)
        (length,) = _LENGTH.unpack(region[begin : begin + _LENGTH.size])
        begin += _LENGTH.size
        content = bytes(region[begin : begin + min(length, geometry.kept_table_bytes)])
        table = Table.unpacked(content)
        if table is not None and (table.node, table.snapshot) == (node, snapshot):
            found[node] = content
    return found


def chunk_crcs(buffer: memoryview) -> list[int]:
    """Of each 4 MiB, the last being what is left; other threads run meanwhile."""
    return [crc32c(buffer[begin : begin + CHUNK_BYTES]) for begin in range(0, len(buffer), CHUNK_BYTES)]


def damage(region: memoryview, slot: int, header: Header) -> Damage:
    """Look at all bytes of a slot that is LOCAL or more; ``header`` is the one in force.

    A span is a chunk; all chunks of an area whose table is damaged count as damaged, and of the data where only the
    schema's own CRC is wrong.
    """
    geometry = header.geometry
    data = geometry.data_view(region, slot, header.data_bytes)
    found = _wrong(data, read_table(region, geometry, slot, 0, num_chunks(len(data)), header.data_table_crc))
    if not found and crc32c(data[: header.schema_bytes]) != header.schema_crc:
        found = _wrong(data, None)
    if header.state < State.PARITY:
        return Damage(found)
    parity = geometry.parity_view(region, slot, header.parity_bytes)
    first = num_chunks(geometry.data_capacity_bytes)
    table = read_table(region, geometry, slot, first, num_chunks(len(parity)), header.parity_table_crc)
    return Damage(found, _wrong(parity, table))


def _wrong(area: memoryview, table: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    starts = range(0, len(area), CHUNK_BYTES)
    expected = table if table is not None else [None] * len(starts)
    found = [crc32c(area[begin : begin + CHUNK_BYTES]) if table is not None else -1 for begin in starts]
    return tuple(
        (begin, min(CHUNK_BYTES, len(area) - begin))
        for begin, is_, should in zip(starts, found, expected, strict=True)
        if is_ != should
    )


def _records(region: memoryview, slot: int) -> Iterator[tuple[int, Header | None]]:
    for place in _PLACES:
        begin = slot * _PAGE_BYTES + place
        yield begin, Header.unpacked(bytes(region[begin : begin + _RECORD_BYTES]), slot)


def _part(region: memoryview, begin: int, num_bytes: int, capacity_bytes: int, area: str) -> memoryview:
    if not 0 <= num_bytes <= capacity_bytes:
        raise InvalidArgument(
            f"{num_bytes} bytes of {area} are not within a slot: {capacity_bytes} bytes were reserved."
        )
    return region[begin : begin + num_bytes]


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")


def _aligned(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
