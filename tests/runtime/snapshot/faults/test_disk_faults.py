"""Disks that are full or slow, trainers killed while they write, and what is restored of it when all memory is lost."""

from __future__ import annotations

import pytest

from tests.runtime.snapshot.faults.conftest import full

pytestmark = pytest.mark.slow


def copies(directory):
    """Steps of complete copies."""
    return sorted(int(path.parent.name.removeprefix("step_")) for path in directory.glob("step_*/COMPLETE"))


def disk_status(start, rank=0):
    return next(line for line in start.said(rank) if line.startswith("DISK"))


def lose_everything(job):
    for node in set(job.nodes):
        job.lose(node)


@pytest.mark.parametrize("place", [full(""), "@rank-1"])
def test_full(jobs, quiet, tmp_path, place):
    job = jobs("ab", steps=12, disk=tmp_path, pause_seconds=0.2)
    start = job.start(rules=f"disk.part{place}:2-=raise:ENOSPC", hold_at=(11,))
    start.held(11)
    (good,) = copies(tmp_path)
    assert [step for step, said in start.steps().items() if said == "saved" and step > good + 1]
    start.go(11)
    start.finished()
    assert "No space left on device" in disk_status(start, 1)
    job.check(quiet(2, 12))
    lose_everything(job)
    assert job.start().finished().restored == str(good)
    job.check(quiet(2, 12))


def test_slow(jobs, quiet, tmp_path):
    job = jobs("ab", steps=10, disk=tmp_path, pause_seconds=0.2)
    start = job.start(rules="disk.part:1-=stall:1").finished()
    assert "num_skipped=0" not in disk_status(start)
    assert list(start.steps().values()).count("saved") > len(copies(tmp_path)), "snapshots in memory go on"
    assert copies(tmp_path)
    job.check(quiet(2, 10))


@pytest.mark.parametrize("point", [full("disk.part@rank-1"), full("disk.part@rank-0"), "disk.finish@rank-0"])
def test_a_trainer_is_killed_while_it_writes(jobs, quiet, tmp_path, point):
    job = jobs("ab", disk=tmp_path)
    start = job.start(rules=f"{point}:2=kill", pause_seconds=0.3, steps=1000)
    start.killed_by_itself(int(point[-1]))
    good = copies(tmp_path)
    assert len(good) == 1
    lose_everything(job)
    start = job.start(steps=good[0] + 1).finished()
    assert start.restored == str(good[0])
