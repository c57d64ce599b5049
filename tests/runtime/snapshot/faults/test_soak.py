"""SIGKILL of anybody at any moment: every step and the end are those of a training that nothing happened to."""

from __future__ import annotations

import os
import random
import time

import pytest

from tests.runtime.snapshot.faults.jobs import LIMIT_SECONDS

pytestmark = pytest.mark.slow


def whole(job):
    """Whether every node's memory process says that nothing is missing."""
    try:
        return all(job.reduced(node) == () for node in set(job.nodes))
    except OSError:
        return False


def come_to(start):
    """The last step that any rank has done, or was restored at."""
    said = [line.split() for rank in range(len(start.nodes)) for line in start.said(rank)]
    return max((int(words[1]) for words in said if words[0] in ("LOSS", "RESTORED") and words[1].isdigit()), default=0)


class Soak:
    """Kills, restarts, and what has to be there still: what all ranks have seen complete."""

    def __init__(self, job, choice):
        self.job, self.choice = job, choice
        self.start = job.start()
        self.complete = self.num_starts = 0
        self.wounded = None  # the node that is not whole; another one must not be lost meanwhile
        self.counts = {"rank": 0, "memory": 0, "node": 0}

    def until(self, condition):
        """Start again where a rank has failed, as a launcher would; fail where nothing moves any more."""
        seen, since = None, time.monotonic()
        while not condition(self.start):
            if any(self.start.codes().values()):
                self.again()
            now = self.num_starts, [len(self.start.said(rank)) for rank in range(4)]
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > LIMIT_SECONDS:
                self.start.fail("nothing moves any more")
            time.sleep(0.05)

    def again(self):
        self.start.kill()
        self.check()
        self.num_starts += 1
        self.start = self.job.start()

    def check(self):
        """Nothing that was complete is ever lost."""
        start = self.start
        if all(any("RESTORED" in line for line in start.said(rank)) for rank in range(len(start.nodes))):
            restored = start.restored
            assert (0 if restored == "nothing" else int(restored)) >= self.complete, start.story()
        done = [[step for step, said in start.steps(rank).items() if said == "saved"] for rank in range(4)]
        self.complete = max(self.complete, min(max(steps, default=0) for steps in done))

    def strike(self):
        """Kill something, but never more than the code stands."""
        if self.wounded and whole(self.job):
            self.wounded = None
        kind = self.choice.choice(["rank", "memory", "node"])
        node = self.wounded or self.choice.choice("ab")
        self.counts[kind] += 1
        if kind == "rank":
            self.start.kill([self.choice.randrange(4)])
            self.again()
            return
        self.wounded = node
        if kind == "memory":
            self.job.kill_memory(node)
        else:
            self.job.lose(node)
            self.again()


@pytest.mark.parametrize(
    ("steps", "kills"), [(40, 5), pytest.param(300, 24, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_whatever_is_killed_whenever(jobs, quiet, steps, kills):
    seed = int(os.environ.get("STOWPLAN_TEST_SEED", time.time_ns() % 10**6))
    print(f"STOWPLAN_TEST_SEED={seed}")
    choice = random.Random(seed)
    job = jobs("aabb", steps=steps, pause_seconds=0.02)
    soak = Soak(job, choice)
    for step in sorted(choice.sample(range(1, steps - 2), kills)):
        if choice.random() < 3 / 4:
            soak.until(lambda start, step=step: come_to(start) >= step)
            time.sleep(choice.uniform(0, 0.2))
        else:  # also while it starts
            time.sleep(choice.uniform(0, 2))
        soak.strike()
    soak.until(lambda start: list(start.codes().values()) == [0] * 4)
    print(f"{soak.counts} killed, {soak.num_starts} restarts")
    soak.check()
    job.check(quiet(4, steps))
