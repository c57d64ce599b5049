"""Hosts that have not the memory that snapshots take."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.slow


def test_it_is_told_with_the_size_before_the_first_step(jobs):
    job = jobs("ab")
    start = job.start(rules="reserve@b=raise:ENOMEM")
    others, own = start.failed()
    assert "SnapshotMemoryUnavailable: " in own
    assert "RankFailed: " in others
    for said in (own, others):
        assert re.search(r"rank 0's snapshots .* take .* \(\d+ bytes\)", said)
        assert "Cannot allocate memory" in said
    assert start.losses() == [{}, {}]
