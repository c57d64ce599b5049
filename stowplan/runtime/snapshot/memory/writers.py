"""Who may write a rank's memory: one process at a time, for as long as it may still have it mapped."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from dataclasses import dataclass

from stowplan.core.errors import SnapshotRefused
from stowplan.runtime.snapshot.memory.protocol import Peer

__all__ = ["Session", "Writers"]

_PATIENCE_SECONDS = 5.0  # for a writer that is about to end
_LOOK_SECONDS = 0.02


@dataclass(eq=False)
class Session:
    """One connection: who it is, and the generation that it said; None for an observer."""

    peer: Peer
    generation: int | None = None
    closed: bool = False


class Writers:
    """Of each rank, at most one session. Methods raise SnapshotRefused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writers: dict[int, _Writer] = {}

    def claim(self, rank: int, session: Session) -> None:
        """``session`` writes from now on; waits some seconds for another process that is about to end.

        A process may claim again what it has claimed by another connection.
        """
        if session.generation is None:
            raise SnapshotRefused("generation", "an observer cannot write: say a generation in Hello.")
        with self._lock:
            before = self._writers.get(rank)
        same = before is not None and before.session.peer.pid == session.peer.pid > 0
        if before is not None and not same and not before.gone(_PATIENCE_SECONDS):
            raise SnapshotRefused(
                "busy",
                f"process {before.session.peer.pid} still has rank {rank}'s memory mapped and could write into it: end "
                f"that process.",
            )
        with self._lock:
            if self._writers.get(rank) is not before:
                raise SnapshotRefused("busy", f"another process has just attached rank {rank}'s memory.")
            if before is not None:
                before.detach()
            self._writers[rank] = _Writer(session)

    def release(self, rank: int, session: Session) -> bool:
        """It has unmapped the memory; whether it was the writer."""
        with self._lock:
            writer = self._writers.get(rank)
            if writer is None or writer.session is not session:
                return False
            writer.detach()
            del self._writers[rank]
            return True

    def generation(self, rank: int, session: Session) -> int:
        """The generation that ``session`` writes for. Refuses whoever is not the writer."""
        with self._lock:
            writer = self._writers.get(rank)
        if writer is None or writer.session is not session or session.generation is None:
            raise SnapshotRefused("order", f"rank {rank}'s memory has to be attached for writing by this connection.")
        return session.generation

    def ranks_of(self, session: Session) -> list[int]:
        """What this session may write."""
        with self._lock:
            return [rank for rank, writer in self._writers.items() if writer.session is session]

    def pid(self, rank: int) -> int | None:
        """Of a writer that is still there."""
        with self._lock:
            writer = self._writers.get(rank)
        return None if writer is None or writer.gone(0) else writer.session.peer.pid


class _Writer:
    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.Lock()
        self._detached = False
        self._process: int | None = None
        with contextlib.suppress(OSError):  # of another namespace, or gone
            self._process = os.pidfd_open(session.peer.pid)

    def gone(self, timeout_seconds: float) -> bool:
        """Whether it has detached, or has ended; waits for that."""
        until = time.monotonic() + timeout_seconds
        while not self._ended():
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def detach(self) -> None:
        with self._lock:
            self._detached = True
            if self._process is not None:
                os.close(self._process)
                self._process = None

    def _ended(self) -> bool:
        with self._lock:
            if self._detached or self._process is None:
                return self._detached or self.session.closed
            return bool(select.select([self._process], [], [], 0)[0])
