"""Real processes for tests: a group of ranks over gloo that are started once and run one function after another.

A failure on any rank is raised here with that rank's traceback; ranks that are silent for five minutes are ended, and
others are started for the next test. Machines may be busy: starting has a limit of its own. All ranks are forks of one
process that has imported torch and transformers once, and run no thread of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["RankFailed", "Ranks", "fork_server"]

TIMEOUT = timedelta(seconds=300)
_START = timedelta(seconds=300)  # torch and transformers are imported
_GRACE = timedelta(seconds=3)  # for the others, once a rank has failed
_PRELOADED = [
    "tests.models",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "stowplan.runtime.pipeline.pipeline",
    "stowplan.runtime.snapshot.snapshotter",
    "torch.distributed.fsdp",
]


def fork_server() -> Any:
    """The multiprocessing context whose processes are forks of one that has imported torch and transformers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


class RankFailed(AssertionError):
    """A function failed on a rank, or a rank did not answer in time."""


class Ranks:
    """``size`` processes in one gloo group. ``run`` calls a function of a module on all of them at once."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._ends: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: timedelta = TIMEOUT) -> list[Any]:
        """``function(rank, *args)`` on every rank; gives their results, which must be plain data.

        Raises RankFailed with the tracebacks of the ranks that failed or the numbers of those that hang.
        """
        if not self._processes:
            self._start()
            self._answers(_START)
        for end in self._ends:
            end.send((function, args))
        return self._answers(timeout)

    def _answers(self, timeout: timedelta) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout.total_seconds()
        while len(answers) < self.size:
            silent = [end for rank, end in enumerate(self._ends) if rank not in answers]
            ready = wait(silent, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for end in ready:
                rank = self._ends.index(end)  # type: ignore[arg-type]
                try:
                    answers[rank] = self._ends[rank].recv()
                except EOFError:
                    self._processes[rank].join(_GRACE.total_seconds())  # its pipe ends before it has an exit code
                    answers[rank] = False, f"the process ended with exit code {self._processes[rank].exitcode}"
                if not answers[rank][0]:  # the others may wait for it in a collective
                    deadline = min(deadline, time.monotonic() + _GRACE.total_seconds())
        said = [f"rank {rank}:\n{answer}" for rank, (fine, answer) in sorted(answers.items()) if not fine]
        said += [f"rank {rank}: no answer" for rank in range(self.size) if rank not in answers]
        if said:
            self.stop()
            raise RankFailed("\n".join(said))
        return [answers[rank][1] for rank in range(self.size)]

    def _start(self) -> None:
        context = fork_server()
        store = Path(tempfile.mkdtemp(prefix="stowplan-ranks-")) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(ours)

    def stop(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(timeout=0.1)
            process.kill()
            process.join()
        self._processes.clear()
        self._ends.clear()


def _serve(rank: int, size: int, store: str, end: Connection) -> None:
    """What a rank does: call what comes in, until the other end is closed."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    with contextlib.suppress(EOFError, OSError):
        end.send((True, "ready"))
        while True:
            function, args = end.recv()
            try:
                answer = True, function(rank, *args)
            except BaseException:  # noqa: BLE001
                answer = False, traceback.format_exc()
            end.send(answer)
