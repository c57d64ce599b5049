"""Parity of a snapshot, made by all nodes of a group for each other: nobody leads, each pulls what its parity is of.

    LOCAL → all are LOCAL → tables of all, pieces of all → PARITY → all have PARITY → GLOBAL

Note: who may give up. A node that is LOCAL may give a snapshot up when it is late: nobody can then come to GLOBAL, as
that takes this node's PARITY, so all others still have the snapshot before. A node at PARITY may not by itself: others
may have seen it, be GLOBAL, and have overwritten the snapshot before. It may where another node gave up. Until it knows
it waits, and a later call goes on. One node that is GLOBAL is proof that all have PARITY.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any, TypeVar

from stowplan.core.errors import InvalidArgument, SnapshotPeerRefused, SnapshotPeerUnavailable, StowplanError
from stowplan.runtime.snapshot.codes import Area, Code, Layout, Plan, Span, Term, accumulate, crc32c
from stowplan.runtime.snapshot.exchange.authentication import JobToken, Member
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.exchange.node_store import Held, NodeStore, Table, find
from stowplan.runtime.snapshot.exchange.peer_messages import AskState, AskTable, Done, Read, Request, StateAnswer
from stowplan.runtime.snapshot.exchange.peers import Address, Link, Payload, Server
from stowplan.runtime.snapshot.exchange.rates import TokenBucket
from stowplan.runtime.snapshot.exchange.serving import Service, own_table
from stowplan.runtime.snapshot.exchange.wire import MOST_PAYLOAD_BYTES
from stowplan.runtime.snapshot.fail_points import fail_at
from stowplan.runtime.snapshot.memory.slots import Snapshot, State

__all__ = ["Exchange", "Outcome", "Verdict", "crcs_in_turn", "fenced", "gathered", "layout_of", "member_of"]

T = TypeVar("T")
_ZEROS = bytes(1 << 20)
# Of the work under way, in all its tasks: it ends, without another write, once the store's is newer.
_GENERATION: ContextVar[int | None] = ContextVar("generation", default=None)
# Of recovery: who has been unreachable for so long is lost.
_PATIENCE_SECONDS: ContextVar[float] = ContextVar("patience", default=inf)


class Verdict(StrEnum):
    """What came of a snapshot."""

    GLOBAL = "global"  # any m nodes may be lost
    SKIPPED = "skipped"  # given up; the one before is what there is
    PENDING = "pending"  # this node has its parity, and does not know of all others: ask again
    FENCED = "fenced"  # the job was restarted: this node's generation is stale


@dataclass(frozen=True, slots=True)
class Outcome:
    """``reason`` is empty for GLOBAL."""

    snapshot: Snapshot
    verdict: Verdict
    reason: str = ""


def member_of(run: str, group: str, node: int, code: Code, block_bytes: int) -> Member:
    """Raises InvalidArgument: no such node, or blocks that a frame cannot take."""
    code.nodes((node,))
    if not 0 < block_bytes <= MOST_PAYLOAD_BYTES:
        raise InvalidArgument(
            f"block_bytes={block_bytes}: blocks that have a CRC take 1 to {MOST_PAYLOAD_BYTES} bytes."
        )
    return Member(run, group, node, code.n, f"{code.name} {code.n} {code.m}", block_bytes)


def layout_of(code: Code, tables: Sequence[Table]) -> Layout:
    """Of all nodes' tables. Raises InvalidArgument: copies of shares are not as long as what they are of."""
    return Layout(code, [table.num_bytes for table in tables], [table.shares for table in tables])


class Exchange:
    """One node's part. Lives in one event loop; ``start``, then ``addresses`` of all nodes, then ``code``."""

    def __init__(
        self,
        member: Member,
        code: Code,
        store: NodeStore,
        token: JobToken,
        limits: SnapshotLimits | None = None,
        bucket: TokenBucket | None = None,
    ) -> None:
        self.member, self.coding, self.store, self.limits = member, code, store, limits or SnapshotLimits()
        self._token = token
        rate = self.limits.bytes_per_second
        if rate and rate * self.limits.timeout_seconds < code.n * member.block_bytes:
            raise InvalidArgument(
                f"bytes_per_second={rate:g} and timeout_seconds={self.limits.timeout_seconds:g}: a block of "
                f"{member.block_bytes} bytes for each of {code.n} nodes takes longer than a request may. Raise either."
            )
        if bucket is None and rate:
            bucket = TokenBucket(rate, member.block_bytes)
        self.service = Service(member, store, bucket)
        self.server = Server(member, token, self.service.serve, self.limits.handshake_seconds)
        self._links: dict[int, Link] = {}
        self._pieces = asyncio.Semaphore(self.limits.most_pieces)
        self._troubles: dict[int, str] = {}
        self._unreachable: set[int] = set()  # when they were last asked

    async def start(self, host: str, port: int = 0) -> Address:
        """Listen at ``host``; gives the address for the other nodes."""
        return await self.server.start(host, port)

    def connect(self, addresses: Mapping[int, Address]) -> None:
        """Where the other nodes are; may be called again when they have moved."""
        for link in self._links.values():
            link.abort()
        self._links = {
            node: Link(self.member, self._token, node, address, self.limits.handshake_seconds)
            for node, address in addresses.items()
            if node != self.member.node
        }

    async def close(self) -> None:
        """End all connections."""
        for link in self._links.values():
            link.abort()
        await self.server.close()

    @property
    def troubles(self) -> str:
        """What other nodes were last waited for, in sentences."""
        return " ".join(self._troubles[node] for node in sorted(self._troubles))

    async def code(self, snapshot: Snapshot) -> Outcome:
        """Bring a snapshot that is LOCAL here to GLOBAL, or say why not. Call it on all nodes; again where PENDING.

        Raises InvalidArgument: the snapshot is not LOCAL here.
        """
        if find(self.store, snapshot, State.LOCAL) is None:
            raise InvalidArgument(f"{snapshot} is not LOCAL on node {self.member.node}: commit its data first.")
        self._troubles.clear()
        self.service.given_up.discard(snapshot)  # of an earlier beginning
        try:
            with fenced(snapshot.generation):
                async with asyncio.timeout(self.limits.deadline_seconds):
                    return await self._code(snapshot)
        except TimeoutError:
            late = f"late: {self.limits.deadline_seconds:g} s have passed. {self.troubles}"
            return self._stopped(snapshot, late.rstrip())
        except SnapshotPeerRefused as error:
            if error.reason == "generation":
                return Outcome(snapshot, Verdict.FENCED, error.problem)
            return self._stopped(snapshot, error.problem, others=error.reason == "absent")
        except StowplanError as error:
            return self._stopped(snapshot, str(error))

    async def _code(self, snapshot: Snapshot) -> Outcome:
        if find(self.store, snapshot, State.PARITY) is None:
            await self._barrier(snapshot, State.LOCAL)
            await self._make_parity(snapshot)
        if self._held(snapshot).state < State.GLOBAL:
            await self._barrier(snapshot, State.PARITY)
            self.store.complete(self._held(snapshot).slot, snapshot)
        return Outcome(snapshot, Verdict.GLOBAL)

    def _stopped(self, snapshot: Snapshot, reason: str, others: bool = False) -> Outcome:
        if self.store.generation > snapshot.generation:  # what is in the slot is recovery's now
            return Outcome(snapshot, Verdict.FENCED, reason)
        held = find(self.store, snapshot)
        if held and held.state > State.LOCAL and not others:
            return Outcome(snapshot, Verdict.PENDING, reason)
        self.service.given_up.add(snapshot)
        if held:
            self.store.give_up(held.slot, snapshot)
        return Outcome(snapshot, Verdict.SKIPPED, reason)

    async def _barrier(self, snapshot: Snapshot, least: State) -> None:
        begun = least is State.PARITY
        while True:
            self._held(snapshot)  # or it was discarded meanwhile
            nodes = [node for node in range(self.member.num_nodes) if node != self.member.node]
            answers = await gathered(self._state(node, snapshot) for node in nodes)
            for node, answer in zip(nodes, answers, strict=True):
                if answer is None:
                    continue
                if answer.given_up or (begun and answer.state < State.LOCAL):
                    raise SnapshotPeerRefused("absent", f"node {node} has given up {snapshot}.")
                if answer.state < least:
                    self._troubles[node] = f"Node {node} is {answer.state.name}."
                else:
                    self._troubles.pop(node, None)
            states = [answer.state if answer else State.FREE for answer in answers]
            if State.GLOBAL in states or min(states) >= least:
                return
            await asyncio.sleep(self.limits.poll_seconds)

    async def _state(self, node: int, snapshot: Snapshot) -> StateAnswer | None:
        self.check_fence()
        answer = await self._asked(node, AskState(snapshot), StateAnswer, b"", self.limits.timeout_seconds)
        return None if answer is None else answer[0]

    async def _make_parity(self, snapshot: Snapshot) -> None:
        held = self._held(snapshot)
        own = own_table(self.member, self.store, held)
        if own is None:
            raise SnapshotPeerRefused("bad", f"node {self.member.node}'s table of CRCs of {snapshot} is damaged.")
        found = await gathered(self._table(node, snapshot) for node in self._links)
        tables = {own.node: own} | {table.node: table for table in found}
        for table in found:
            self.store.keep_table(held.slot, table.node, table.packed())
        layout = layout_of(self.coding, [tables[node] for node in range(self.member.num_nodes)])
        parity = self.store.parity(held.slot, layout.parity_bytes)
        plan = layout.exchange(self.member.node)
        await self.carry_out(plan, snapshot, {Area.PARITY: parity}, tables, urgent=False)
        crcs = await crcs_in_turn(parity, self.member.block_bytes)
        received_bytes = sum(term.source.length for term in plan.terms)  # none of them is of this node
        self.store.complete_parity(self._held(snapshot).slot, snapshot, layout.parity_bytes, crcs, received_bytes)

    async def _table(self, node: int, snapshot: Snapshot) -> Table:
        _, content = await self.ask(node, AskTable(snapshot, node), Done)
        table = Table.unpacked(content)
        if table is None or (table.node, table.snapshot, table.block_bytes) != (
            node, snapshot, self.member.block_bytes,
        ):  # fmt: skip
            raise SnapshotPeerRefused("bad", f"node {node} has no table of CRCs of {snapshot}, or it is damaged.")
        return table

    def _held(self, snapshot: Snapshot) -> Held:
        self.check_fence()
        held = find(self.store, snapshot, State.LOCAL)
        if held is None:
            raise SnapshotPeerRefused("absent", f"node {self.member.node} no longer has {snapshot}.")
        return held

    async def carry_out(
        self,
        plan: Plan,
        snapshot: Snapshot,
        areas: Mapping[Area, memoryview],
        tables: Mapping[int, Table],
        *,
        urgent: bool,
    ) -> None:
        """Overwrite the plan's destinations in ``areas``, all of this node, with what it makes of others' bytes.

        Raises SnapshotPeerRefused ("bad", "absent", …); waits for nodes that cannot be reached.
        """
        for span in plan.destinations:
            await _clear(areas[span.area], span)
        fail_at("rebuild" if urgent else "encode")
        of_node: dict[int, list[Term]] = {}
        for term in plan.terms:
            of_node.setdefault(term.source.node, []).append(term)
        await gathered(self._pull(terms, snapshot, areas, tables, urgent) for terms in of_node.values())

    async def _pull(
        self,
        terms: Sequence[Term],
        snapshot: Snapshot,
        areas: Mapping[Area, memoryview],
        tables: Mapping[int, Table],
        urgent: bool,
    ) -> None:
        for term in terms:
            for piece in _pieces(term, self.member.block_bytes):
                source = piece.source
                request = Read(snapshot, source.area, source.offset, source.length, urgent)
                async with self._pieces:
                    _, content = await self.ask(source.node, request, Done)
                    self.check_fence()
                    self._check(source, content, tables[source.node])
                    accumulate(piece, content, areas[piece.destination.area])

    def _check(self, source: Span, content: bytes, table: Table) -> None:
        """Of whole blocks the sender's word is not taken."""
        index, rest = divmod(source.offset, table.block_bytes)
        whole = not rest and source.length == min(table.block_bytes, table.num_bytes - source.offset)
        wrong = source.area is Area.DATA and whole and crc32c(content) != table.crcs[index]
        if len(content) != source.length or wrong:
            raise SnapshotPeerRefused("bad", f"{source}, as they came, are not what that node's table says.")

    async def ask(
        self,
        node: int,
        request: Request,
        kind: type[Any],
        payload: Payload = b"",
        *,
        timeout_seconds: float | None = None,
    ) -> tuple[Any, bytes]:
        """Ask until there is an answer: again, with growing pauses, while the node cannot be reached or is behind.

        SnapshotPeerRefused ("generation") once this node's is newer than that of the work (``fenced``). Other refusals
        are raised as they are. The caller's timeout is the end; where ``fenced`` has a patience,
        SnapshotPeerUnavailable is raised when the node could not be reached for that long.
        """
        pause = self.limits.poll_seconds
        lost_at: float | None = None
        while True:
            self.check_fence()
            answer = await self._asked(node, request, kind, payload, timeout_seconds or self.limits.timeout_seconds)
            if answer is not None:
                return answer
            if node not in self._unreachable:
                lost_at = None
            elif lost_at is None:
                lost_at = time.monotonic()
            elif time.monotonic() - lost_at > _PATIENCE_SECONDS.get():
                raise SnapshotPeerUnavailable(self._troubles[node])
            await asyncio.sleep(pause)
            pause = min(2 * pause, self.limits.most_backoff_seconds)

    async def _asked(
        self, node: int, request: Request, kind: type[Any], payload: Payload, timeout_seconds: float
    ) -> tuple[Any, bytes] | None:
        """None where the node cannot be reached now, or is behind."""
        generation = self.store.generation
        try:
            if node == self.member.node:
                answer, content = await self.service.serve(node, generation, request, bytes(payload))
                return answer, bytes(content)
            return await self._link(node).ask(request, kind, generation, payload, timeout_seconds)
        except SnapshotPeerUnavailable as error:
            self._unreachable.add(node)
            self._troubles[node] = str(error)
        except SnapshotPeerRefused as error:
            self._unreachable.discard(node)
            if error.reason != "behind":
                raise
            self._troubles[node] = error.problem
        return None

    def check_fence(self) -> None:
        """Raise SnapshotPeerRefused ("generation") where this work belongs to what was before a restart."""
        generation = _GENERATION.get()
        if generation is not None and self.store.generation > generation:
            raise SnapshotPeerRefused(
                "generation",
                f"this is of generation {generation}, which is stale: node {self.member.node} is at generation "
                f"{self.store.generation}.",
            )

    def _link(self, node: int) -> Link:
        if node not in self._links:
            raise SnapshotPeerUnavailable(f"node {node} has no address here yet.")
        return self._links[node]


@contextmanager
def fenced(generation: int, patience_seconds: float = inf) -> Iterator[None]:
    """What is done inside belongs to this generation, and waits for a node that cannot be reached for so long."""
    tokens = _GENERATION.set(generation), _PATIENCE_SECONDS.set(patience_seconds)
    try:
        yield
    finally:
        _GENERATION.reset(tokens[0])
        _PATIENCE_SECONDS.reset(tokens[1])


async def gathered(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def crcs_in_turn(buffer: memoryview, block_bytes: int) -> list[int]:
    """Of each block; the event loop has its turn in between."""
    found = []
    for begin in range(0, len(buffer), block_bytes):
        found.append(crc32c(buffer[begin : begin + block_bytes]))
        await asyncio.sleep(0)
    return found


async def _clear(area: memoryview, span: Span) -> None:
    end = span.offset + span.length
    for begin in range(span.offset, end, len(_ZEROS)):
        length = min(len(_ZEROS), end - begin)
        area[begin : begin + length] = _ZEROS[:length]
        await asyncio.sleep(0)


def _pieces(term: Term, block_bytes: int) -> Iterator[Term]:
    """Parts of which each is within one block of the source."""
    begin, length = 0, term.source.length
    while begin < length:
        end = min(length, ((term.source.offset + begin) // block_bytes + 1) * block_bytes - term.source.offset)
        yield term.part(begin, end)
        begin = end
