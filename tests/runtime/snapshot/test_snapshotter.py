"""A training that loses a rank, or a node, ends with the parameters that it would have had anyway."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from stowplan.core.errors import SnapshotProcessUnavailable
from stowplan.runtime.snapshot.connection import connect
from tests.runtime.snapshot.job import WORLD_SIZE

pytestmark = pytest.mark.slow

RUN = "job-1"
STEPS, KILLED_IN = 6, 3


class Job:
    """Starts the same training again and again; ``nodes`` names each rank's."""

    def __init__(self, directory: Path, nodes: tuple[str, ...]) -> None:
        self.directory, self.nodes = directory, nodes
        self.starts = 0

    def run(self, *options: object, steps: int = STEPS, of_rank: dict[int, tuple[str, ...]] | None = None) -> list[str]:
        """What each rank said; once one has been killed so are all others."""
        self.starts += 1
        place = self.directory / f"start-{self.starts}"
        place.mkdir()
        started = []
        for rank, node in enumerate(self.nodes):
            command = [sys.executable, "-m", "tests.runtime.snapshot.job", place, steps, *options]
            environment = {
                **os.environ, "RANK": str(rank), "STOWPLAN_RUN": RUN, "STOWPLAN_NODE": node, "OMP_NUM_THREADS": "1",
                "XDG_RUNTIME_DIR": str(self.directory / "sockets"), "STOWPLAN_JOB_TOKEN": "a token for this test only",
            }  # fmt: skip
            whole = [str(part) for part in (*command, *(of_rank or {}).get(rank, ()))]
            with (place / f"{rank}.out").open("w") as out, (place / f"{rank}.err").open("w") as err:
                started.append(subprocess.Popen(whole, env=environment, stdout=out, stderr=err))
        killed = [started[rank] for rank in of_rank or {}]
        for process in killed:
            assert process.wait(timeout=250) == -signal.SIGKILL, self._said(place, "err")
        for process in started:
            if killed:
                process.kill()
            code = process.wait(timeout=250)
            assert killed or code == 0, self._said(place, "err")
        self.final = place / "final.pt"
        return self._said(place, "out")

    def close(self) -> None:
        """End memory processes."""
        for node in set(self.nodes):
            with contextlib.suppress(SnapshotProcessUnavailable, ProcessLookupError):
                connection = connect(RUN, node, directory=self.directory / "sockets" / "stowplan")
                os.kill(connection.welcome.pid, signal.SIGKILL)
                connection.close()

    def _said(self, place: Path, kind: str) -> list[str]:
        return [(place / f"{rank}.{kind}").read_text() for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def uninterrupted():
    """Final parameters of a training that nothing happened to."""
    yield from final_of()


@pytest.fixture(scope="module")
def uninterrupted_replicated():
    """The same, with DistributedDataParallel."""
    yield from final_of("--replicated")


def final_of(*options):
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        job = started(Path(path), ("a",) * WORLD_SIZE)
        job.run("--interval", 100, *options)
        yield torch.load(job.final)
        job.close()


@pytest.fixture
def jobs():
    """Makes jobs, whose processes end with the test."""
    made = []
    with tempfile.TemporaryDirectory(prefix="stow") as path:

        def make(*nodes):
            made.append(started(Path(path), nodes))
            return made[-1]

        yield make
        for job in made:
            job.close()


def started(directory: Path, nodes: tuple[str, ...]) -> Job:
    (directory / "sockets").mkdir(mode=0o700)
    return Job(directory, nodes)


def same(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = torch.load(path)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("nodes", ["aaaa", "aabb", "abcd"])
def test_a_killed_rank_changes_nothing(jobs, uninterrupted, nodes):
    job = jobs(*nodes)
    said = job.run(of_rank={1: ("--kill-at", str(KILLED_IN))})
    assert all("RESTORED nothing" in each and f"STEP {KILLED_IN} saved" in each for each in said)
    assert all(f"RESTORED {KILLED_IN}\n" in each for each in job.run())
    assert same(job.final, uninterrupted)


@pytest.mark.parametrize("nodes", ["aabb", "abcd"])
def test_a_lost_node_changes_nothing(jobs, uninterrupted, nodes):
    job = jobs(*nodes)
    dying = [rank for rank, node in enumerate(nodes) if node == "b"]
    kill = ("--kill-at", str(KILLED_IN))
    job.run(of_rank={rank: (*kill, "--kill-node") if rank == dying[0] else kill for rank in dying})
    assert all(f"RESTORED {KILLED_IN}\n" in each for each in job.run())
    assert same(job.final, uninterrupted)


@pytest.mark.parametrize(("nodes", "killed"), [("aaaa", ()), ("abcd", ("--kill-node",))])
def test_a_lost_share_of_replicated_training_changes_nothing(jobs, uninterrupted_replicated, nodes, killed):
    job = jobs(*nodes)
    said = job.run("--replicated", of_rank={1: ("--kill-at", str(KILLED_IN), *killed)})
    sizes = [int(re.search(rf"STEP {KILLED_IN} saved (\d+)", each)[1]) for each in said]
    state_bytes = 3 * sum(tensor.nbytes for tensor in uninterrupted_replicated.values())
    assert max(sizes) - min(sizes) < 0.2 * state_bytes / WORLD_SIZE
    assert all(f"RESTORED {KILLED_IN}\n" in each for each in job.run("--replicated"))
    assert same(job.final, uninterrupted_replicated)
