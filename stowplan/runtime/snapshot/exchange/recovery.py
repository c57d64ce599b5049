"""After a restart: the newest snapshot that those alive can produce, made whole on each of them, or a refusal.

The lowest node that is alive looks at what all have and decides; all carry their part out, and only when every one has
verified its own bytes is the snapshot committed and what is newer given up. Where a part fails the next older snapshot
is tried. All of it belongs to the new generation: who has an older one is refused.

A snapshot is looked at block by block: data that has the CRC that its owner's table says counts, wherever the snapshot
stood on its way to GLOBAL; blocks that have not are erasures, and so are parities that were never made. Tables are on
all nodes, so what is decoded for a lost node is verified, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from stowplan.core.errors import (
    InvalidArgument,
    SnapshotPeerRefused,
    SnapshotPeerUnavailable,
    StowplanError,
    UnrecoverableSnapshot,
)
from stowplan.runtime.snapshot.codes import Area, Layout, Plan, Span
from stowplan.runtime.snapshot.exchange.exchange import Exchange, crcs_in_turn, fenced, gathered, layout_of
from stowplan.runtime.snapshot.exchange.node_store import Held, Table, find
from stowplan.runtime.snapshot.exchange.peer_messages import (
    AskDecision,
    AskHoldings,
    AskResult,
    AskTable,
    Decision,
    DecisionAnswer,
    Done,
    Holdings,
    ResultAnswer,
    Verified,
    Verify,
)
from stowplan.runtime.snapshot.fail_points import fail_at
from stowplan.runtime.snapshot.memory.slots import Snapshot, State

__all__ = ["Restored", "recover"]

_MOST_TRIED = 1 << 16  # snapshots in one attempt


@dataclass(frozen=True, slots=True)
class Restored:
    """What training goes on from: ``lost`` nodes and ``bad`` spans of others were computed from the rest."""

    snapshot: Snapshot
    lost: tuple[int, ...]
    bad: tuple[Span, ...]


async def recover(exchange: Exchange, alive: Iterable[int], newest_on_disk: str = "", *, attempt: int = 0) -> Restored:
    """Make the newest snapshot that can be had whole and GLOBAL on all ``alive`` nodes, empty ones included.

    Call it on all of them, with the same ``alive``, after every store has the new generation; ``newest_on_disk`` says
    where to go on from otherwise. Nothing of a slot is given up before all that is needed is verified. Each ``attempt``
    of a generation has another number, the same on all nodes.

    Raises UnrecoverableSnapshot, on all nodes; SnapshotPeerUnavailable: a node of ``alive`` did not answer in time, so
    begin anew without it and with a new generation; SnapshotPeerRefused: this node is stale, or of another job.
    """
    members = sorted(exchange.coding.nodes(alive))
    if exchange.member.node not in members:
        raise InvalidArgument(
            f"alive={members} is without node {exchange.member.node}, which this is: name all that live."
        )
    try:
        with fenced(exchange.store.generation, exchange.limits.timeout_seconds):
            fail_at("recover")
            async with asyncio.timeout(exchange.limits.recovery_seconds):
                if exchange.member.node == members[0]:
                    return await _led(exchange, members, newest_on_disk, attempt * _MOST_TRIED)
                return await _follow(exchange, members[0], attempt * _MOST_TRIED)
    except TimeoutError as error:
        raise SnapshotPeerUnavailable(
            f"no recovery in {exchange.limits.recovery_seconds:g} s. {exchange.troubles} Begin anew, with a new "
            f"generation, among the nodes that answer."
        ) from error


async def _led(exchange: Exchange, members: Sequence[int], newest_on_disk: str, number: int) -> Restored:
    """As ``_lead``; who follows does not wait for a leader who has ended."""
    try:
        return await _lead(exchange, members, newest_on_disk, number)
    except SnapshotPeerUnavailable as error:
        while (exchange.store.generation, number) in exchange.service.decisions:
            number += 1
        _publish(exchange, number, Decision("ended", advice=str(error)))
        raise


async def _lead(exchange: Exchange, members: Sequence[int], newest_on_disk: str, number: int) -> Restored:
    refusal: Decision | None = None
    advice = f"Go on from the newest copy on disk{': ' if newest_on_disk else ''}{newest_on_disk}."
    holdings = await _holdings(exchange, members)
    for snapshot in sorted({each.snapshot for slots in holdings.values() for each in slots}, reverse=True):
        decision = await _examined(exchange, members, snapshot)
        if decision.verdict == "rebuild":
            _publish(exchange, number, decision)
            problems = await _results(exchange, members, number, decision)
            number += 1
            if not problems:
                _publish(exchange, number, replace(decision, verdict="commit"))
                return _committed(exchange, decision)
            decision = Decision("refused", snapshot, names=tuple(problems), stands=exchange.coding.stands)
        refusal = refusal or replace(decision, advice=advice)
    if refusal is None:
        names = tuple(f"node {node}" for node in range(exchange.member.num_nodes))
        refusal = Decision("refused", names=names, stands=exchange.coding.stands, advice=advice)
    _publish(exchange, number, refusal)
    raise UnrecoverableSnapshot(refusal.names, refusal.stands, refusal.advice)


async def _holdings(exchange: Exchange, members: Sequence[int]) -> dict[int, tuple[Held, ...]]:
    answers = await gathered(exchange.ask(node, AskHoldings(), Holdings) for node in members)
    return {node: answer.held for node, (answer, _) in zip(members, answers, strict=True)}


async def _follow(exchange: Exchange, leader: int, number: int) -> Restored:
    while True:
        answer, _ = await exchange.ask(leader, AskDecision(number), DecisionAnswer)
        decision: Decision | None = answer.decision
        if decision is None:
            await asyncio.sleep(exchange.limits.poll_seconds)
            continue
        if decision.verdict == "refused":
            raise UnrecoverableSnapshot(decision.names, decision.stands, decision.advice)
        if decision.verdict == "ended":
            raise SnapshotPeerUnavailable(decision.advice)
        if decision.verdict == "commit":
            return _committed(exchange, decision)
        await _try(exchange, number, decision)
        number += 1


def _publish(exchange: Exchange, number: int, decision: Decision) -> None:
    exchange.service.decisions[exchange.store.generation, number] = decision


async def _results(exchange: Exchange, members: Sequence[int], number: int, decision: Decision) -> list[str]:
    """What went wrong, of all nodes."""

    async def result(node: int) -> str:
        while True:
            answer, _ = await exchange.ask(node, AskResult(number), ResultAnswer)
            if answer.problem is not None:
                return str(answer.problem)
            await asyncio.sleep(exchange.limits.poll_seconds)

    others = (result(node) for node in members if node != exchange.member.node)
    found = await gathered([_try(exchange, number, decision), *others])
    return [problem for problem in found if problem]


def _committed(exchange: Exchange, decision: Decision) -> Restored:
    assert decision.snapshot is not None
    exchange.check_fence()
    held = find(exchange.store, decision.snapshot, State.PARITY)
    assert held is not None
    fail_at("recovered")
    exchange.store.complete(held.slot, decision.snapshot)
    exchange.store.roll_back(decision.snapshot)
    return Restored(decision.snapshot, decision.lost, decision.bad)


async def _examined(exchange: Exchange, members: Sequence[int], snapshot: Snapshot) -> Decision:
    """Whether it can be rebuilt ("rebuild"), or why not."""
    holdings = await _holdings(exchange, members)
    holders = {node: each for node, slots in holdings.items() for each in slots if each.snapshot == snapshot}
    nodes = range(exchange.member.num_nodes)
    tables = await gathered(_any_table(exchange, snapshot, node, holders) for node in nodes)
    known = [table for table in tables if table]
    if len(known) < len(tables):
        lost_names = [f"node {node}" for node in nodes if node not in holders]
        names = [f"all checksums of node {node}" for node, table in enumerate(tables) if table is None]
        return Decision("refused", snapshot, names=(*lost_names, *names), stands=exchange.coding.stands)
    try:
        layout = layout_of(exchange.coding, known)
    except InvalidArgument as error:  # it was never PARITY anywhere
        return Decision("refused", snapshot, names=(str(error),), stands=exchange.coding.stands)
    # Who has other bytes than its table says has nothing.
    sound = [node for node, slot in holders.items() if slot.data_bytes == known[node].num_bytes]
    lost = tuple(node for node in nodes if node not in sound)
    found = await gathered(_bad(exchange, layout, holders[node], known[node]) for node in sound)
    bad = tuple(span for spans in found for span in spans)
    try:
        layout.recovery(lost, bad)
    except UnrecoverableSnapshot as error:
        return Decision("refused", snapshot, names=error.lost, stands=error.stands)
    return Decision("rebuild", snapshot, layout.node_bytes, layout.shares, lost, bad)


async def _any_table(exchange: Exchange, snapshot: Snapshot, node: int, holders: Iterable[int]) -> Table | None:
    """A node's table, of itself or else of any other that has it whole."""
    for holder in sorted(holders, key=lambda holder: holder != node):
        _, content = await exchange.ask(holder, AskTable(snapshot, node), Done)
        table = Table.unpacked(content)
        if table and (table.node, table.snapshot, table.block_bytes) == (node, snapshot, exchange.member.block_bytes):
            return table
    return None


async def _bad(exchange: Exchange, layout: Layout, held: Held, table: Table) -> tuple[Span, ...]:
    """What of a node that has the snapshot is not as it was written."""
    seconds = exchange.limits.recovery_seconds
    answer: Verified
    answer, _ = await exchange.ask(
        table.node, Verify(table.snapshot), Verified, table.packed(), timeout_seconds=seconds
    )  # fmt: skip
    if held.state >= State.PARITY and answer.parity_bytes == layout.parity_bytes:
        return answer.bad
    parity = Span(table.node, Area.PARITY, 0, layout.parity_bytes)
    return (*(span for span in answer.bad if span.area is Area.DATA), parity)


async def _try(exchange: Exchange, number: int, decision: Decision) -> str:
    """Carry this node's part out; what went wrong is for the leader."""
    try:
        await _rebuild(exchange, decision)
    except SnapshotPeerRefused as error:
        if error.reason == "generation":
            raise
        problem = f"node {exchange.member.node}'s part ({error})"
    except StowplanError as error:
        problem = f"node {exchange.member.node}'s part ({error})"
    else:
        problem = ""
    exchange.service.results[exchange.store.generation, number] = problem
    return problem


async def _rebuild(exchange: Exchange, decision: Decision) -> None:
    snapshot, node, store = decision.snapshot, exchange.member.node, exchange.store
    assert snapshot is not None
    layout = Layout(exchange.coding, decision.node_bytes, decision.shares)
    whole = layout.recovery(decision.lost, decision.bad)
    plan = Plan(
        tuple(span for span in whole.destinations if span.node == node),
        tuple(term for term in whole.terms if term.destination.node == node),
    )
    tables = {}
    for each in range(exchange.member.num_nodes):
        tables[each] = await _decided_table(exchange, snapshot, each, decision)
    if node in decision.lost:
        slot = store.rebuild(snapshot, layout.node_bytes[node], tables[node].schema_bytes, tables[node].shares)
    else:
        held = find(store, snapshot, State.LOCAL)
        if held is None:
            raise SnapshotPeerRefused("absent", f"node {node} no longer has {snapshot}.")
        slot = held.slot
    data, parity = store.data(slot), store.parity(slot, layout.parity_bytes)
    areas = {Area.DATA: data, Area.PARITY: parity}
    await exchange.carry_out(plan, snapshot, areas, tables, urgent=True)
    size = exchange.member.block_bytes
    if node in decision.lost or any(span.area is Area.DATA for span in plan.destinations):
        if tuple(await crcs_in_turn(data, size)) != tables[node].crcs:
            raise SnapshotPeerRefused("bad", f"node {node}'s decoded bytes of {snapshot} do not have their CRCs.")
        exchange.check_fence()
        store.complete_data(slot, snapshot, tables[node].crcs)
    for other, table in tables.items():
        if other != node:
            store.keep_table(slot, other, table.packed())
    made = await crcs_in_turn(parity, size)
    exchange.check_fence()
    held = find(store, snapshot, State.PARITY)
    expected = store.parity_crcs(slot) if held and held.parity_bytes == layout.parity_bytes else None
    if expected is None:  # all of it was made now, of bytes that were verified
        store.complete_parity(slot, snapshot, layout.parity_bytes, made)
    elif made != list(expected):
        raise SnapshotPeerRefused("bad", f"node {node}'s parity of {snapshot} does not have its CRCs.")


async def _decided_table(exchange: Exchange, snapshot: Snapshot, node: int, decision: Decision) -> Table:
    """As the leader found it: its owner's, or any that is whole."""
    holders = [each for each in range(exchange.member.num_nodes) if each not in decision.lost]
    table = await _any_table(exchange, snapshot, node, holders)
    if table is None or (table.num_bytes, table.shares) != (decision.node_bytes[node], decision.shares[node]):
        raise SnapshotPeerRefused("bad", f"nobody has node {node}'s table of CRCs of {snapshot} any more.")
    return table
