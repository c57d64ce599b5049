"""Trainers that are killed: at points of a snapshot's way, while another node codes, while they restore."""

from __future__ import annotations

import pytest

from tests.runtime.snapshot.faults.conftest import full

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("nodes", ["aaaa", "aabb", "abcd"])
def test_in_the_middle_of_the_copy(jobs, quiet, nodes):
    job = jobs(nodes)
    job.start(rules="copy.during@rank-1:4=kill").killed_by_itself(1)
    assert job.start().finished().restored == "3"
    job.check(quiet())


@pytest.mark.parametrize("nodes", [full("aaaa"), "abcd"])
def test_of_replicated_training(jobs, quiet, nodes):
    """Each rank has a share of what all have the same of; a lost node's is there, too."""
    job = jobs(nodes, replicated=True)
    job.start(rules="copy.during@rank-1:4=kill").killed_by_itself(1)
    if nodes == "abcd":
        job.lose("b")
    assert job.start().finished().restored == "3"
    job.check(quiet(4, replicated=True))


@pytest.mark.parametrize("point", [full("copy.begin"), "copy.end"])
def test_before_its_bytes_are_committed(jobs, quiet, point):
    job = jobs("ab")
    job.start(rules=f"{point}@rank-1:4=kill").killed_by_itself(1)
    assert job.start().finished().restored == "3"
    job.check(quiet(2))


def test_after_its_bytes_are_committed(jobs, quiet):
    job = jobs("ab")
    job.start(rules="commit.end@rank-1:4=kill").killed_by_itself(1)
    assert job.start().finished().restored in {"3", "4"}, "by whether rank 0 has committed, too"
    job.check(quiet(2))


@pytest.mark.parametrize(
    ("point", "found"),
    [
        full("checksums", {"3", "4"}),
        full("local", {"3", "4"}),
        ("encode", {"4"}),
        full("parity", {"4"}),
        ("global", {"4"}),
    ],
)
def test_while_its_node_is_slow_at(jobs, quiet, point, found):
    job = jobs("ab")
    start = job.start(rules=f"{point}@b:4=stall:2")
    job.struck(f"{point}@b:4")
    start.wait_for(lambda: all(4 in losses for losses in start.losses()), "the fourth step")
    start.kill()
    assert job.start().finished().restored in found, "what is LOCAL before the new generation counts"
    job.check(quiet(2))


@pytest.mark.parametrize("point", [full("restore.begin"), "restore.end"])
def test_while_it_restores(jobs, quiet, point):
    job = jobs("ab", hold_at=(3,))
    start = job.start()
    start.held(3)
    start.kill()
    job.start(rules=f"{point}@rank-1=kill").killed_by_itself(1)
    assert job.start(hold_at=()).finished().restored == "3"
    job.check(quiet(2))


def test_again_and_again_before_it_comes_to_a_snapshot(jobs, quiet):
    job = jobs("ab")
    for rank, count in ((0, 2), (1, 2), (0, 1), (1, 1)):
        start = job.start(rules=f"copy.during@rank-{rank}:{count}=kill")
        start.killed_by_itself(rank)
    assert job.start().finished().restored == "2"
    job.check(quiet(2))
