"""Hosts that have not the memory that snapshots take."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.slow


def test_it_is_told_with_the_size(jobs):
    job = jobs("ab")
    start = job.start(rules="reserve=raise:ENOMEM")
    for said in start.failed():
        assert re.search(r"SnapshotMemoryUnavailable: rank 0's snapshots .* take .* \(\d+ bytes\)", said)
        assert "Cannot allocate memory" in said
    assert start.steps() == {}
