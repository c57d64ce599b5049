"""Jobs to be hurt, and what they come to when they are not."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from tests.runtime.snapshot.faults.jobs import Quiet, job_in_temporary
from tests.runtime.snapshot.faults.training import Training


def full(*values):
    """A variant that takes its time only with ``-m full``."""
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.fixture(scope="session")
def quiet():
    """Gives what a training of so many ranks and steps comes to that takes no snapshots and that nothing happens to."""

    @functools.cache
    def run(world_size=4, steps=6, replicated=False):
        training = Training(steps=steps, interval=10**6, replicated=replicated)
        with job_in_temporary("a" * world_size, training) as job:
            start = job.start().finished()
            return Quiet(start.losses(), torch.load(start.place / "final.pt"))

    return run


@pytest.fixture
def jobs():
    """Makes a job; all of it ends with the test."""
    with contextlib.ExitStack() as stack:

        def make(nodes="aabb", **training):
            return stack.enter_context(job_in_temporary(nodes, Training(**training)))

        yield make
