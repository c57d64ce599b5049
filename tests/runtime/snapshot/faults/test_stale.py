"""What is left of former starts: ranks that live on, nodes that were cut off, other runs."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_a_rank_that_lives_on_cannot_write(jobs, quiet):
    job = jobs("a")
    stale = job.start(hold_at=(3,))
    stale.held(3)
    pid = stale.processes[0].pid
    (said,) = job.start().failed()
    assert f"process {pid} still has rank 0's memory mapped" in said
    stale.go(3)
    (said,) = stale.failed()
    assert "SnapshotRefused" in said
    assert "stale" in said
    assert job.start().finished().restored == "3"
    job.check(quiet(1))


def test_a_node_that_was_cut_off_changes_nothing(jobs, quiet):
    job = jobs("ab", steps=8)
    stale = job.start(hold_at=(3,))
    stale.held(3)
    stale.kill([0])
    start = job.start("ac", hold_at=(5,))
    start.held(5)
    stale.go(3)
    assert stale.failed([1])
    start.go(5)
    assert start.finished().restored == "3"
    job.check(quiet(2, 8))
    with job.memory("b") as written:
        assert written.header.snapshot.step == 3
    start.kill()


def test_another_run_has_nothing_of_it(jobs, quiet):
    job = jobs("ab", hold_at=(3,))
    start = job.start()
    start.held(3)
    start.kill()
    assert job.start(run="job-2", hold_at=()).finished().restored == "nothing"
    assert job.start(hold_at=()).finished().restored == "3"
    job.check(quiet(2))
