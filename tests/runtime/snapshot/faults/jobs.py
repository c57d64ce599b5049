"""Whole jobs that are started again and again: ranks are forks of one process that has imported everything.

Nodes are names: ranks of the same name have a memory process, which outlives a start. Whatever lasts too long is
killed, and what all processes said is shown.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from stowplan.runtime.snapshot.fail_points import MARKS_VARIABLE, RULES_VARIABLE
from stowplan.runtime.snapshot.layouts import node_of
from stowplan.runtime.snapshot.memory.client import hold
from stowplan.runtime.snapshot.memory.connection import Connection, connect
from stowplan.runtime.snapshot.memory.layout import (
    CHUNK_BYTES,
    Geometry,
    Header,
    num_chunks,
    payload_offset,
    read_header,
)
from stowplan.runtime.snapshot.memory.messages import GetStatus, Status
from stowplan.runtime.snapshot.memory.slots import State
from tests.distributed import fork_server
from tests.runtime.snapshot.faults.training import Training, train

__all__ = ["LIMIT_SECONDS", "Job", "Quiet", "Start", "Written"]

LIMIT_SECONDS = 120.0
_LOOK_SECONDS = 0.02
RUN = "job-1"


@dataclass(frozen=True)
class Quiet:
    """What a training that nothing happened to comes to."""

    losses: list[dict[int, str]]  # of each rank, by step
    final: dict[str, torch.Tensor]


class Start:
    """The ranks of one start."""

    def __init__(self, job: Job, place: Path, nodes: Sequence[str], processes: list[Any]) -> None:
        self.job, self.place, self.nodes, self.processes = job, place, nodes, processes

    def said(self, rank: int) -> list[str]:
        """Lines of a rank."""
        path = self.place / f"{rank}.out"
        return path.read_text().splitlines() if path.exists() else []

    def errors(self, rank: int) -> str:
        return (self.place / f"{rank}.err").read_text()

    def losses(self) -> list[dict[int, str]]:
        """Of each rank, by step."""
        lines = ([line.split() for line in self.said(rank)] for rank in range(len(self.nodes)))
        return [{int(words[1]): words[2] for words in each if words[0] == "LOSS"} for each in lines]

    def parameters(self, step: int) -> str:
        """What all ranks say of the parameters after this step."""
        lines = [line.split() for rank in range(len(self.nodes)) for line in self.said(rank)]
        (found,) = {words[2] for words in lines if words[:2] == ["PARAMETERS", str(step)]}
        return found

    @property
    def restored(self) -> str:
        """What all ranks restored: a step, or "nothing"."""
        found = {line.split()[1] for rank in range(len(self.nodes)) for line in self.said(rank) if "RESTORED" in line}
        assert len(found) == 1, f"ranks restored {found}: {self.story()}"
        return found.pop()

    def steps(self, rank: int = 0) -> dict[int, str]:
        """What became of the snapshot of each step."""
        lines = [line.split(maxsplit=2) for line in self.said(rank)]
        return {int(words[1]): words[2] for words in lines if words[0] == "STEP"}

    def until(self, word: str, ranks: Sequence[int] | None = None) -> None:
        """Wait until all ranks, or those, have said a line that begins so."""
        which = range(len(self.nodes)) if ranks is None else ranks

        def said() -> bool:
            if 1 in self.codes().values():
                self.fail(f"a rank ended before {word}: {self.codes()}")
            return all(any(line.startswith(word) for line in self.said(rank)) for rank in which)

        self.wait_for(said, f"{word} of {which}")

    def wait_for(self, condition: Callable[[], object], what: str, limit_seconds: float = LIMIT_SECONDS) -> None:
        """Wait until it holds; fail, with all that was said, when that takes too long."""
        until = time.monotonic() + limit_seconds
        while not condition():
            if time.monotonic() > until:
                self.fail(f"{what} did not come within {limit_seconds:g} s")
            time.sleep(_LOOK_SECONDS)

    def codes(self) -> dict[int, int]:
        """Exit codes of ranks that have ended."""
        return {rank: each.exitcode for rank, each in enumerate(self.processes) if each.exitcode is not None}

    def killed_by_itself(self, rank: int) -> None:
        """Wait until this rank is killed, then kill the others, as a launcher would."""
        self.wait_for(lambda: rank in self.codes(), f"the end of rank {rank}")
        assert self.codes()[rank] == -signal.SIGKILL, self.story()
        self.kill()

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL."""
        which = range(len(self.nodes)) if ranks is None else ranks
        for rank in which:
            self.processes[rank].kill()
        for rank in which:
            self.processes[rank].join(LIMIT_SECONDS)

    def held(self, step: int) -> None:
        """Wait until all ranks hold after this step."""
        self.until(f"HELD {step}")

    def go(self, step: int) -> None:
        """On, for those that hold after this step."""
        (self.place / f"GO-{step}").touch()

    def finished(self) -> Start:
        """Wait until all ranks have ended well."""
        self.wait_for(lambda: len(self.codes()) == len(self.nodes) or any(self.codes().values()), "the end")
        if any(self.codes().values()):
            time.sleep(1)  # others may have to say something, too
            self.fail(f"exit codes {self.codes()}")
        return self

    def failed(self, ranks: Sequence[int] | None = None) -> list[str]:
        """Wait until all ranks, or those, have ended with an error, and kill the others; each one's exception."""
        which = range(len(self.nodes)) if ranks is None else ranks
        self.wait_for(lambda: set(which) <= set(self.codes()), f"the end of {which}")
        assert {self.codes()[rank] for rank in which} == {1}, self.story()
        self.kill()
        return [re.split(r"^(?=[a-z_]+\.[\w.]+: )", self.errors(rank), flags=re.MULTILINE)[-1] for rank in which]

    def fail(self, what: str) -> None:
        """End it all and raise, with what everybody said, and where they are."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGUSR1)
        for process in self.job.memory_processes():
            process.send_signal(signal.SIGABRT)
        time.sleep(1)
        self.kill()
        raise AssertionError(f"{what}\n{self.story()}")

    def story(self) -> str:
        """Everything that this start and the memory processes said."""
        files = sorted(self.place.glob("*.out")) + sorted(self.place.glob("*.err"))
        files += sorted(self.job.sockets.glob("*.log"))
        return "\n".join(f"==== {path.name}\n{path.read_text(errors='replace')}" for path in files)


class Job:
    """A training of 4 ranks unless ``nodes`` names others; ``close`` ends all that is left."""

    def __init__(self, directory: Path, nodes: Sequence[str], training: Training | None = None) -> None:
        self.directory, self.nodes, self.training = directory, tuple(nodes), training or Training()
        self.sockets = directory / "sockets" / "stowplan"
        self.marks = directory / "marks"
        self.sockets.parent.mkdir(mode=0o700)
        self.marks.mkdir()
        self._starts: list[Start] = []

    def start(self, nodes: Sequence[str] | None = None, *, rules: str = "", run: str = RUN, **changes: Any) -> Start:
        """Fork all ranks; ``rules`` are of ``fail_points``, ``changes`` of the training."""
        names = tuple(nodes or self.nodes)
        place = self.directory / f"start-{len(self._starts) + 1}"
        place.mkdir()
        environment = {
            RULES_VARIABLE: rules, MARKS_VARIABLE: str(self.marks), "STOWPLAN_RUN": run,
            "XDG_RUNTIME_DIR": str(self.sockets.parent), "STOWPLAN_JOB_TOKEN": "a token for this test only",
        }  # fmt: skip
        processes = []
        for rank, node in enumerate(names):
            arguments = (
                place, rank, len(names), environment | {"STOWPLAN_NODE": node}, replace(self.training, **changes)
            )  # fmt: skip
            processes.append(fork_server().Process(target=train, args=arguments, daemon=True))
            processes[-1].start()
        self._starts.append(Start(self, place, names, processes))
        return self._starts[-1]

    def struck(self, mark: str) -> None:
        """Wait until a rule has acted."""
        self._starts[-1].wait_for((self.marks / mark).exists, mark)

    def memory_processes(self, node: str | None = None) -> dict[psutil.Process, str]:
        """Those of a node, or of all, and their names."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if str(self.sockets) in words and "--node" in words:
                name = words[words.index("--node") + 1]
                if node in (None, node_of(name)):
                    found[process] = name
        return found

    def kill_memory(self, node: str) -> None:
        """SIGKILL of a node's memory process."""
        for process in self.memory_processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait()

    def status(self, node: str) -> Status:
        """A node's memory process's."""
        connection = self._connected(node)
        status, _ = connection.ask(GetStatus(), Status)
        connection.close()
        return status

    def reduced(self, node: str) -> tuple[str, ...]:
        """What a node's memory process says that redundancy lacks."""
        return self.status(node).reduced

    def _connected(self, node: str) -> Connection:
        (name,) = {*self.memory_processes(node).values()} or {node}
        return connect(RUN, name, directory=self.sockets)

    def lose(self, node: str) -> None:
        """SIGKILL of all processes of a node, at the last start."""
        start = self._starts[-1]
        start.kill([rank for rank, name in enumerate(start.nodes) if name == node])
        self.kill_memory(node)

    @contextlib.contextmanager
    def memory(self, node: str, local_rank: int = 0) -> Iterator[Written]:
        """The newest snapshot in a local rank's memory, as it lies there."""
        connection = self._connected(node)
        held = hold(connection, local_rank)
        with mmap.mmap(held.descriptor, 0) as mapping:
            view = memoryview(mapping)
            yield Written.newest(view)
            view.release()
        held.close()
        connection.close()

    def check(self, quiet: Quiet) -> None:
        """The last start ended with the parameters of a quiet training, and all that any start computed is its."""
        self._starts[-1].finished()
        final = torch.load(self._starts[-1].place / "final.pt")
        assert final.keys() == quiet.final.keys()
        assert [name for name in final if not torch.equal(final[name], quiet.final[name])] == []
        for start in self._starts:
            for rank, losses in enumerate(start.losses()):
                expected = {step: quiet.losses[rank][step] for step in losses}
                assert losses == expected, f"{start.place.name}, rank {rank}"

    def close(self) -> None:
        """End all that is left."""
        for start in self._starts:
            start.kill()
        for process in self.memory_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@dataclass(frozen=True)
class Written:
    """A snapshot in a region, which tests may damage."""

    region: memoryview
    slot: int
    header: Header

    @classmethod
    def newest(cls, region: memoryview) -> Written:
        headers = {slot: read_header(region, slot) for slot in (0, 1)}
        known = {slot: header for slot, header in headers.items() if header and header.state >= State.LOCAL}
        slot = max(known, key=lambda slot: known[slot].snapshot.sequence)
        return cls(region, slot, known[slot])

    def of(self, slot: int) -> Written:
        """What the slot has."""
        header = read_header(self.region, slot)
        assert header
        return Written(self.region, slot, header)

    def flip(self, area: str) -> None:
        """Flip one bit: of data, of parity, of the header in force, of the table of checksums."""
        geometry: Geometry = self.header.geometry
        begin = {
            "data": geometry.data(self.slot) + payload_offset(self.header.schema_bytes) + 3,  # a parameter's exponent
            "parity": geometry.parity(self.slot) + 100,
            "table": geometry.table(self.slot),
            "parity table": geometry.table(self.slot) + 4 * num_chunks(geometry.data_capacity_bytes),
        }
        place = begin[area] if area != "header" else self._record() + 40
        self.region[place] ^= 4

    def forget_checksums(self) -> None:
        """As if the table had never been written."""
        begin = self.header.geometry.table(self.slot)
        count = num_chunks(self.header.data_bytes)
        assert self.header.data_bytes <= count * CHUNK_BYTES
        self.region[begin : begin + 4 * count] = bytes(4 * count)

    def _record(self) -> int:
        packed = self.header.packed(self.slot)
        return bytes(self.region[: 2 * 4096]).index(packed)


@contextlib.contextmanager
def job_in_temporary(nodes: Sequence[str], training: Training | None = None) -> Iterator[Job]:
    """A job whose directory has a short name, as paths of sockets have to."""
    with tempfile.TemporaryDirectory(prefix="stow", ignore_cleanup_errors=True) as path:
        job = Job(Path(path), nodes, training)
        try:
            yield job
        finally:
            job.close()
