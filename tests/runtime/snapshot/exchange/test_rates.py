"""Bytes in a time, by a clock that tests turn."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan import InvalidArgument
from stowplan.runtime.snapshot.exchange.rates import TokenBucket
from tests.runtime.snapshot.nodes import Group, snapshot_id


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds
        await asyncio.sleep(0)


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 3)), max_size=30), st.integers(0, 3000))
def test_never_more_than_the_rate_allows_and_no_slower(calls, burst):
    clock = Clock()

    async def body():
        bucket = TokenBucket(1000, burst, clock=clock, sleep=clock.sleep)
        passed, waited = 0, 0.0
        for num_bytes, pause in calls:
            clock.now += pause
            begin = clock.now
            await bucket.take(num_bytes)
            waited += clock.now - begin
            passed += num_bytes
            assert passed <= burst + 1000 * clock.now + 1e-6
        assert 1000 * waited <= passed + 1e-6

    asyncio.run(body())


def test_coding_waits_for_the_bucket_and_recovery_does_not():
    clock = Clock()

    async def body():
        async with Group("raim5", [40_000] * 3) as group:
            for node in group.nodes.values():
                node.service._bucket = TokenBucket(1000, 0, clock=clock, sleep=clock.sleep)
            first = snapshot_id(1)
            group.commit(first)
            await group.code_all(first)
            group.check(first)
            # Each node sends two chunks of its data, half of it each; the clock is shared.
            assert clock.now >= 40_000 / 1000
            before = clock.now
            await group.restart([1])
            await group.recover_all()
            group.check(first)
            assert clock.now == before

    asyncio.run(body())


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (float("nan"), 1), (1, -1)])
def test_what_is_no_rate_is_refused(rate, burst):
    with pytest.raises(InvalidArgument, match="bytes_per_second="):
        TokenBucket(rate, burst)
