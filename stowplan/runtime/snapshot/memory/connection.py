"""A connection to the memory process, which is started where there is none."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import stowplan
from stowplan.core.errors import (
    SnapshotMemoryUnavailable,
    SnapshotProcessUnavailable,
    SnapshotRefused,
    UnrecoverableSnapshot,
)
from stowplan.runtime.snapshot.memory import messages, protocol
from stowplan.runtime.snapshot.memory.locks import FileLock
from stowplan.runtime.snapshot.memory.messages import Answer, Request
from stowplan.runtime.snapshot.memory.protocol import IDLE_SECONDS, LOOPBACK

__all__ = ["Connection", "connect", "start_or_connect"]

_Kind = TypeVar("_Kind")
_START_SECONDS = 60.0
_ANSWER_SECONDS = 60.0
_RETRY_SECONDS = 0.05
_LOG_LINES = 5
# As -m would, but with nothing of the current directory in the way of the standard library.
_STARTER = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from stowplan.runtime.snapshot.memory.process import main; sys.exit(main())"
)


class Connection:
    """Requests and their answers, one at a time, from any thread."""

    def __init__(self, connected: socket.socket, files: protocol.Files, hello: messages.Hello) -> None:
        self._socket, self._files = connected, files
        self._lock = threading.Lock()
        try:
            protocol.check_peer(protocol.peer_of(connected))
            self.welcome, _ = self.ask(hello, messages.Welcome)
        except BaseException:
            connected.close()
            raise

    def ask(
        self,
        request: Request,
        kind: type[_Kind] | tuple[type[_Kind], ...],
        descriptors: Sequence[int] = (),
        timeout_seconds: float | None = _ANSWER_SECONDS,
    ) -> tuple[_Kind, list[int]]:
        """The answer, and descriptors with it, which the caller has to close.

        Raises SnapshotRefused and SnapshotMemoryUnavailable, as the process answers; SnapshotProcessUnavailable when it
        is gone or does not answer in time, after which the connection is closed.
        """
        with self._lock:
            answer, received = self._exchange(request, descriptors, timeout_seconds)
        if isinstance(answer, kind):
            return answer, received
        protocol.close_all(received)
        match answer:
            case messages.Refused():
                raise SnapshotRefused(answer.reason, answer.problem)
            case messages.Unavailable():
                raise SnapshotMemoryUnavailable(answer.problem, answer.needed_bytes, answer.available_bytes)
            case messages.Lost():
                raise UnrecoverableSnapshot(answer.names, answer.stands, answer.advice)
        raise SnapshotRefused("malformed", f"{type(request).__name__} was answered by {type(answer).__name__}.")

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def _exchange(
        self, request: Request, descriptors: Sequence[int], timeout_seconds: float | None
    ) -> tuple[Answer, list[int]]:
        try:
            self._socket.settimeout(timeout_seconds)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why before it closed
                protocol.send(self._socket, messages.message_to_plain(request), descriptors)
            plain, received = protocol.receive(self._socket)
        except OSError as error:
            self._socket.close()
            raise SnapshotProcessUnavailable(
                f"the memory process does not answer {type(request).__name__}: {error!r}. "
                f"Training can go on; start it again and adopt the memory.{_last_lines(self._files.log)}"
            ) from error
        return messages.answer_from_plain(plain), received


def connect(run: str, node: str, generation: int | None = None, directory: Path | None = None) -> Connection:
    """To the memory process that serves this run and node; an observer gives no generation.

    Raises SnapshotProcessUnavailable: there is none; SnapshotRefused.
    """
    files = protocol.files_of(run, node, directory or protocol.socket_directory())
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.connect(str(files.socket))
    except OSError as error:
        connected.close()
        if isinstance(error, ConnectionRefusedError):
            _remove_dead(files)
        raise SnapshotProcessUnavailable(
            f"no memory process serves run {run!r} on node {node!r} at {files.socket}: {error}.{_last_lines(files.log)}"
        ) from error
    return Connection(connected, files, messages.Hello(run, generation))


def serving(
    run: str | None = None, directory: Path | None = None, wanted: Callable[[str], bool] = lambda node: True
) -> Iterator[tuple[Connection, messages.Status]]:
    """Memory processes of a run, or of all, on nodes of ``wanted`` names: observed, and disconnected after each turn.

    Raises SnapshotRefused.
    """
    directory = directory or protocol.socket_directory()
    for path in sorted(directory.glob("*.sock")):
        name, _, node = path.stem.rpartition("@")
        if not name or run not in (None, name) or not wanted(node):
            continue
        try:
            connection = connect(name, node, directory=directory)
            status, _ = connection.ask(messages.GetStatus(), messages.Status)
        except SnapshotProcessUnavailable:  # it was killed, and its socket is left, or it is ending
            continue
        yield connection, status
        connection.close()


def start_or_connect(
    run: str,
    node: str,
    generation: int | None,
    num_ranks: int,
    *,
    directory: Path | None = None,
    idle_seconds: float = IDLE_SECONDS,
    listen: str = LOOPBACK,
) -> Connection:
    """As ``connect``; where there is no process, the first who asks starts it, and others wait for that.

    ``listen`` is the address at which a new process exchanges snapshots with other nodes.

    Raises SnapshotProcessUnavailable with the reason, SnapshotRefused.
    """
    directory = directory or protocol.socket_directory()
    with contextlib.suppress(SnapshotProcessUnavailable):
        return connect(run, node, generation, directory)
    until = time.monotonic() + _START_SECONDS
    lock = FileLock(protocol.files_of(run, node, directory).start)
    while not lock.acquire(blocking=False):
        _check_time(until, run, node)
        time.sleep(_RETRY_SECONDS)
    try:
        while True:
            with contextlib.suppress(SnapshotProcessUnavailable):
                return connect(run, node, generation, directory)
            _check_time(until, run, node)
            _start(
                run, node, generation or 0, num_ranks, directory, idle_seconds, listen
            )  # does nothing while one is ending
            time.sleep(_RETRY_SECONDS)
    finally:
        lock.release()


def _remove_dead(files: protocol.Files) -> None:
    """Remove the socket of a process that was killed. Who listens, or is about to, has the lock."""
    with contextlib.suppress(OSError):
        lock = FileLock(files.lock)
        if lock.acquire(blocking=False):
            try:
                files.socket.unlink(missing_ok=True)
            finally:
                lock.release()


def _start(
    run: str, node: str, generation: int, num_ranks: int, directory: Path, idle_seconds: float, listen: str
) -> None:
    command = [
        sys.executable, "-P", "-c", _STARTER, str(Path(stowplan.__file__).parents[1]), "--run", run, "--node", node,
        "--num-ranks", str(num_ranks), "--generation", str(generation), "--idle-seconds", str(idle_seconds),
        "--directory", str(directory.absolute()), "--listen", listen,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # NumPy's pools would be of no use there
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_START_SECONDS,
            check=False, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SnapshotProcessUnavailable(f"the memory process did not start in {_START_SECONDS:g} s.") from None
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-_LOG_LINES:])
        raise SnapshotProcessUnavailable(f"the memory process cannot be started: {said}")


def _check_time(until: float, run: str, node: str) -> None:
    if time.monotonic() > until:
        raise SnapshotProcessUnavailable(
            f"no memory process came up for run {run!r} on node {node!r} within {_START_SECONDS:g} s."
        )


def _last_lines(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "".join(f"\n    {line}" for line in (f"{log} ends with", *lines)) if lines else ""
    return ""
