"""Writing copies to disk beside training: one at a time, in a thread, and no fault of the disk stops anybody."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stowplan.core.errors import InvalidArgument, StowplanError
from stowplan.runtime.snapshot.disk.copies import finish, good_copies, is_complete, prune, write_part
from stowplan.runtime.snapshot.state.contents import Piece
from stowplan.runtime.snapshot.state.state_schema import load_schema

__all__ = ["DiskStatus", "DiskTier"]

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """How the disk does, as seen by one node.

    Attributes:
        writing: the step that is being written, or waits for other nodes' parts.
        last_step: the newest step that this tier saw complete.
        last_bytes, last_seconds: of this node's parts of it, written and synced.
        num_written: copies that became complete.
        num_skipped: copies that were not begun because the one before was not done: the disk is too slow for so many.
        num_failed, failed_step: copies that came to nothing, and the newest of them.
        error: what the last failure was; empty after a success.
    """

    writing: int | None = None
    last_step: int | None = None
    last_bytes: int = 0
    last_seconds: float = 0.0
    num_written: int = 0
    num_skipped: int = 0
    num_failed: int = 0
    failed_step: int | None = None
    error: str = ""


class DiskTier:
    """Writes one node's snapshots to disk, each when it is offered and the one before is done.

    Args:
        directory: on a file system that all nodes share.
        world_size: how many ranks' parts make a copy.
        keep: how many complete copies stay; the newest good one always does.
        attempt: of the job, the same on all ranks, raised at each start (``disk.next_attempt``).
        patience_seconds: how long to wait for the other nodes' parts before giving a copy up.
        run: the job's name; nothing is written where a copy of another run is. Default: none, which is any run's.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        world_size: int,
        keep: int = 2,
        attempt: int = 0,
        patience_seconds: float = 600.0,
        run: str = "",
    ) -> None:
        if type(keep) is not int or keep < 1:
            raise InvalidArgument(f"keep={keep!r}: keep at least 1 copy.")
        self.directory = Path(directory)
        self._world_size, self._keep, self._attempt = world_size, keep, attempt
        self._patience_seconds, self._run = patience_seconds, run
        self._status = DiskStatus()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._given_up = -1  # newest step of which some part will not come
        self._thread: threading.Thread | None = None
        self._reading_since: float | None = None
        self._overtaken = threading.Event()

    @property
    def reading_seconds(self) -> float | None:
        """For how long the buffers of what was offered have been in use; None: they are not, or no longer."""
        since = self._reading_since
        return None if since is None else time.monotonic() - since

    def overtake(self) -> None:
        """The buffers may change from now on: what is being read from them will not count as written."""
        self._overtaken.set()
        self._reading_since = None

    @property
    def status(self) -> DiskStatus:
        """How it stands now."""
        with self._lock:
            return self._status

    def offer(self, pieces: Sequence[Piece]) -> bool:
        """Begin to write this node's pieces, all of one step; False: the copy before is not done, skipped.

        Args:
            pieces: their buffers must stay as they are until ``reading_seconds`` is None, or ``overtake`` is called.

        Raises:
            InvalidSnapshot: a schema is none; InvalidArgument: no pieces, or of several steps. Nothing else: faults of
                the disk go to ``status``.
        """
        schemas = [load_schema(piece.schema) for piece in pieces]
        steps = {schema["step"] for schema in schemas}
        if len(steps) != 1:
            raise InvalidArgument(f"pieces of steps {sorted(steps)} were offered: give a node's pieces of one step.")
        (step,) = steps
        with self._lock:
            if self._status.writing is not None or self._closing.is_set():
                self._status = replace(self._status, num_skipped=self._status.num_skipped + 1)
                return False
            self._status = replace(self._status, writing=step)
            self._reading_since = time.monotonic()
            self._overtaken = threading.Event()
            self._thread = threading.Thread(
                target=self._write,
                args=(step, list(pieces), any(schema["rank"] == 0 for schema in schemas), self._overtaken),
                name="stowplan-disk",
                daemon=True,
            )
            self._thread.start()
        return True

    def skip(self) -> None:
        """A copy is not begun, as another rank is not done with the one before."""
        with self._lock:
            self._status = replace(self._status, num_skipped=self._status.num_skipped + 1)

    def give_up(self, step: int) -> None:
        """Some node's part of this step's copy will not come: wait no longer for it."""
        self._given_up = max(self._given_up, step)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing is being written; False if that takes longer."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)
        return thread is None or not thread.is_alive()

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """Take no more offers, stop waiting for other nodes, and end when this node's parts are written, or at the end.

        What is not written by then stops at the next tensor, or is left to a thread that ends with the process: what
        there is of it is no copy, and later ones remove it. Gives whether nothing is being written any more.
        """
        self._closing.set()
        done = self.wait(timeout_seconds)
        self._ended.set()
        return done

    def _write(self, step: int, pieces: list[Piece], first: bool, overtaken: threading.Event) -> None:
        def stopped() -> str:
            if overtaken.is_set():
                return "its memory was needed for the next snapshot before it was written."
            return "training ended before it was written." if self._ended.is_set() else ""

        begin = time.monotonic()
        try:
            try:
                good_copies(self.directory, self._run)
                num_bytes = sum(
                    write_part(self.directory, piece, attempt=self._attempt, stopped=stopped, run=self._run)
                    for piece in pieces
                )
            finally:
                pieces.clear()
                self._reading_since = None
            seconds = time.monotonic() - begin
            if self._complete(step, first):
                if first:
                    prune(self.directory, self._keep, attempt=self._attempt)
                self._note(num_written=1, last_step=step, last_bytes=num_bytes, last_seconds=seconds)
            else:
                self._note(num_failed=1, failed_step=step, error=f"step {step}: parts of other nodes did not come")
        except Exception as error:  # noqa: BLE001 - training goes on whatever happens here; it is told in the status
            kind = "" if isinstance(error, StowplanError) else f"{type(error).__name__}: "
            self._note(num_failed=1, failed_step=step, error=f"step {step}: {kind}{error}")

    def _complete(self, step: int, first: bool) -> bool:
        """Whether the copy becomes complete while there is patience; the process with rank 0's part makes it so."""
        deadline = time.monotonic() + self._patience_seconds
        while True:
            if first:
                finish(self.directory, step, self._world_size, attempt=self._attempt, run=self._run)
            if is_complete(self.directory, step, attempt=self._attempt):
                return True
            if step <= self._given_up or time.monotonic() > deadline or self._closing.wait(_POLL_SECONDS):
                return False

    def _note(
        self,
        *,
        num_written: int = 0,
        num_failed: int = 0,
        failed_step: int | None = None,
        error: str = "",
        last_step: int | None = None,
        last_bytes: int | None = None,
        last_seconds: float | None = None,
    ) -> None:
        with self._lock:
            old = self._status
            self._status = DiskStatus(
                last_step=old.last_step if last_step is None else last_step,
                last_bytes=old.last_bytes if last_bytes is None else last_bytes,
                last_seconds=old.last_seconds if last_seconds is None else last_seconds,
                num_written=old.num_written + num_written,
                num_skipped=old.num_skipped,
                num_failed=old.num_failed + num_failed,
                failed_step=old.failed_step if failed_step is None else failed_step,
                error=error,
            )
