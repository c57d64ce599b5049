"""The memory process's socket: where it is, who may use it, and how messages and descriptors go through it.

A message is four bytes, its length (little-endian), and JSON; descriptors come with the first of these bytes. Who may
connect: processes of the same user, by the directory's mode (0700) and by what the kernel says of the peer.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stowplan.core.errors import SnapshotRefused
from stowplan.runtime.snapshot.memory.messages import check_name

__all__ = [
    "IDLE_SECONDS",
    "LONGEST_MESSAGE_BYTES",
    "LOOPBACK",
    "Closed",
    "Peer",
    "check_peer",
    "close_all",
    "files_of",
    "peer_of",
    "receive",
    "send",
    "socket_directory",
]

LONGEST_MESSAGE_BYTES = 1 << 20
IDLE_SECONDS = 600.0  # for which a memory process stays without anybody connected, unless told otherwise
LOOPBACK = "127.0.0.1"  # where its exchange listens, unless told otherwise
_MOST_DESCRIPTORS = 4
_LONGEST_PATH_BYTES = 107  # sun_path, less its zero
_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # ucred: process, user, group
_SECONDS_FOR_ONE_MESSAGE = 10.0


class Closed(ConnectionError):
    """The other side has closed the connection, between two messages or within one."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected, as the kernel says; ``pid`` is 0 where it is of another namespace."""

    pid: int
    user: int


@dataclass(frozen=True, slots=True)
class Files:
    """What a memory process has in the directory: socket, lock, log, and the lock of those who start it."""

    socket: Path
    lock: Path
    log: Path
    start: Path


# ---- who and where -------------------------------------------------------------------------------------------------
def socket_directory() -> Path:
    """``$XDG_RUNTIME_DIR/stowplan``, or ``/tmp/stowplan-UID``, which only this user may enter; made if need be.

    Raises SnapshotRefused ("unsafe"): it is another user's, a link, or open to others.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    directory = Path(runtime) / "stowplan" if runtime else Path(f"/tmp/stowplan-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700, parents=bool(runtime))
    check_directory(directory)
    return directory


def check_directory(directory: Path) -> None:
    """Raise SnapshotRefused ("unsafe") unless it is a directory, this user's, and closed to all others."""
    status = directory.lstat()
    problem = (
        "is no directory" if not stat.S_ISDIR(status.st_mode)
        else f"belongs to user {status.st_uid}" if status.st_uid != os.geteuid()
        else f"is open to others (mode {stat.S_IMODE(status.st_mode):04o})" if status.st_mode & 0o077
        else None
    )  # fmt: skip
    if problem:
        raise SnapshotRefused(
            "unsafe",
            f"{directory}, where the memory process's socket is to be, {problem}: it has to be a directory of user "
            f"{os.geteuid()} with mode 0700. Mend or remove it, or set XDG_RUNTIME_DIR to another place.",
        )


_MOST_NODE_NAME = 96  # a host's, and which layout of ranks over nodes the memory is of


def files_of(run: str, node: str, directory: Path) -> Files:
    """The files of a run's memory process on a node. Raises SnapshotRefused ("malformed") for names that do not fit."""
    name = f"{check_name(run, 'run')}@{check_name(node, 'node', _MOST_NODE_NAME)}"
    path = directory / f"{name}.sock"
    if len(os.fsencode(path)) > _LONGEST_PATH_BYTES:
        raise SnapshotRefused(
            "malformed",
            f"{path} is longer than the {_LONGEST_PATH_BYTES} bytes of a socket's path: shorten run or node, or set "
            f"XDG_RUNTIME_DIR to a shorter path.",
        )
    return Files(path, path.with_suffix(".lock"), path.with_suffix(".log"), path.with_suffix(".start"))


def peer_of(connection: socket.socket) -> Peer:
    """SO_PEERCRED: who connected, or who listens."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(packed)
    return Peer(pid, user)


def check_peer(peer: Peer) -> None:
    """Raise SnapshotRefused ("user") for another user, root's processes included."""
    if peer.user != os.geteuid():
        raise SnapshotRefused(
            "user",
            f"process {peer.pid} is of user {peer.user}, and this memory of snapshots belongs to user {os.geteuid()}: "
            f"run both as the same user.",
        )


# ---- messages ------------------------------------------------------------------------------------------------------
def send(connection: socket.socket, plain: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message, and copies of descriptors with it."""
    content = json.dumps(plain, separators=(",", ":")).encode()
    message = _LENGTH.pack(len(content)) + content
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sent = connection.sendmsg([message], rights)
    connection.sendall(message[sent:])


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message, and descriptors that the caller has to close.

    Waits without limit for it to begin (or as long as the socket's own timeout), and seconds for it to be complete.

    Raises Closed; SnapshotRefused ("malformed") for what is no message, after which nothing can be read any more.
    """
    descriptors: list[int] = []
    patience = connection.gettimeout()
    try:
        head = b""
        while len(head) < _LENGTH.size:
            part, found = _receive_part(connection, _LENGTH.size - len(head))
            descriptors += found
            if not part:
                raise Closed("the connection was closed")
            head += part
            connection.settimeout(_SECONDS_FOR_ONE_MESSAGE)
        (length,) = _LENGTH.unpack(head)
        if length > LONGEST_MESSAGE_BYTES:
            raise SnapshotRefused(
                "malformed", f"a message of {length} bytes: {LONGEST_MESSAGE_BYTES} bytes are the most."
            )
        content = bytearray()
        while len(content) < length:
            part = connection.recv(min(length - len(content), 1 << 16))
            if not part:
                raise Closed("the connection was closed within a message")
            content += part
        return _parsed(content), descriptors
    except TimeoutError:
        close_all(descriptors)
        raise Closed("a message was not complete in time") from None
    except BaseException:
        close_all(descriptors)
        raise
    finally:
        connection.settimeout(patience)


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that came with a message and are not kept."""
    for descriptor in descriptors:
        os.close(descriptor)


def _receive_part(connection: socket.socket, num_bytes: int) -> tuple[bytes, list[int]]:
    space = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)
    part, ancillary, flags, _ = connection.recvmsg(num_bytes, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_all(descriptors)
        raise SnapshotRefused("malformed", f"a message with more than {_MOST_DESCRIPTORS} descriptors.")
    return part, list(descriptors)


def _parsed(content: bytearray) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SnapshotRefused("malformed", f"a message that is no JSON: {error}.") from None
