"""What the exchange needs of a node's memory, and what it keeps there: slots, bytes, and checksums of all nodes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stowplan.runtime.snapshot.codes import crc32c
from stowplan.runtime.snapshot.memory.slots import Snapshot, State

__all__ = ["MOST_SHARES", "Held", "NodeStore", "Table", "block_crcs", "find", "packed_shares"]

MOST_SHARES = 3  # a node's own, and those of two others: no code is for the loss of more

# magic, node, generation, sequence, step, bytes, of schema, of a block, of shares, how many of these
_TABLE = struct.Struct(f"<4sIQQQQQQ{MOST_SHARES}QI")
_CRC = struct.Struct("<I")
_MAGIC = b"STWT"


@dataclass(frozen=True, slots=True)
class Held:
    """A slot that is not FREE; ``parity_bytes`` is 0 before PARITY, ``shares`` are as of ``Layout``."""

    slot: int
    snapshot: Snapshot
    state: State
    data_bytes: int
    parity_bytes: int = 0
    schema_bytes: int = 0
    shares: tuple[int, ...] = ()


class NodeStore(Protocol):
    """A node's slots. All is called from the event loop's thread but for what reads, which may be called from others.

    Methods that change a slot raise SnapshotPeerRefused or SnapshotRefused where ``snapshot`` is no longer in it.
    """

    @property
    def generation(self) -> int:
        """The newest that this node has been told of."""

    def held(self) -> Sequence[Held]:
        """Slots that are not FREE."""

    def data(self, slot: int) -> memoryview:
        """The ``data_bytes`` of the slot; written to only where bytes are rebuilt."""

    def parity(self, slot: int, num_bytes: int) -> memoryview:
        """The first bytes of the slot's parity, writable. Raises StowplanError: there is no room for so many."""

    def data_crcs(self, slot: int) -> Sequence[int] | None:
        """CRC-32C of each block of data; None where that table is damaged."""

    def parity_crcs(self, slot: int) -> Sequence[int] | None:
        """CRC-32C of each block of parity; None where that table is damaged, or not there."""

    def tables(self, slot: int) -> Mapping[int, bytes]:
        """What ``keep_table`` was given for this slot's snapshot."""

    def keep_table(self, slot: int, node: int, table: bytes) -> None:
        """Keep another node's packed table beside the slot, until the slot has another snapshot."""

    def complete_parity(
        self, slot: int, snapshot: Snapshot, num_bytes: int, crcs: Sequence[int], received_bytes: int = 0
    ) -> None:
        """LOCAL becomes PARITY, for which so many bytes came from other nodes; in recovery later states stay."""

    def complete(self, slot: int, snapshot: Snapshot) -> None:
        """The slot becomes GLOBAL."""

    def give_up(self, slot: int, snapshot: Snapshot) -> None:
        """The slot becomes FREE: no node can have come to GLOBAL with it. Also from PARITY."""

    def rebuild(self, snapshot: Snapshot, data_bytes: int, schema_bytes: int, shares: tuple[int, ...]) -> int:
        """A slot, WRITING, with room for what was lost: a FREE one, or else the oldest."""

    def complete_data(self, slot: int, snapshot: Snapshot, crcs: Sequence[int]) -> None:
        """WRITING becomes LOCAL with these CRCs; of a later state a damaged table is replaced, and the state stays."""

    def roll_back(self, snapshot: Snapshot) -> None:
        """Slots with newer snapshots become FREE."""


@dataclass(frozen=True, slots=True)
class Table:
    """CRC-32C of each block of a node's data in one snapshot; packed it carries a CRC of its own."""

    node: int
    snapshot: Snapshot
    num_bytes: int
    block_bytes: int
    crcs: tuple[int, ...]
    schema_bytes: int = 0
    shares: tuple[int, ...] = ()

    def packed(self) -> bytes:
        """For the wire and for other nodes' memory."""
        key = self.snapshot
        head = (self.node, key.generation, key.sequence, key.step, self.num_bytes, self.schema_bytes, self.block_bytes)
        body = _TABLE.pack(_MAGIC, *head, *packed_shares(self.shares)) + struct.pack(f"<{len(self.crcs)}I", *self.crcs)
        return body + _CRC.pack(crc32c(body))

    @classmethod
    def packed_bytes(cls, num_bytes: int, block_bytes: int) -> int:
        """How long the packed table of so many bytes is."""
        return _TABLE.size + _CRC.size * (-(-num_bytes // block_bytes) + 1)

    @classmethod
    def unpacked(cls, content: bytes) -> Table | None:
        """None for what no ``packed`` gave: damaged."""
        body, crc = content[: -_CRC.size], content[-_CRC.size :]
        if len(body) < _TABLE.size or len(body) % _CRC.size or _CRC.pack(crc32c(body)) != crc:
            return None
        magic, node, generation, sequence, step, num_bytes, schema_bytes, block_bytes, *shares, count = (
            _TABLE.unpack_from(body)
        )
        crcs = struct.unpack(f"<{(len(body) - _TABLE.size) // _CRC.size}I", body[_TABLE.size :])
        if magic != _MAGIC or not block_bytes or len(crcs) != -(-num_bytes // block_bytes):
            return None
        snapshot = Snapshot(generation, sequence, step)
        return cls(node, snapshot, num_bytes, block_bytes, crcs, schema_bytes, tuple(shares[:count]))


def packed_shares(shares: Sequence[int]) -> tuple[int, ...]:
    """For records of a fixed size: the sizes, zeros behind them, and how many they are."""
    return (*shares, *(0,) * (MOST_SHARES - len(shares)), len(shares))


def find(store: NodeStore, snapshot: Snapshot, least: State = State.WRITING) -> Held | None:
    """The slot that has this snapshot in this state or a later one."""
    return next((held for held in store.held() if held.snapshot == snapshot and held.state >= least), None)


def block_crcs(buffer: memoryview, block_bytes: int) -> list[int]:
    """Of each block, the last being what is left."""
    return [crc32c(buffer[begin : begin + block_bytes]) for begin in range(0, len(buffer), block_bytes)]
