"""Networks that refuse or fall silent between memory processes: training goes on, and later so do snapshots."""

from __future__ import annotations

import pytest

from stowplan.runtime.snapshot.memory.slots import State
from tests.runtime.snapshot.faults.test_nodes_lost import newest

pytestmark = pytest.mark.slow
LATE = "the snapshot before is not complete on all nodes"


def healed(job, start, step):
    """Hold after this step, until everything is complete again; the step of the newest snapshot on both nodes."""
    start.held(step)
    start.wait_for(lambda: {newest(job, node)[1] for node in "ab"} == {State.GLOBAL}, "the newest to be complete")
    assert job.reduced("a") == job.reduced("b") == ()
    assert newest(job, "a") == newest(job, "b")
    return newest(job, "a")[0]


def test_connections_are_refused_for_a_while(jobs, quiet):
    job = jobs("ab", steps=75)
    cut = "exchange@{}:30-50=raise:ECONNREFUSED"
    start = job.start(rules=f"{cut.format('a')},{cut.format('b')}", hold_at=(70,), wait=False, pause_seconds=0.4)
    last = healed(job, start, 70)
    assert {path.name for path in job.marks.iterdir()} == {"exchange@a:30-50", "exchange@b:30-50"}
    steps = start.steps()
    skipped = [step for step, said in steps.items() if said == LATE]
    assert skipped, "training went on"
    assert any(step > skipped[0] for step, said in steps.items() if said == "saved"), "and so did snapshots"
    job.lose("b")
    start.kill()
    assert job.start("ac").finished().restored == str(last)
    job.check(quiet(2, 75))


def test_silence_for_longer_than_a_request_may_take(jobs, quiet):
    job = jobs("ab", steps=55)
    start = job.start(rules="exchange@b:30=stall:8", hold_at=(50,), wait=False, pause_seconds=0.3)
    last = healed(job, start, 50)
    late = [step for step, said in start.steps().items() if said == LATE]
    assert len(late) > 5
    assert last > late[0]
    job.lose("a")
    start.kill()
    assert job.start("cb").finished().restored == str(last)
    job.check(quiet(2, 55))
