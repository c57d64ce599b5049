"""Nodes that are lost with all that is on them: replaced, or too many."""

from __future__ import annotations

import pytest

from stowplan.runtime.snapshot.memory.slots import State
from tests.runtime.snapshot.faults.conftest import full

RANDOM_BYTES = 24 << 10  # the states of four generators
pytestmark = pytest.mark.slow


def held(job, step=3, **changes):
    """A start whose ranks wait after this step, all snapshots complete."""
    start = job.start(hold_at=(step,), **changes)
    start.held(step)
    return start


def newest(job, node):
    """Step and state of the newest snapshot on a node, as its memory has it."""
    with job.memory(node) as written:
        return written.header.snapshot.step, written.header.state


@pytest.mark.parametrize(("nodes", "then"), [("ab", "ba"), full("aabb", "bbaa"), full("abcd", "acdb")])
def test_nodes_come_in_another_order(jobs, quiet, nodes, then):
    """A launcher gives the ranks to nodes in another order, as some do after one was replaced."""
    job = jobs(nodes)
    held(job).kill()
    assert job.start(then, hold_at=()).finished().restored == "3"
    job.check(quiet(len(nodes)))


@pytest.mark.parametrize(("nodes", "then"), [full("ab", "ac"), ("ab", "cb"), ("aabb", "aacc"), full("abcd", "axcd")])
def test_one_is_replaced_under_another_name(jobs, quiet, nodes, then):
    job = jobs(nodes)
    start = held(job)
    job.lose(next(node for node in nodes if node not in then))
    start.kill()
    assert job.start(then).finished().restored == "3"
    job.check(quiet(len(nodes)))


def test_one_after_the_other(jobs, quiet):
    job = jobs("abc", steps=8)
    start, nodes = held(job), "abc"
    for step, lost, new in ((3, "a", "x"), (5, "b", "y"), (6, "c", "z")):
        job.lose(lost)
        start.kill()
        nodes = nodes.replace(lost, new)
        start = job.start(nodes, hold_at=({3: 5, 5: 6, 6: 7}[step],))
        start.until("HELD")
        assert start.restored == str(step)
    start.kill()
    job.start(nodes)
    job.check(quiet(3, 8))


def test_two_with_a_code_that_stands_two(jobs, quiet):
    job = jobs("abcd", m=2)
    start = held(job)
    job.lose("b")
    job.lose("d")
    start.kill()
    assert job.start("axcy").finished().restored == "3"
    job.check(quiet())


@pytest.mark.parametrize(("nodes", "m", "then"), [("abcd", 1, "axcd"), ("aabb", 1, "aacc"), full("abcd", 2, "axcy")])
def test_of_replicated_training(jobs, quiet, nodes, m, then):
    """Other nodes have copies of its share, of their own replicas: only what describes it is sent between nodes."""
    job = jobs(nodes, replicated=True, m=m)
    start = held(job)
    for rank in (rank for node in sorted(set(nodes)) for rank in job.status(node).ranks):
        data_bytes, schema_bytes = max((slot.data_bytes, slot.schema_bytes) for slot in rank.slots)
        assert 0 < rank.received_bytes < m * (schema_bytes + RANDOM_BYTES) < data_bytes / 2
    for node in set(nodes) - set(then):
        job.lose(node)
    start.kill()
    assert job.start(then).finished().restored == "3"
    job.check(quiet(4, replicated=True))


def test_two_with_a_code_that_stands_one_are_refused(jobs):
    job = jobs("abcd")
    start = held(job)
    job.lose("b")
    job.lose("d")
    start.kill()
    for nodes in ("axcy", "abcd"):  # asking again changes nothing
        for said in job.start(nodes).failed():
            assert "UnrecoverableSnapshot" in said
            assert "node 1, node 3" in said
            assert "raim5" in said, "what the code stands"


def test_two_with_a_copy_on_disk(jobs, quiet, tmp_path):
    job = jobs("abcd", disk=tmp_path)
    start = held(job, 4)
    start.wait_for(lambda: list(tmp_path.glob("step_*/COMPLETE")), "a copy on disk")
    job.lose("b")
    job.lose("d")
    start.kill()
    newest = max(path.parent.name for path in tmp_path.glob("step_*/COMPLETE"))
    assert job.start().finished().restored == str(int(newest[5:]))
    job.check(quiet())


def test_one_in_the_middle_of_coding(jobs, quiet):
    job = jobs("abcd")
    start = job.start(rules="encode@b:3=stall:2")
    job.struck("encode@b:3")
    job.lose("c")
    start.kill()
    assert job.start("abxd").finished().restored == "2", "nobody has c's bytes of the third"
    job.check(quiet())


@pytest.mark.parametrize("rule", ["copy.during@rank-1:4=kill", full("checksums@b:4=kill")])
def test_members_have_different_newest_snapshots(jobs, quiet, rule):
    job = jobs("ab")
    start = job.start(rules=rule)
    job.struck(rule.partition("=")[0])
    start.wait_for(lambda: newest(job, "a") == (4, State.LOCAL), "the fourth on the other node")
    start.kill()
    job.lose("b")
    assert job.start().finished().restored == "3", "the newest that both have had"
    job.check(quiet(2))


def test_one_that_has_not_heard_that_all_have_parity(jobs, quiet):
    job = jobs("ab")
    start = job.start(rules="global@b:4=stall:3")
    job.struck("global@b:4")
    start.wait_for(lambda: newest(job, "a") >= (4, State.PARITY), "parity of the fourth")
    job.lose("b")
    start.kill()
    assert job.start("ac").finished().restored == "4"
    job.check(quiet(2))
