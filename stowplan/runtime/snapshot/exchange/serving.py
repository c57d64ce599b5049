"""What a node answers to the others: states, tables and bytes that are as they were written, or a refusal by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from stowplan.core.errors import SnapshotPeerRefused
from stowplan.runtime.snapshot.codes import Area, Span, crc32c
from stowplan.runtime.snapshot.exchange.authentication import Member
from stowplan.runtime.snapshot.exchange.node_store import Held, NodeStore, Table, block_crcs, find
from stowplan.runtime.snapshot.exchange.peer_messages import (
    Answer,
    AskDecision,
    AskHoldings,
    AskResult,
    AskState,
    AskTable,
    Decision,
    DecisionAnswer,
    Done,
    Holdings,
    Read,
    Request,
    ResultAnswer,
    StateAnswer,
    Verified,
    Verify,
)
from stowplan.runtime.snapshot.exchange.rates import TokenBucket
from stowplan.runtime.snapshot.memory.slots import Snapshot, State

__all__ = ["Service", "own_table"]


class Service:
    """Answers over a store; what is decided in a recovery is kept here for the others to ask for."""

    def __init__(self, member: Member, store: NodeStore, bucket: TokenBucket | None) -> None:
        self._member, self._store, self._bucket = member, store, bucket
        self.given_up: set[Snapshot] = set()
        self.decisions: dict[tuple[int, int], Decision] = {}
        self.results: dict[tuple[int, int], str] = {}

    async def serve(
        self, node: int, generation: int, request: Request, payload: bytes
    ) -> tuple[Answer, bytes | memoryview]:
        """For ``Server``. Raises SnapshotPeerRefused."""
        self._check_generation(node, generation)
        match request:
            case AskState():
                return self._state(request.snapshot), b""
            case AskTable():
                return Done(), self._table(request.snapshot, request.node)
            case Read():
                return Done(), await self._read(request)
            case AskHoldings():
                return Holdings(tuple(held for held in self._store.held() if held.state >= State.LOCAL)), b""
            case Verify():
                return await self._verify(request.snapshot, payload), b""
            case AskDecision():
                return DecisionAnswer(self.decisions.get((generation, request.number))), b""
            case AskResult():
                return ResultAnswer(self.results.get((generation, request.number))), b""

    def _check_generation(self, node: int, generation: int) -> None:
        own = self._store.generation
        if generation < own:
            raise SnapshotPeerRefused(
                "generation",
                f"node {node} is of generation {generation}, which is stale: the job was restarted and node "
                f"{self._member.node} is at generation {own}. End what is left of the older one.",
            )
        if generation > own:
            raise SnapshotPeerRefused(
                "behind",
                f"node {self._member.node} is at generation {own} and node {node} at {generation}: raise it there.",
            )

    def _state(self, snapshot: Snapshot) -> StateAnswer:
        held = find(self._store, snapshot)
        if held:
            self.given_up.discard(snapshot)  # it has begun anew
        newer = any(each.snapshot > snapshot for each in self._store.held())
        return StateAnswer(held.state if held else State.FREE, not held and (newer or snapshot in self.given_up))

    def _table(self, snapshot: Snapshot, node: int) -> bytes:
        held = find(self._store, snapshot, State.LOCAL)
        if held is None:
            return b""
        if node == self._member.node and (own := own_table(self._member, self._store, held)):
            return own.packed()
        return self._store.tables(held.slot).get(node, b"")

    async def _read(self, request: Read) -> memoryview:
        block_bytes, begin, end = self._member.block_bytes, request.offset, request.offset + request.length
        if self._bucket and not request.urgent:
            await self._bucket.take(max(request.length, 0))
        least = State.LOCAL if request.area is Area.DATA else State.PARITY
        held = find(self._store, request.snapshot, least)
        if held is None:
            raise self._absent(request)
        total = held.data_bytes if request.area is Area.DATA else held.parity_bytes
        index = begin // block_bytes
        if not 0 <= begin < end <= total or (end - 1) // block_bytes != index:
            raise SnapshotPeerRefused("malformed", f"{request} is not within one block of {total} bytes.")
        area = self._store.data(held.slot) if request.area is Area.DATA else self._store.parity(held.slot, total)
        crcs = self._store.data_crcs(held.slot) if request.area is Area.DATA else self._store.parity_crcs(held.slot)
        # What is sent is a copy that was looked at: memory may change, or another snapshot may come, meanwhile.
        block = bytes(area[index * block_bytes : (index + 1) * block_bytes])
        if find(self._store, request.snapshot, least) is None:
            raise self._absent(request)
        if crcs is None or crc32c(block) != crcs[index]:
            raise SnapshotPeerRefused(
                "bad",
                f"block {index} of node {self._member.node}'s {request.area} of {request.snapshot} is not as it was "
                f"written: its CRC, or the table of CRCs, is wrong.",
            )
        return memoryview(block)[begin - index * block_bytes : end - index * block_bytes]

    def _absent(self, request: Read) -> SnapshotPeerRefused:
        what = f"{request.area} of {request.snapshot}"
        return SnapshotPeerRefused("absent", f"node {self._member.node} does not have {what}, or no longer.")

    async def _verify(self, snapshot: Snapshot, payload: bytes) -> Verified:
        held, table = find(self._store, snapshot, State.LOCAL), Table.unpacked(payload)
        if held is None:
            raise SnapshotPeerRefused("absent", f"node {self._member.node} does not have {snapshot}, or no longer.")
        if table is None or (table.node, table.snapshot, table.num_bytes) != (
            self._member.node, snapshot, held.data_bytes,
        ):  # fmt: skip
            raise SnapshotPeerRefused("malformed", f"the table sent is not node {self._member.node}'s of {snapshot}.")
        if own_table(self._member, self._store, held) is None:
            self._store.complete_data(held.slot, snapshot, table.crcs)
        data = await asyncio.to_thread(block_crcs, self._store.data(held.slot), self._member.block_bytes)
        bad = list(self._bad(Area.DATA, held.data_bytes, data, table.crcs))
        if held.state >= State.PARITY:
            view = self._store.parity(held.slot, held.parity_bytes)
            parity = await asyncio.to_thread(block_crcs, view, self._member.block_bytes)
            bad += self._bad(Area.PARITY, held.parity_bytes, parity, self._store.parity_crcs(held.slot))
        return Verified(tuple(bad), held.parity_bytes)

    def _bad(self, area: Area, total: int, found: Sequence[int], expected: Sequence[int] | None) -> Iterable[Span]:
        size = self._member.block_bytes
        for index, crc in enumerate(found):
            if expected is None or crc != expected[index]:
                begin = index * size
                yield Span(self._member.node, area, begin, min(size, total - begin))


def own_table(member: Member, store: NodeStore, held: Held) -> Table | None:
    """A node's own table of a slot; None where it is damaged."""
    crcs = store.data_crcs(held.slot)
    if crcs is None:
        return None
    return Table(
        member.node, held.snapshot, held.data_bytes, member.block_bytes, tuple(crcs), held.schema_bytes, held.shares
    )  # fmt: skip
