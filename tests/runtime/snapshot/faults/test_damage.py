"""Bits that flip in memory: erasures for the code, never wrong bytes."""

from __future__ import annotations

import pytest

from tests.runtime.snapshot.faults.conftest import full
from tests.runtime.snapshot.faults.test_nodes_lost import held

pytestmark = pytest.mark.slow
AREAS = ["data", full("parity"), "header", "table", full("parity table")]


def damaged(job, *nodes, areas):
    """A start that was killed after its third step, these areas of its newest snapshot being damaged then."""
    start = held(job)
    for node in nodes:
        with job.memory(node) as written:
            assert written.header.snapshot.step == 3
            for area in areas:
                written.flip(area)
    return start


@pytest.mark.parametrize("area", AREAS)
def test_one_bit(jobs, quiet, area):
    job = jobs("ab")
    damaged(job, "b", areas=[area]).kill()
    assert job.start().finished().restored == "3"
    job.check(quiet(2))


@pytest.mark.parametrize("area", [full("data"), full("table"), "header"])
def test_one_bit_and_its_memory_process_is_lost(jobs, quiet, area):
    job = jobs("ab", steps=8)
    start = damaged(job, "b", areas=[area])
    job.kill_memory("b")
    start.go(3)
    assert start.finished().steps()[7] == "saved"
    job.check(quiet(2, 8))


def test_checksums_that_are_missing(jobs, quiet):
    job = jobs("ab")
    start = held(job)
    with job.memory("b") as written:
        written.forget_checksums()
    start.kill()
    assert job.start().finished().restored == "3", "the other node has them"
    job.check(quiet(2))


def test_more_than_the_code_stands_goes_back_to_the_snapshot_before(jobs, quiet):
    job = jobs("abc")
    damaged(job, "a", "b", areas=["data"]).kill()
    assert job.start().finished().restored == "2"
    job.check(quiet(3))


def test_beside_a_lost_node(jobs, quiet):
    job = jobs("abc")
    start = damaged(job, "a", areas=["parity"])
    job.lose("b")
    start.kill()
    assert job.start("axc").finished().restored == "2"
    job.check(quiet(3))


def test_on_one_node_alone_goes_back_to_the_snapshot_before(jobs, quiet):
    job = jobs("aaaa")
    damaged(job, "a", areas=["data"]).kill()
    assert job.start().finished().restored == "2"
    job.check(quiet())


def test_of_everything_is_refused(jobs):
    job = jobs("ab")
    start = held(job)
    for node in "ab":
        with job.memory(node) as written:
            for slot in (0, 1):
                for area in ("data", "parity"):
                    written.of(slot).flip(area)
    start.kill()
    for said in job.start().failed():
        assert "UnrecoverableSnapshot" in said
        assert "data chunk 0 of node 0" in said
