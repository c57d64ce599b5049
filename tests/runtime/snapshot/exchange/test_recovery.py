"""After losses: the newest snapshot that can be had, bit for bit, or a refusal; never wrong bytes."""

from __future__ import annotations

import asyncio
import copy
import random
from dataclasses import replace
from itertools import combinations

import pytest

from stowplan import InvalidArgument, SnapshotPeerUnavailable, UnrecoverableSnapshot
from stowplan.runtime.snapshot.codes import Area
from stowplan.runtime.snapshot.exchange.exchange import Verdict
from stowplan.runtime.snapshot.exchange.node_store import block_crcs, find
from stowplan.runtime.snapshot.exchange.recovery import Restored, recover
from stowplan.runtime.snapshot.memory.slots import State
from tests.runtime.snapshot.nodes import CODES, QUICK, Group, snapshot_id

FIRST, SECOND, THIRD = (snapshot_id(sequence) for sequence in (1, 2, 3))
SOON = replace(QUICK, recovery_seconds=0.6, timeout_seconds=0.2)


async def coded(group, *snapshots):
    for snapshot in snapshots:
        group.commit(snapshot)
        assert {each.verdict for each in (await group.code_all(snapshot)).values()} == {Verdict.GLOBAL}


def assert_restored(found, snapshot):
    assert all(isinstance(each, Restored) and each.snapshot == snapshot for each in found), found


@pytest.mark.parametrize(("size", "share"), [(1, 0), (12345, 0), (1000, 9001)])
@pytest.mark.parametrize(("name", "m"), CODES)
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_loss_is_restored_or_refused(name, m, n, size, share):
    if n <= m:
        pytest.skip("too few nodes")
    sizes = [max(0, size - 5 * node) for node in range(n)]
    shares = [share + 7 * node for node in range(n)] if share else ()

    async def body():
        async with Group(name, sizes, seed=n, shares=shares) as group:
            await coded(group, FIRST, SECOND)
            stores = group.stores
            for lost in (each for count in (*range(m + 2), n) for each in combinations(range(n), count)):
                group.stores = copy.deepcopy(stores)
                await group.restart(lost)
                found = await group.recover_all()
                # Where nobody is left nobody has tables.
                if group.code.survives(lost) and len(lost) < n:
                    assert_restored(found, SECOND)
                    group.check(SECOND)
                else:
                    assert all(isinstance(each, UnrecoverableSnapshot) for each in found), found
                    names = {name for node in lost for name in (f"node {node}", f"all checksums of node {node}")}
                    assert found[0].lost
                    assert set(found[0].lost) <= names

    asyncio.run(body())


@pytest.mark.parametrize(("name", "m"), CODES)
def test_a_flipped_bit_in_a_share_or_in_a_copy_is_an_erasure(name, m):
    async def body():
        async with Group(name, [100] * 4, shares=[5000] * 4) as group:
            await coded(group, FIRST)
            store = group.stores[2]
            (held,) = store.held()
            for byte in (150, 5050, 5150):  # in the share, in the block that both are in, in a copy
                store.data(held.slot)[byte] ^= 1
            await group.restart([] if m == 1 else [0])
            assert_restored(await group.recover_all(), FIRST)
            group.check(FIRST)

    asyncio.run(body())


def test_a_share_and_all_of_its_copies_damaged_is_refused():
    async def body():
        async with Group("raim5", [100] * 4, shares=[5000] * 4) as group:
            await coded(group, FIRST)
            for node, byte in ((2, 200), (3, 5200)):
                (held,) = group.stores[node].held()
                group.stores[node].data(held.slot)[byte] ^= 1
            await group.restart()
            for found in await group.recover_all():
                assert isinstance(found, UnrecoverableSnapshot)

    asyncio.run(body())


def test_blocks_of_4_mib():
    async def body():
        async with Group("rs", [9_000_001, 5_000_000, 3, 8 << 20], block_bytes=4 << 20) as group:
            await coded(group, FIRST)
            await group.restart([0, 3])
            assert_restored(await group.recover_all(), FIRST)
            group.check(FIRST)

    asyncio.run(body())


def test_too_much_lost_names_nodes_code_and_the_copy_on_disk():
    async def body():
        async with Group("raim5", [10_000] * 4) as group:
            await coded(group, FIRST)
            await group.restart([1, 2])
            found = await group.recover_all(newest_on_disk="step 7 in /data/run")
            for error in found:
                assert "lost are node 1, node 2, and raim5 of 4 nodes stands the loss of any 1 node" in str(error)
                assert "newest copy on disk: step 7 in /data/run" in str(error)
            assert [len(store.held()) for store in group.stores] == [1, 0, 0, 1]  # nothing was given up

    asyncio.run(body())


@pytest.mark.parametrize("area", Area)
@pytest.mark.parametrize("lost", [(), (3,)])
@pytest.mark.parametrize("name", ["raim5", "rs"])
def test_a_flipped_bit_is_an_erasure(name, lost, area):
    async def body():
        async with Group(name, [60_000] * 5) as group:
            await coded(group, FIRST, SECOND)
            slot = find(group.stores[1], SECOND).slot
            group.stores[1].bytes[slot][area][9000] ^= 32
            await group.restart(lost)
            found = await group.recover_all()
            if lost and name == "raim5":
                # Beyond the code at that place of the newer snapshot; the lost node has the older one nowhere either.
                assert_restored(found, FIRST)
                group.check(FIRST)
            else:
                assert_restored(found, SECOND)
                group.check(SECOND)
                assert [span.node for span in found[0].bad] == [1]
                assert found[0].lost == lost

    asyncio.run(body())


@pytest.mark.parametrize("which", ["data", "parity"])
@pytest.mark.parametrize("lost", [(), (3,)])
def test_a_damaged_table_of_checksums_costs_no_bytes_that_others_can_vouch_for(lost, which):
    async def body():
        async with Group("rs", [60_000] * 5) as group:
            await coded(group, FIRST)
            group.stores[1].crcs[0][which] = None
            await group.restart(lost)
            found = await group.recover_all()
            assert_restored(found, FIRST)
            group.check(FIRST)
            assert {(span.node, span.area) for span in found[0].bad} == (
                {(1, Area.PARITY)} if which == "parity" else set()
            )

    asyncio.run(body())


def test_a_replica_of_a_table_that_is_damaged_is_not_used():
    async def body():
        async with Group("raim5", [60_000] * 3) as group:
            await coded(group, FIRST)
            table = bytearray(group.stores[0].others[0][2])
            table[-6] ^= 1
            group.stores[0].others[0][2] = bytes(table)
            await group.restart([2])
            assert_restored(await group.recover_all(), FIRST)
            group.check(FIRST)

    asyncio.run(body())


def test_decoded_bytes_that_are_not_the_owners_are_refused_and_the_older_snapshot_taken():
    async def body():
        async with Group("raim5", [60_000] * 3) as group:
            await coded(group, FIRST, SECOND)
            # Parity that is wrong and has the CRCs of what is wrong: only the lost node's table can tell.
            store = group.stores[0]
            slot = find(store, SECOND).slot
            store.bytes[slot]["parity"][77] ^= 1
            held = find(store, SECOND)
            view = store.parity(slot, held.parity_bytes)
            store.crcs[slot]["parity"] = block_crcs(view, group.block_bytes)
            await group.restart([2])
            assert_restored(await group.recover_all(), FIRST)
            group.check(FIRST)

    asyncio.run(body())


def test_before_parity_all_data_is_enough_and_one_lost_node_goes_back():
    async def body():
        for lost, expected in (((), SECOND), ((1,), FIRST)):
            async with Group("raim5", [20_000] * 3) as group:
                await coded(group, FIRST)
                group.commit(SECOND)
                await group.restart(lost)
                assert_restored(await group.recover_all(), expected)
                group.check(expected)
                assert all(find(store, SECOND) is None for store in group.stores) == (expected is FIRST)

    asyncio.run(body())


def test_members_at_different_states_of_the_newest():
    async def body():
        async with Group("raim5", [20_000] * 4) as group:
            await coded(group, FIRST)
            group.commit(SECOND)
            await asyncio.gather(*(group.nodes[node]._make_parity(SECOND) for node in (0, 1, 2)))
            await group.code_all(SECOND, [])  # nobody knows that all have parity
            group.stores[3].rebuild(SECOND, 20_000)  # was still being written
            await group.restart()
            assert_restored(await group.recover_all(), SECOND)
            group.check(SECOND)

    asyncio.run(body())


def test_a_node_that_never_had_the_newest_goes_back_with_all():
    async def body():
        async with Group("mirror", [20_000] * 3) as group:
            await coded(group, FIRST)
            group.commit(SECOND, [0, 1])
            await group.restart()
            assert_restored(await group.recover_all(), FIRST)
            group.check(FIRST)
            assert all(len(store.held()) == 1 for store in group.stores)

    asyncio.run(body())


def test_without_a_replacement_the_others_are_made_whole():
    async def body():
        async with Group("rs", [20_000] * 4) as group:
            await coded(group, FIRST)
            group.stores[0].bytes[0]["data"][0] ^= 1
            await group.restart()
            await group.kill(2)
            assert_restored(await group.recover_all([0, 1, 3]), FIRST)
            group.check(FIRST, [0, 1, 3])

    asyncio.run(body())


def test_after_recovery_snapshots_go_on():
    async def body():
        async with Group("raim5", [20_000] * 3) as group:
            await coded(group, FIRST)
            await group.restart([0])
            assert_restored(await group.recover_all(), FIRST)
            newer = snapshot_id(2, generation=2)
            await coded(group, newer)
            await group.restart([1], generation=3)
            assert_restored(await group.recover_all(), newer)
            group.check(newer)

    asyncio.run(body())


def test_only_what_is_needed_is_fetched():
    asked = []

    async def body():
        async with Group("raim5", [40_960] * 5) as group:
            await coded(group, FIRST)
            await group.restart([4])
            for node in range(5):
                read = group.nodes[node].service._read
                group.nodes[node].service._read = lambda request, read=read: (
                    asked.append(request.length),
                    read(request),
                )[1]
            assert_restored(await group.recover_all(), FIRST)
            # Four chunks of data and one of parity, each from a chunk of four nodes.
            assert sum(asked) == 5 * 4 * 10_240

    asyncio.run(body())


def test_a_cut_in_recovery_is_gone_over():
    def harm(begin, towards_server, chunk):
        return None if not towards_server and begin // 20_000 != (begin + len(chunk)) // 20_000 else chunk

    async def body():
        async with Group("raim5", [100_000] * 3) as group:
            await coded(group, FIRST)
            group.harms = {(2, 0): harm, (1, 2): harm}
            await group.restart([2])
            assert_restored(await group.recover_all(), FIRST)
            group.check(FIRST)
            assert group.proxies[2, 0].connections > 2

    asyncio.run(body())


def test_who_does_not_answer_is_named_and_nothing_is_given_up():
    async def body():
        async with Group("raim5", [10_000] * 3, SOON) as group:
            await coded(group, FIRST)
            await group.restart()
            await group.kill(2)
            found = await asyncio.gather(*(recover_among_three(group, node) for node in (0, 1)), return_exceptions=True)
            assert all(isinstance(each, SnapshotPeerUnavailable) for each in found), found
            assert "node 2" in str(found[0])
            assert all(find(store, FIRST).state is State.GLOBAL for store in group.stores)
            with pytest.raises(InvalidArgument, match="without node 0"):
                await recover_among_three(group, 0, alive=[1, 2])

    asyncio.run(body())


def test_who_was_lost_meanwhile_ends_it_for_all_long_before_the_time_is_over():
    async def body():
        limits = replace(QUICK, timeout_seconds=0.2, recovery_seconds=10_000)
        async with Group("raim5", [10_000] * 3, limits) as group:
            await coded(group, FIRST)
            await group.restart()
            await group.kill(2)
            found = await asyncio.gather(*(recover_among_three(group, node) for node in (0, 1)), return_exceptions=True)
            assert all(isinstance(each, SnapshotPeerUnavailable) for each in found), found
            assert "node 2" in str(found[0])
            assert str(found[1]) == str(found[0]), "who follows hears it from who leads"

    asyncio.run(body())


async def recover_among_three(group, node, alive=(0, 1, 2)):
    return await recover(group.nodes[node], alive)


@pytest.mark.parametrize("seed", range(12))
def test_kills_at_any_time(seed):
    """Nodes die while snapshots are made; what is restored is right, and never older than what was GLOBAL anywhere."""
    print(f"seed {seed}")
    chosen = random.Random(seed)
    name, m = chosen.choice(CODES)
    n = chosen.randint(m + 1, 5)
    sizes = [chosen.choice([0, 1, 5_000, 40_001]) for _ in range(n)]

    async def body():
        sequence, generation = 0, 1
        async with Group(name, sizes, QUICK, seed=seed) as group:
            for _ in range(4):
                newest = 0
                for _ in range(chosen.randint(1, 3)):
                    sequence += 1
                    snapshot = snapshot_id(sequence, generation)
                    group.commit(snapshot)
                    outcomes = await group.code_all(snapshot)
                    assert {each.verdict for each in outcomes.values()} == {Verdict.GLOBAL}, outcomes
                    newest = sequence
                sequence += 1
                snapshot = snapshot_id(sequence, generation)
                group.commit(snapshot, chosen.sample(range(n), chosen.randint(0, n)))
                started = [node for node in range(n) if find(group.stores[node], snapshot)]
                tasks = [asyncio.ensure_future(group.nodes[node].code(snapshot)) for node in started]
                for _ in range(chosen.randint(0, 60)):
                    await asyncio.sleep(0.0005)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                if any(find(store, snapshot, State.GLOBAL) for store in group.stores):
                    newest = sequence
                lost = chosen.sample(range(n), chosen.randint(0, m))
                generation += 1
                await group.restart(lost, generation)
                found = await group.recover_all()
                assert all(isinstance(each, Restored) for each in found), (lost, found)
                restored = {each.snapshot for each in found}
                assert len(restored) == 1
                assert restored.copy().pop().sequence >= newest
                group.check(restored.pop())

    asyncio.run(body())
