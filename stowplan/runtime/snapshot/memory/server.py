"""The memory process's side of its socket: who is connected, who writes which rank's memory, and what is answered.

Each connection has a thread. Nothing that a peer sends ends the process: what cannot be read closes the connection, all
else that is wrong is answered by Refused. Who comes while no descriptors or threads are left waits, or is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from stowplan.core.errors import (
    InvalidArgument,
    SnapshotMemoryUnavailable,
    SnapshotPeerRefused,
    SnapshotPeerUnavailable,
    SnapshotRefused,
    UnrecoverableSnapshot,
)
from stowplan.runtime.snapshot.exchange.group_coder import GroupCoder
from stowplan.runtime.snapshot.memory import messages, protocol
from stowplan.runtime.snapshot.memory.layout import Geometry
from stowplan.runtime.snapshot.memory.messages import Answer, Request
from stowplan.runtime.snapshot.memory.rank_memory import RankMemory
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.runtime.snapshot.memory.slots import Snapshot, State
from stowplan.runtime.snapshot.memory.store import Store
from stowplan.runtime.snapshot.memory.writers import Session, Writers

__all__ = ["Server"]

_LOG = logging.getLogger(__name__)
_MOST_CONNECTIONS = 256
_LOOK_SECONDS = 0.2  # how often it is looked whether the process is to end
_PAUSE_SECONDS = 0.2  # before somebody is let in again after that failed
_HANG_UP_SECONDS = 1.0  # how often it is looked whether somebody who waits is still there
_LONGEST_WAIT_SECONDS = 3600.0


@dataclass(eq=False)
class _Conversation(Session):
    connection: socket.socket = field(kw_only=True)
    greeted: bool = False

    def hung_up(self) -> bool:
        """Whether the peer has closed the connection, or ended, while it was waiting for an answer."""
        with contextlib.suppress(BlockingIOError):
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return False


@dataclass(frozen=True)
class _WithDescriptor:
    answer: Answer
    descriptor: int


class Server:
    """Serves ``store`` at a socket until it is told to end, or nobody was connected for ``idle_seconds``."""

    def __init__(self, store: Store, node: str, path: Path, idle_seconds: float, groups: GroupCoder) -> None:
        self.store, self.node, self.idle_seconds, self.groups = store, node, idle_seconds, groups
        self.asked_to_end = False
        self._path = path
        self._stop = threading.Event()
        self._writers = Writers()
        self._lock = threading.Lock()  # of the two below
        self._sessions: set[_Conversation] = set()
        self._busy_at = time.monotonic()
        path.unlink(missing_ok=True)  # of a process that was killed: whoever calls has the lock
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(_MOST_CONNECTIONS)
        self._listener.settimeout(_LOOK_SECONDS)

    def stop(self) -> None:
        """Make ``serve`` return soon."""
        self._stop.set()

    def serve(self) -> str:
        """Answer until the end; why it came."""
        try:
            while not self._stop.is_set():
                try:
                    with contextlib.suppress(TimeoutError):
                        self._accept(self._listener.accept()[0])
                except (OSError, RuntimeError) as error:  # no descriptors or threads left; snapshots stay
                    _LOG.warning("nobody can connect now: %r", error)
                    self._stop.wait(_PAUSE_SECONDS)
                with self._lock:
                    if self._sessions:
                        self._busy_at = time.monotonic()
                    elif time.monotonic() - self._busy_at > self.idle_seconds:
                        return f"nobody was connected for {self.idle_seconds:g} s"
            return "it was told to"
        finally:
            self._path.unlink(missing_ok=True)
            self._listener.close()
            with self._lock:
                sessions = list(self._sessions)
            for session in sessions:
                with contextlib.suppress(OSError):
                    session.connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(None)
            session = _Conversation(protocol.peer_of(connection), connection=connection)
        except OSError:
            connection.close()
            raise
        with self._lock:
            full = len(self._sessions) >= _MOST_CONNECTIONS
            if not full:
                self._sessions.add(session)
        try:
            protocol.check_peer(session.peer)
            if full:
                raise SnapshotRefused("busy", f"{_MOST_CONNECTIONS} processes are connected already.")
        except SnapshotRefused as refused:
            _LOG.warning("%s", refused)
            self._end(session, messages.Refused(refused.reason, refused.problem))
            return
        thread = threading.Thread(
            target=self._converse, args=(session,), daemon=True, name=f"peer-{session.peer.pid}"
        )  # fmt: skip
        try:
            thread.start()
        except RuntimeError as error:
            self._end(session, messages.Refused("busy", f"the memory process has no thread left: {error}."))
            raise

    def _converse(self, session: _Conversation) -> None:
        last: Answer | None = None
        try:
            while True:
                plain, descriptors = protocol.receive(session.connection)
                answer = self._answered(session, plain, descriptors)
                if isinstance(answer, _WithDescriptor):
                    protocol.send(
                        session.connection, messages.message_to_plain(answer.answer), [answer.descriptor]
                    )  # fmt: skip
                else:
                    protocol.send(session.connection, messages.message_to_plain(answer))
        except SnapshotRefused as refused:  # what cannot be read
            _LOG.warning("process %d: %s", session.peer.pid, refused)
            last = messages.Refused(refused.reason, refused.problem)
        except OSError as error:
            _LOG.info("process %d: %s", session.peer.pid, error)
        finally:
            self._end(session, last)

    def _end(self, session: _Conversation, last: Answer | None) -> None:
        if last is not None:
            with contextlib.suppress(OSError):
                protocol.send(session.connection, messages.message_to_plain(last))
        session.connection.close()
        session.closed = True
        with self._lock:
            self._sessions.discard(session)
            self._busy_at = time.monotonic()
        for rank in self._writers.ranks_of(session):
            self.store.abandon_unwritten(rank)

    # ---- answers ---------------------------------------------------------------------------------------------------
    def _answered(self, session: _Conversation, plain: object, descriptors: list[int]) -> Answer | _WithDescriptor:
        try:
            request = messages.request_from_plain(plain)
            self._check(session, request)
            if isinstance(request, messages.Adopt):
                if not descriptors:
                    raise SnapshotRefused("malformed", "Adopt has to come with a descriptor.")
                return self._adopt(session, request, descriptors.pop(0))
            return self._answer(session, request)
        except SnapshotRefused as refused:
            return messages.Refused(refused.reason, refused.problem)
        except SnapshotMemoryUnavailable as unavailable:
            return messages.Unavailable(unavailable.problem, unavailable.needed_bytes, unavailable.available_bytes)
        except UnrecoverableSnapshot as lost:
            return messages.Lost(tuple(lost.lost), lost.stands, lost.advice)
        except (SnapshotPeerRefused, SnapshotPeerUnavailable) as error:
            return messages.Refused("peer", str(error))
        except InvalidArgument as invalid:
            return messages.Refused("size", str(invalid))
        finally:
            protocol.close_all(descriptors)

    def _check(self, session: _Conversation, request: Request) -> None:
        if not session.greeted and not isinstance(request, messages.Hello):
            raise SnapshotRefused("order", "the first message of a connection has to be Hello.")
        if session.generation is not None and not isinstance(request, messages.RaiseGeneration):
            self.store.check(session.generation)

    def _answer(self, session: _Conversation, request: Request) -> Answer | _WithDescriptor:
        """Of requests for which it matters who sends them."""
        match request:
            case messages.Hello():
                return self._greet(session, request)
            case messages.Attach():
                memory = self.store.memory(request.rank)
                if request.write:
                    self._claim(session, request.rank)
                return _WithDescriptor(_attached(memory), memory.region.descriptor)
            case messages.Detach():
                if self._writers.release(request.rank, session):
                    self.store.abandon_unwritten(request.rank)
            case messages.Begin():
                generation = self._writers.generation(request.rank, session)
                snapshot = Snapshot(generation, request.sequence, request.step)
                sizes = request.data_bytes, request.schema_bytes, request.shares
                return self.store.begin(request.rank, snapshot, *sizes, request.kept)
            case messages.Written():
                self._writers.generation(request.rank, session)
                self.store.written(request.rank, request.sequence)
            case messages.Abandon():
                self._writers.generation(request.rank, session)
                self.store.abandon(request.rank, request.sequence)
            case messages.RaiseGeneration():
                self.store.raise_generation(request.generation)
                if session.generation is not None:
                    session.generation = request.generation
            case _:
                return self._answer_anybody(session, request)
        return messages.Done()

    def _answer_anybody(self, session: _Conversation, request: Request) -> Answer:
        match request:
            case messages.Reserve():
                geometry = Geometry(request.data_bytes, request.parity_bytes, request.coding.n)
                return _attached(self.store.reserve(request.rank, geometry, request.coding))
            case messages.Await():
                return self._wait(session, request)
            case messages.Inspect():
                return messages.Inspected(self.store.inspect(request.rank))
            case messages.RollBack():
                self.store.roll_back(request.sequence)
            case messages.Listen() | messages.Meet() | messages.Recover():
                return self._answer_group(request)
            case messages.GetStatus():
                return self._status()
            case messages.End():
                _LOG.info("ends, as a process asks for it")
                self.asked_to_end = True
                self.stop()
        return messages.Done()

    def _answer_group(self, request: messages.Listen | messages.Meet | messages.Recover) -> Answer:
        match request:
            case messages.Listen():
                return messages.Listening(*self.groups.listen(self.store, request.rank, request.limits))
            case messages.Meet():
                peers = {peer.node: (peer.host, peer.port) for peer in request.peers}
                self.groups.meet(self.store, request.rank, peers)
                return messages.Done()
            case messages.Recover():
                found = self.groups.recover(request.rank, request.alive, request.newest_on_disk, request.attempt)
                return messages.Recovered(found.snapshot.sequence, found.snapshot.step, found.lost, len(found.bad))

    def _greet(self, session: _Conversation, hello: messages.Hello) -> Answer:
        if hello.version != messages.PROTOCOL_VERSION:
            raise SnapshotRefused(
                "version",
                f"process {session.peer.pid} speaks version {hello.version} of the memory process's protocol, and this "
                f"one {messages.PROTOCOL_VERSION}: use the same stowplan for both, or end the memory process.",
            )
        if hello.run != self.store.run:
            raise SnapshotRefused(
                "run", f"run {hello.run!r} is asked for, and this is run {self.store.run!r}'s memory."
            )
        if hello.generation is not None:
            self.store.raise_generation(hello.generation)
        session.generation, session.greeted = hello.generation, True
        return messages.Welcome(self.store.run, self.node, self.store.generation, os.getpid())

    def _adopt(self, session: _Conversation, request: messages.Adopt, descriptor: int) -> Answer:
        region = Region.received(descriptor)
        try:
            geometry = Geometry(request.data_bytes, request.parity_bytes, request.coding.n)
            self._claim(session, request.rank)
            return _attached(self.store.adopt(request.rank, region, geometry, request.coding))
        except BaseException:
            region.close()
            raise

    def _status(self) -> Answer:
        store = self.store
        with store.exclusive():
            ranks = tuple(store.memory(rank).status(self._writers.pid(rank)) for rank in store.members())
            return messages.Status(
                store.run, self.node, os.getpid(), store.generation, store.num_ranks, store.global_sequence(),
                store.reduced(), ranks,
            )  # fmt: skip

    def _claim(self, session: _Conversation, rank: int) -> None:
        self._writers.claim(rank, session)
        self.store.abandon_unwritten(rank)  # what a former writer has left, also this process's own

    def _wait(self, session: _Conversation, request: messages.Await) -> Answer:
        until = time.monotonic() + min(request.timeout_seconds, _LONGEST_WAIT_SECONDS)
        while True:
            patience = max(0.0, min(until - time.monotonic(), _HANG_UP_SECONDS))
            state = self.store.wait(request.rank, request.sequence, request.state, patience)
            if state is State.FREE or state >= request.state or time.monotonic() >= until:
                return messages.Waited(state)
            if session.hung_up():
                raise protocol.Closed("the connection was closed while waiting")


def _attached(memory: RankMemory) -> messages.Attached:
    geometry = memory.geometry
    return messages.Attached(memory.rank, geometry.data_capacity_bytes, geometry.parity_capacity_bytes, memory.coding)
