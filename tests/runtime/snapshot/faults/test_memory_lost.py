"""Memory processes that are killed, while training goes on and while it recovers."""

from __future__ import annotations

import pytest

from tests.runtime.snapshot.faults.conftest import full

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("point", ["checksums", full("local"), "encode", full("parity"), "global"])
def test_training_goes_on_and_so_do_snapshots(jobs, quiet, point):
    job = jobs("ab", steps=10)
    start = job.start(rules=f"{point}@b:3=kill", hold_at=(8,))
    start.held(8)
    assert job.marks.joinpath(f"{point}@b:3").exists()
    steps = start.steps()
    assert "a memory process was lost" in steps[4]
    assert [steps[step] for step in (7, 8)] == ["saved", "saved"]
    assert (job.reduced("a"), job.reduced("b")) == ((), ())
    start.kill()
    assert job.start().finished().restored == "8"
    job.check(quiet(2, 10))


def test_in_the_middle_of_a_rank_s_copy(jobs, quiet):
    job = jobs("aabb", steps=10)
    start = job.start(rules="copy.during@rank-2:3=stall:2", hold_at=(8,))
    job.struck("copy.during@rank-2:3")
    job.kill_memory("b")
    start.held(8)
    assert "a memory process was lost meanwhile" in start.steps(2)[3]
    assert "a memory process was lost" in start.steps()[4]
    assert {start.steps(rank)[5] for rank in range(4)} == {"saved"}
    start.kill()
    assert job.start().finished().restored == "8"
    job.check(quiet(4, 10))


def test_with_two_ranks_and_then_the_node_s_loss(jobs, quiet):
    job = jobs("aabb", steps=10)
    start = job.start(hold_at=(3, 8))
    start.held(3)
    job.kill_memory("b")
    start.go(3)
    start.held(8)
    assert "a memory process was lost" in start.steps()[4]
    job.lose("a")
    start.kill()
    assert job.start().finished().restored == "8", "what was adopted and coded anew counts"
    job.check(quiet(4, 10))


def test_before_the_first_snapshot(jobs, quiet):
    job = jobs("ab")
    start = job.start(interval=2, hold_at=(1, 4))
    start.held(1)
    job.kill_memory("b")
    start.go(1)
    start.held(4)
    assert start.steps()[4] == "saved"
    start.kill()
    assert job.start().finished().restored == "4"
    job.check(quiet(2))


def test_all_of_them_at_once(jobs, quiet):
    job = jobs("ab", steps=8)
    start = job.start(hold_at=(3, 7))
    start.held(3)
    job.kill_memory("a")
    job.kill_memory("b")
    start.go(3)
    start.held(7)
    start.kill()
    assert job.start().finished().restored == "7"
    job.check(quiet(2, 8))


def test_with_its_trainer_on_one_node(jobs, quiet):
    job = jobs("ab", hold_at=(3,))
    start = job.start()
    start.held(3)
    job.lose("b")
    start.kill()
    assert job.start(hold_at=()).finished().restored == "3", "computed from the other node"
    job.check(quiet(2))


@pytest.mark.parametrize("point", [full("recover"), "rebuild", full("recovered")])
def test_while_it_recovers_a_lost_node(jobs, quiet, point):
    job = jobs("abc", hold_at=(3,))
    start = job.start()
    start.held(3)
    job.lose("b")
    start.kill()
    said = job.start(rules=f"{point}@b=kill").failed()
    assert any("SnapshotProcessUnavailable" in each for each in said), "where it was"
    assert job.start(hold_at=()).finished().restored == "3"
    job.check(quiet(3))


def test_while_it_recovers_and_no_other_node_was_lost(jobs, quiet):
    job = jobs("abc", hold_at=(3,))
    start = job.start(rules="recovered@a=kill")  # memory processes have the rules of the start that they are of
    start.held(3)
    start.kill()
    said = job.start().failed()
    assert any("SnapshotProcessUnavailable" in each for each in said)
    assert job.start(hold_at=()).finished().restored == "3"
    job.check(quiet(3))
