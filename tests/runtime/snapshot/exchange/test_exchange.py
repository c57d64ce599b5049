"""Parity over connections: right, or not made at all, whatever happens on the way."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from stowplan import InvalidArgument
from stowplan.runtime.snapshot.codes import code_for
from stowplan.runtime.snapshot.exchange.authentication import JobToken
from stowplan.runtime.snapshot.exchange.exchange import Exchange, Verdict, member_of
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.exchange.node_store import Table, find
from stowplan.runtime.snapshot.exchange.peer_messages import AskState, StateAnswer
from stowplan.runtime.snapshot.memory.slots import State
from tests.runtime.snapshot.nodes import CODES, QUICK, TOKEN, Group, MemoryStore, snapshot_id

FIRST, SECOND, THIRD = (snapshot_id(sequence) for sequence in (1, 2, 3))
SOON = replace(QUICK, deadline_seconds=0.6, timeout_seconds=0.2)
SIZES = {"nothing": 0, "a byte": 1, "odd": 12345, "blocks": 8 * 4096, "large": 300_001}


def verdicts(outcomes):
    return {outcome.verdict for outcome in outcomes.values()}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("name", "m"), CODES)
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_nodes_come_to_global_with_the_parity_of_the_code(name, m, n, size):
    if n <= m:
        pytest.skip("too few nodes")

    async def body():
        async with Group(name, [max(0, size - 7 * node) for node in range(n)]) as group:
            group.commit(FIRST)
            assert verdicts(await group.code_all(FIRST)) == {Verdict.GLOBAL}
            group.check(FIRST)

    asyncio.run(body())


@pytest.mark.parametrize(("name", "m"), CODES)
def test_shares_are_not_sent(name, m):
    async def body():
        sizes = [100, 90, 80, 70]
        async with Group(name, sizes) as plain, Group(name, sizes, shares=[50_000, 40_000, 0, 1]) as group:
            for each in (plain, group):
                each.commit(FIRST)
                assert {found.verdict for found in (await each.code_all(FIRST)).values()} == {Verdict.GLOBAL}
                each.check(FIRST)
            received = [store.received_bytes for store in group.stores]
            assert received == [store.received_bytes for store in plain.stores]
            assert 0 < max(received) <= 4 * 100

    asyncio.run(body())


def test_copies_that_are_not_as_long_as_the_share_are_given_up():
    async def body():
        async with Group("raim5", [100, 100, 100], shares=[500, 600, 700]) as group:
            group.shares[1] = (600, 501)
            group.commit(FIRST)
            for found in (await group.code_all(FIRST)).values():
                assert found.verdict is Verdict.SKIPPED
                assert "node 1 has 501 bytes of node 0's share of 500" in found.reason or "given up" in found.reason

    asyncio.run(body())


def test_blocks_of_4_mib():
    async def body():
        async with Group("raim5", [5_000_000, 9_000_001, 3], block_bytes=4 << 20) as group:
            group.commit(FIRST)
            assert verdicts(await group.code_all(FIRST)) == {Verdict.GLOBAL}
            group.check(FIRST)

    asyncio.run(body())


def test_one_snapshot_after_the_other_in_two_slots():
    async def body():
        async with Group("rs", [20_000, 19_000, 0, 7]) as group:
            for snapshot in (FIRST, SECOND, THIRD):
                group.commit(snapshot)
                assert verdicts(await group.code_all(snapshot)) == {Verdict.GLOBAL}
            group.check(THIRD)
            group.check(SECOND)
            assert all(find(store, FIRST) is None for store in group.stores)

    asyncio.run(body())


def test_nodes_that_become_local_later_are_waited_for():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST, [0, 1])
            early = asyncio.ensure_future(group.code_all(FIRST, [0, 1]))
            await asyncio.sleep(0.05)
            assert {group.stores[node].slots[0].state for node in (0, 1)} == {State.LOCAL}
            group.commit(FIRST, [2])
            assert verdicts(await group.code_all(FIRST, [2])) == {Verdict.GLOBAL}
            assert verdicts(await early) == {Verdict.GLOBAL}
            group.check(FIRST)

    asyncio.run(body())


@pytest.mark.parametrize("reason", ["not local", "dead"])
def test_a_late_snapshot_is_skipped_and_the_next_one_is_made(reason):
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST)
            await group.code_all(FIRST)
            group.commit(SECOND, [0, 1])
            group.set_limits(SOON)
            if reason == "dead":
                await group.kill(2)
            outcomes = await group.code_all(SECOND, [0, 1])
            assert verdicts(outcomes) == {Verdict.SKIPPED}
            assert "node 2" in outcomes[0].reason.lower()
            group.check(FIRST)
            group.set_limits(QUICK)
            if reason == "dead":
                await group.launch(2)
                await group.connect()
            group.commit(THIRD)
            assert verdicts(await group.code_all(THIRD)) == {Verdict.GLOBAL}
            group.check(THIRD)

    asyncio.run(body())


def test_who_gives_up_tells_those_that_wait():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            await group.kill(2)
            await group.launch(2, limits=SOON)
            await group.connect()
            group.commit(FIRST, [0, 2])
            outcomes = await group.code_all(FIRST, [0, 2])
            assert verdicts(outcomes) == {Verdict.SKIPPED}
            assert "late" in outcomes[2].reason
            assert "node 2 has given up" in outcomes[0].reason

    asyncio.run(body())


def test_with_parity_a_node_waits_until_it_knows_and_a_later_call_goes_on():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST)
            await asyncio.gather(*(group.nodes[node]._make_parity(FIRST) for node in (0, 1)))
            group.set_limits(SOON)
            outcome = (await group.code_all(FIRST, [0]))[0]
            assert outcome.verdict is Verdict.PENDING
            assert "Node 2 is LOCAL" in outcome.reason
            assert find(group.stores[0], FIRST).state is State.PARITY
            group.set_limits(QUICK)
            assert verdicts(await group.code_all(FIRST)) == {Verdict.GLOBAL}
            group.check(FIRST)

    asyncio.run(body())


def test_one_global_node_is_proof_enough():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST)
            await asyncio.gather(*(group.nodes[node]._make_parity(FIRST) for node in range(3)))
            await group.code_all(FIRST, [0])
            await group.kill(2)
            assert (await group.code_all(FIRST, [1]))[1].verdict is Verdict.GLOBAL

    asyncio.run(body())


def test_with_parity_a_node_gives_up_where_another_did():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST)
            await group.nodes[0]._make_parity(FIRST)
            group.stores[2].give_up(0, FIRST)
            assert (await group.code_all(FIRST, [0]))[0].verdict is Verdict.SKIPPED
            assert find(group.stores[0], FIRST) is None

    asyncio.run(body())


@pytest.mark.parametrize("where", ["data", "data table", "flipped table"])
def test_wrong_bytes_are_never_folded_in(where):
    async def body():
        async with Group("raim5", [30_000] * 3) as group:
            group.commit(FIRST)
            await group.code_all(FIRST)
            group.commit(SECOND)
            slot = find(group.stores[1], SECOND).slot
            if where == "data":
                group.stores[1].bytes[slot]["data"][20_000] ^= 4
            elif where == "data table":
                group.stores[1].crcs[slot]["data"] = None
            else:
                group.stores[1].crcs[slot]["data"][5] ^= 1
            outcomes = await group.code_all(SECOND)
            assert verdicts(outcomes) == {Verdict.SKIPPED}
            assert any("node 1's" in outcome.reason for outcome in outcomes.values())
            group.check(FIRST)
            group.commit(THIRD)
            assert verdicts(await group.code_all(THIRD)) == {Verdict.GLOBAL}

    asyncio.run(body())


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("at", [3, 100, 700, 1500, 20_000])
def test_a_bit_changed_on_the_way_ends_that_connection_and_nothing_else(at, direction):
    flipped = []

    def harm(begin, towards_server, chunk):
        if towards_server == direction and not flipped and begin <= at < begin + len(chunk):
            flipped.append(at)
            changed = bytearray(chunk)
            changed[at - begin] ^= 16
            return bytes(changed)
        return chunk

    async def body():
        limits = replace(QUICK, timeout_seconds=0.3, handshake_seconds=0.3)
        async with Group("raim5", [60_000] * 3, limits, harms={(0, 1): harm}) as group:
            group.commit(FIRST)
            outcomes = await group.code_all(FIRST)
            # A proof that was changed is no proof: not retried. All else is.
            if Verdict.SKIPPED not in verdicts(outcomes):
                assert verdicts(outcomes) == {Verdict.GLOBAL}
                group.check(FIRST)
                assert not flipped or group.proxies[0, 1].connections >= 2
            else:
                assert "token" in outcomes[0].reason or "version" in outcomes[0].reason
                assert all(find(store, FIRST) is None for store in group.stores)

    asyncio.run(body())


def test_cut_again_and_again_goes_on_where_it_was():
    def harm(begin, towards_server, chunk):
        cut = not towards_server and begin // 25_000 != (begin + len(chunk)) // 25_000
        return None if cut else chunk

    async def body():
        async with Group("raim5", [200_000] * 3, harms={(0, 1): harm, (2, 0): harm}) as group:
            group.commit(FIRST)
            assert verdicts(await group.code_all(FIRST)) == {Verdict.GLOBAL}
            group.check(FIRST)
            proxy = group.proxies[0, 1]
            assert proxy.connections > 3
            assert proxy.passed[0] < 2 * 100_000  # of which it needs half; what had come was not asked for again

    asyncio.run(body())


def test_silence_longer_than_the_timeouts_skips_the_snapshot():
    def harm(begin, towards_server, chunk):
        return b"" if begin > 5000 and not towards_server else chunk

    async def body():
        async with Group("raim5", [200_000] * 3, SOON, harms={(0, 1): harm}) as group:
            group.commit(FIRST)
            outcomes = await group.code_all(FIRST)
            assert outcomes[0].verdict is Verdict.SKIPPED
            assert "node 1" in outcomes[0].reason
            assert "does not answer in time" in outcomes[0].reason
            later = await group.code_all(FIRST, [node for node in (1, 2) if find(group.stores[node], FIRST)])
            assert verdicts(later) <= {Verdict.SKIPPED}
            assert all(find(store, FIRST) is None for store in group.stores)

    asyncio.run(body())


def test_a_stale_node_is_refused_by_its_generation():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST)
            for node in (0, 1):
                group.stores[node].generation = 2
            outcomes = await group.code_all(FIRST)
            assert {outcome.verdict for outcome in outcomes.values()} == {Verdict.FENCED}
            assert "generation 1, which is stale" in outcomes[2].reason
            assert all(find(store, FIRST).state is State.LOCAL for store in group.stores)

    asyncio.run(body())


def test_a_restart_ends_coding_that_is_under_way_without_another_write():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST)
            for store in group.stores:
                store.parity(0, 8192)
            service, store = group.nodes[1].service, group.stores[0]
            read = service._read

            async def raised(request):
                content = await read(request)
                store.generation = 2
                store.parity(0, 8192)[:] = b"\x77" * 8192
                return content

            service._read = raised
            group.set_limits(SOON)
            outcome = (await group.code_all(FIRST))[0]
            assert outcome.verdict is Verdict.FENCED
            assert bytes(store.parity(0, 8192)) == b"\x77" * 8192
            assert find(store, FIRST).state is State.LOCAL

    asyncio.run(body())


def test_a_node_that_is_behind_is_waited_for():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            snapshot = snapshot_id(1, generation=2)
            for node in (0, 1):
                group.stores[node].generation = 2
            group.commit(snapshot)
            early = asyncio.ensure_future(group.code_all(snapshot, [0, 1]))
            await asyncio.sleep(0.05)
            group.stores[2].generation = 2
            assert verdicts(await group.code_all(snapshot, [2])) == {Verdict.GLOBAL}
            assert verdicts(await early) == {Verdict.GLOBAL}

    asyncio.run(body())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token": JobToken(b"another token, of another job")}, "does not take this job's token"),
        ({"run": "another"}, "run='another'"),
        ({"group": "another"}, "group='another'"),
        ({"block_bytes": 1 << 20}, "block_bytes=1048576"),
        ({"code": "mirror 3 1"}, "code='mirror 3 1'"),
        ({"node": 3}, "cannot ask node 0"),
    ],
)
def test_who_is_no_member_is_refused_and_says_why(changes, said):
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST)
            await group.kill(2)
            await group.launch(2, **changes)
            await group.connect()
            outcomes = await group.code_all(FIRST)
            assert verdicts(outcomes) == {Verdict.SKIPPED}
            assert said in outcomes[2].reason

    asyncio.run(body())


def test_pieces_in_memory_are_limited():
    most = 0

    async def body():
        nonlocal most
        async with Group("raim5", [100_000] * 5, replace(QUICK, most_pieces=2)) as group:
            link = type(group.nodes[0]._link(1))
            waiting, ask = 0, link.ask

            async def counted(self, request, *rest):
                nonlocal waiting, most
                reading = type(request).__name__ == "Read" and self._member.node == 0
                waiting += reading
                most = max(most, waiting)
                try:
                    return await ask(self, request, *rest)
                finally:
                    waiting -= reading

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(link, "ask", counted)
                group.commit(FIRST)
                assert verdicts(await group.code_all(FIRST)) == {Verdict.GLOBAL}

    asyncio.run(body())
    assert most == 2


def test_what_is_asked_of_the_caller():
    async def body():
        async with Group("raim5", [1] * 3) as group:
            with pytest.raises(InvalidArgument, match=r"snapshot 1 .* is not LOCAL on node 0"):
                await group.nodes[0].code(FIRST)
            with pytest.raises(InvalidArgument, match="block_bytes=0"):
                member_of("run", "group", 0, group.code, 0)
            with pytest.raises(InvalidArgument, match="node 3"):
                member_of("run", "group", 3, group.code, 1)

    asyncio.run(body())
    with pytest.raises(InvalidArgument, match="timeout_seconds=0 "):
        SnapshotLimits(timeout_seconds=0)
    with pytest.raises(InvalidArgument, match="takes longer than a request may"):
        Exchange(
            member_of("run", "group", 0, code_for(3), 1000), code_for(3), MemoryStore(), TOKEN,
            SnapshotLimits(bytes_per_second=100),
        )  # fmt: skip


def test_a_damaged_table_is_none():
    table = Table(1, FIRST, 10_000, 4096, (1, 2, 3))
    packed = table.packed()
    assert Table.unpacked(packed) == table
    for at in range(len(packed)):
        damaged = bytearray(packed)
        damaged[at] ^= 1
        assert Table.unpacked(bytes(damaged)) is None
        assert Table.unpacked(packed[:at]) is None


@pytest.mark.parametrize("coded", [False, True], ids=["asked", "coded"])
def test_what_begins_anew_is_no_longer_given_up(coded):
    """As when a snapshot of the same step is taken again."""

    async def body():
        async with Group("mirror", [5000, 5000], SOON) as group:
            ask = AskState(FIRST)
            group.commit(FIRST, [0])
            assert (await group.nodes[0].code(FIRST)).verdict is Verdict.SKIPPED
            assert (await group.nodes[1].ask(0, ask, StateAnswer))[0].given_up
            group.commit(FIRST, [0])
            if coded:
                task = asyncio.ensure_future(group.nodes[0].code(FIRST))
                await asyncio.sleep(0)
                task.cancel()
            else:
                assert not (await group.nodes[1].ask(0, ask, StateAnswer))[0].given_up
            group.stores[0].slots = [None, None]  # discarded by all, and about to begin again
            assert not (await group.nodes[1].ask(0, ask, StateAnswer))[0].given_up
            group.set_limits(QUICK)
            group.commit(FIRST)
            assert verdicts(await group.code_all(FIRST)) == {Verdict.GLOBAL}
            group.check(FIRST)

    asyncio.run(body())
