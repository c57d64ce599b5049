"""Restarts with another number of ranks, from memory and from disk."""

from __future__ import annotations

import pytest

from tests.runtime.snapshot.faults.conftest import full
from tests.runtime.snapshot.faults.test_disk_faults import copies, lose_everything
from tests.runtime.snapshot.faults.test_nodes_lost import held

pytestmark = pytest.mark.slow


def same_parameters(former, start, step):
    """A start of another layout begins with the parameters of the former one, and trains on."""
    start.finished()
    exact = " exact" * (len(start.nodes) == len(former.nodes))
    assert [line.rstrip() for line in start.said(0) if "RESTORED" in line] == [f"RESTORED {step}{exact}"]
    assert start.parameters(step) == former.parameters(step)
    assert start.steps()[6] == "saved"
    processes = set(start.job.memory_processes("a").values())
    assert len(processes) == 1, "the former layout's memory is let go when there is a new snapshot"
    assert f".{len(set(start.nodes))}x{start.nodes.count('a')}" in processes.pop()


@pytest.mark.parametrize(
    ("nodes", "then"), [("aabb", "ab"), ("ab", "aabb"), full("aabb", "aa"), full("aabb", "aaaa"), ("abcd", "abc")]
)
def test_from_memory(jobs, nodes, then):
    job = jobs(nodes)
    former = held(job)
    for node in set(nodes) - set(then):
        job.lose(node)
    former.kill()
    same_parameters(former, job.start(then), 3)


@pytest.mark.parametrize("then", ["ab", full("aa")])
def test_from_disk(jobs, tmp_path, then):
    job = jobs("aabb", disk=tmp_path, disk_interval=3)
    former = held(job)
    former.wait_for(lambda: copies(tmp_path) == [3], "a copy on disk")
    lose_everything(job)
    former.kill()
    same_parameters(former, job.start(then), 3)
