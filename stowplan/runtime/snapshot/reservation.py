"""What snapshots take of a host's memory: one arithmetic for who reserves it and for who plans with what is left."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from stowplan.core.errors import InvalidArgument
from stowplan.core.plan import SnapshotBytes
from stowplan.core.units import MIB, parse_bytes
from stowplan.runtime.snapshot.codes import Code, Layout, Name, code_for
from stowplan.runtime.snapshot.memory.layout import Coding, Geometry

__all__ = ["Reservation", "SlotBytes", "SnapshotMemory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotMemory:
    """The snapshots that a training will take in memory, for ``plan`` and ``wrap``, which leave the host bytes to them.

    Attributes:
        num_nodes, m, code: how many nodes there are, how many may be lost, and the code over them: as the
            ``Snapshotter`` has them. On one node there is no code.
        beside: what a snapshot has beside the planned model and its optimizer, such as an averaged model: bytes of this
            rank, as an int or ``"4GiB"``. Schedulers, positions in the data and the like need not be counted.
        ranks_per_node: counted for ``host_budget="auto"``, as the node's memory is for all of them. Default: torchrun's
            LOCAL_WORLD_SIZE, else 1.

    Raises InvalidArgument: numbers that are none, or a code that is not for so many nodes.
    """

    num_nodes: int = 1
    m: int = 1
    code: Name | None = None
    beside: int | str = 0
    ranks_per_node: int | None = None

    def __post_init__(self) -> None:
        counts = (("num_nodes", self.num_nodes), ("ranks_per_node", self.num_ranks_per_node))
        for name, count in counts:
            if type(count) is not int or count < 1:
                raise InvalidArgument(f"{name}={count!r}: give a whole number, 1 or more.")
        _ = self.erasure_code, self.beside_bytes

    @property
    def erasure_code(self) -> Code | None:
        """The code over nodes; None on one."""
        return code_for(self.num_nodes, self.m, self.code) if self.num_nodes > 1 else None

    @property
    def beside_bytes(self) -> int:
        """``beside`` as a number."""
        return parse_bytes(self.beside, "beside") if self.beside else 0

    @property
    def num_ranks_per_node(self) -> int:
        """``ranks_per_node``, or what the environment says."""
        given = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return self.ranks_per_node if self.ranks_per_node is not None else int(given) if given.isdigit() else 1


@dataclass(frozen=True, slots=True)
class SlotBytes:
    """What a slot has to hold for a snapshot: ``data_bytes`` (schema and payload), ``coded_bytes`` of them with parity.

    The rest are a share that other nodes have copies of, and copies of theirs.
    """

    data_bytes: int
    coded_bytes: int

    @classmethod
    def most(cls, sizes: Iterable[SlotBytes]) -> SlotBytes:
        """What is enough for each of them."""
        found = tuple(sizes)
        return cls(max(size.data_bytes for size in found), max(size.coded_bytes for size in found))

    @property
    def with_reserve(self) -> SlotBytes:
        """To reserve where the largest rank's snapshot takes so many: schemas and extras, which are coded, grow."""
        reserve = self.data_bytes // 16 + MIB
        return SlotBytes(self.data_bytes + reserve, self.coded_bytes + reserve)

    def parity_bytes(self, code: Code | None) -> int:
        """What each node has to keep for the others."""
        return Layout(code, self.coded_bytes).parity_bytes if code else 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """One rank's memory for two snapshots of up to ``data_bytes`` (schema and payload) and for their parity."""

    data_bytes: int
    parity_bytes: int = 0
    coding: Coding = field(default_factory=Coding)

    @classmethod
    def of(cls, size: SlotBytes, code: Code | None = None) -> Reservation:
        """That of a node of the code's group; None: one node, without parity."""
        return cls(size.data_bytes, size.parity_bytes(code)).member(code, 0)

    def member(self, code: Code | None, node_index: int) -> Reservation:
        """The same for node ``node_index`` of the code's group."""
        coding = Coding(code.name, code.n, code.m, node_index) if code else Coding()
        return replace(self, coding=coding)

    def holds(self, size: SlotBytes, code: Code | None) -> bool:
        """Whether a snapshot of this size has room."""
        return size.data_bytes <= self.data_bytes and size.parity_bytes(code) <= self.parity_bytes

    @property
    def total_bytes(self) -> int:
        """All that the memory process takes for the rank: headers, tables, data and parity of both slots."""
        return Geometry(self.data_bytes, self.parity_bytes, self.coding.n).total_bytes

    @property
    def size(self) -> SnapshotBytes:
        """For plans."""
        return SnapshotBytes(data_bytes=self.data_bytes, parity_bytes=self.parity_bytes, total_bytes=self.total_bytes)
