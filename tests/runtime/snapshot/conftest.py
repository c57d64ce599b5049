"""A directory for sockets, and processes that end with the test."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from stowplan.core.errors import SnapshotProcessUnavailable, SnapshotRefused
from stowplan.runtime.snapshot.memory.client import SnapshotClient
from stowplan.runtime.snapshot.memory.connection import connect

RUN = "job-1"


def eventually(condition):
    """Wait until it holds."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


class Trainer:
    """tests.runtime.snapshot.trainer in a process of its own."""

    def __init__(self, directory: Path, rank: int = 0, num_ranks: int = 1, generation: int = 0) -> None:
        command = [sys.executable, "-m", "tests.runtime.snapshot.trainer", directory, RUN, rank, num_ranks, generation]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        self.said: list[tuple[str, int]] = []
        self._lines: queue.Queue[tuple[str, int] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            word, number = line.split()
            self._lines.put((word, int(number)))
        self._lines.put(None)

    def until(self, word: str) -> int:
        """Wait until it says ``word``; the number that it says with it."""
        while (line := self._lines.get(timeout=60)) is not None:
            self.said.append(line)
            if line[0] == word:
                return line[1]
        raise AssertionError(f"ended without {word}: {self.said} {self.process.stderr.read()}")

    def last(self, word: str) -> int:
        return max((number for said, number in self.said if said == word), default=0)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        while (line := self._lines.get()) is not None:
            self.said.append(line)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory(prefix="stow") as path:  # short, as paths of sockets have to be
        yield Path(path)
        with contextlib.suppress(SnapshotProcessUnavailable, SnapshotRefused):
            os.kill(process_of(Path(path)), signal.SIGKILL)


def process_of(directory: Path) -> int:
    """The memory process."""
    connection = connect(RUN, "local", directory=directory)
    connection.close()
    return connection.welcome.pid


@pytest.fixture
def trainers(directory):
    """Starts trainers."""
    started = []

    def start(*arguments, **options):
        started.append(Trainer(directory, *arguments, **options))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()


@pytest.fixture
def clients(directory):
    """Makes clients of this process."""
    made = []

    def make(rank=0, **options):
        options = {"num_ranks": 1, "idle_seconds": 60, "directory": directory} | options
        made.append(SnapshotClient(options.pop("run", RUN), rank, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()
