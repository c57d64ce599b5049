"""Messages and who may send them: nothing that a peer sends ends a server, and nobody else may connect."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.errors import SnapshotProcessUnavailable, SnapshotRefused
from stowplan.runtime.snapshot.exchange.group_coder import GroupCoder
from stowplan.runtime.snapshot.memory import messages, protocol, server
from stowplan.runtime.snapshot.memory.connection import connect
from stowplan.runtime.snapshot.memory.layout import Coding
from stowplan.runtime.snapshot.memory.messages import Done, Hello, Refused, Reserve, Welcome
from stowplan.runtime.snapshot.memory.protocol import LONGEST_MESSAGE_BYTES, Closed, Peer
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.runtime.snapshot.memory.slots import State
from stowplan.runtime.snapshot.memory.store import Store
from tests.runtime.snapshot.conftest import eventually

RUN = "job-1"
CODING = Coding("raim5", 4, 1, 3)
SLOT = messages.SlotStatus(State.GLOBAL, 1, 10, 0, 100, 10, 30, ((0, 4),), ())
EXAMPLES = [
    Hello(RUN, 3), Hello(RUN), Reserve(0, 100, 30, CODING), messages.Attach(1, True), messages.Adopt(1, 9, 8, CODING),
    messages.Detach(1), messages.Begin(0, 1, 10, 100, 10), messages.Written(0, 1), messages.Abandon(0, 1),
    messages.Await(0, 1, State.LOCAL, 0.5), messages.Inspect(0), messages.RollBack(1), messages.GetStatus(),
    messages.RaiseGeneration(4), messages.End(),
    Welcome(RUN, "node-0", 3, 123), messages.Attached(0, 100, 30, CODING), messages.Begun(1),
    messages.Skipped(4, State.LOCAL), messages.Waited(State.FREE), messages.Inspected((SLOT, SLOT)),
    messages.Status(RUN, "n", 1, 2, 1, 4, ("a",), (messages.RankStatus(0, 100, 30, CODING, None, (SLOT,), 0.5),)),
    Done(),
    messages.Listen(0), messages.Meet(0, (messages.Peer(1, "::1", 80),)), messages.Recover(0, (0, 2), "step 9", 1),
    messages.Listening("::1", 80), messages.Recovered(3, 30, (1,), 2), messages.Lost(("node 1",), "stands", "advice"),
    Refused("run", "another"), messages.Unavailable("too much", 9, None),
]  # fmt: skip


@pytest.fixture
def pair():
    left, right = socket.socketpair(socket.AF_UNIX)
    right.settimeout(5)
    with left, right:
        yield left, right


@pytest.fixture
def serving(directory):
    """A server in a thread of this process."""
    coder = GroupCoder(RUN, "127.0.0.1")
    made = server.Server(Store(RUN, 0, 2, coder), "local", protocol.files_of(RUN, "local", directory).socket, 60, coder)
    thread = threading.Thread(target=made.serve, name="serving")
    thread.start()
    yield made
    made.stop()
    thread.join()
    made.store.close()


@pytest.fixture
def raw(directory, serving):
    """A connection that can send anything."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(protocol.files_of(RUN, "local", directory).socket))
        yield connection


def ask(connection, request, descriptors=()):
    protocol.send(connection, messages.message_to_plain(request), descriptors)
    plain, received = protocol.receive(connection)
    protocol.close_all(received)
    return messages.answer_from_plain(plain)


def reason(connection, request, descriptors=()):
    answer = ask(connection, request, descriptors)
    assert isinstance(answer, Refused), answer
    return answer.reason


def num_open(name):
    """Descriptors of this process, and of the server in it, that lead to ``name``."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(str(path.readlink()))
    return sum(name in link for link in links)


def alive(directory):
    connection = connect(RUN, "local", directory=directory)
    connection.close()
    return connection.welcome.pid == os.getpid()


# ---- messages ------------------------------------------------------------------------------------------------------
def test_every_message_comes_back(pair):
    left, right = pair
    assert {type(each) for each in EXAMPLES} == {*get_args(messages.Request), *get_args(messages.Answer)}
    for message in EXAMPLES:
        protocol.send(left, messages.message_to_plain(message))
        plain, descriptors = protocol.receive(right)
        read = (
            messages.request_from_plain if type(message) in get_args(messages.Request) else messages.answer_from_plain
        )
        assert (read(plain), descriptors) == (message, [])


def test_descriptors_come_with_their_own_message_and_close_on_exec(pair):
    left, right = pair
    region = Region.create("test", 4096)
    region.view[0] = 5
    protocol.send(left, {"number": 1}, [region.descriptor, region.descriptor])
    protocol.send(left, {"number": 2})
    plain, received = protocol.receive(right)
    assert (plain, len(received)) == ({"number": 1}, 2)
    assert not any(os.get_inheritable(descriptor) for descriptor in received)
    assert os.pread(received[0], 1, 0) == b"\x05"
    protocol.close_all(received)
    assert protocol.receive(right) == ({"number": 2}, [])
    region.close()


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("<I", LONGEST_MESSAGE_BYTES + 1),
        struct.pack("<I", 0),
        struct.pack("<I", 4) + b"\xff\xfe{}",
        struct.pack("<I", 100_000) + b"[" * 100_000,
    ],
    ids=["too long", "empty", "no text", "deep"],
)
def test_what_is_no_message_is_refused(pair, sent):
    left, right = pair
    left.sendall(sent)
    with pytest.raises(SnapshotRefused) as raised:
        protocol.receive(right)
    assert raised.value.reason == "malformed"


def test_a_message_that_breaks_off(pair, monkeypatch):
    left, right = pair
    monkeypatch.setattr(protocol, "_SECONDS_FOR_ONE_MESSAGE", 0.05)
    left.sendall(struct.pack("<I", 10) + b"{")
    with pytest.raises(Closed, match="not complete in time"):
        protocol.receive(right)
    left.sendall(b"\0\0")
    left.close()
    with pytest.raises(Closed, match="was closed"):
        protocol.receive(right)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_wrong_types_and_numbers_are_refused(message):
    read = messages.request_from_plain if type(message) in get_args(messages.Request) else messages.answer_from_plain
    for each in fields(message):
        plain = messages.message_to_plain(message)
        for wrong in ([[]], {"x": 1}):
            with pytest.raises(SnapshotRefused):
                read(plain | {each.name: wrong})
        if isinstance(getattr(message, each.name), int) and not isinstance(getattr(message, each.name), bool):
            for number in (-1, 1 << 63):
                with pytest.raises(SnapshotRefused):
                    read(plain | {each.name: number})
    with pytest.raises(SnapshotRefused, match="unknown key"):
        read(messages.message_to_plain(message) | {"more": 1})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_json_is_a_request_or_refused(plain):
    with pytest.raises(SnapshotRefused):
        messages.request_from_plain(plain)
    for kind in ("Begin", "Status", plain):
        with pytest.raises(SnapshotRefused):
            messages.request_from_plain({"kind": kind, "rank": plain})


# ---- where and who -------------------------------------------------------------------------------------------------
def test_the_directory_is_the_user_s_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert protocol.socket_directory() == tmp_path / "stowplan"
    assert (tmp_path / "stowplan").stat().st_mode & 0o777 == 0o700
    (tmp_path / "stowplan").chmod(0o750)
    with pytest.raises(SnapshotRefused, match=r"open to others \(mode 0750\)"):
        protocol.socket_directory()
    (tmp_path / "stowplan").rmdir()
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "stowplan").symlink_to(tmp_path / "other")
    with pytest.raises(SnapshotRefused, match="is no directory"):
        protocol.socket_directory()
    (tmp_path / "stowplan").unlink()
    protocol.socket_directory()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(SnapshotRefused, match=f"belongs to user {user}"):
        protocol.socket_directory()
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(protocol, "check_directory", lambda directory: None)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    assert protocol.socket_directory() == Path(f"/tmp/stowplan-{user + 1}")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a" * 97, "a b", "a@b", "ä"])
def test_names_that_are_no_part_of_a_path(name, tmp_path):
    for run, node, most in ((name, "node", 64), ("run", name, 96)):
        with pytest.raises(SnapshotRefused, match=f"1 to {most} letters") as raised:
            protocol.files_of(run, node, tmp_path)
        assert raised.value.reason == "malformed"


def test_paths_that_are_too_long_for_a_socket(tmp_path):
    with pytest.raises(SnapshotRefused, match="shorten run or node"):
        protocol.files_of("a" * 64, "b" * 64, tmp_path)


def test_another_user_is_refused_by_the_server_and_by_the_client(directory, serving, monkeypatch):
    monkeypatch.setattr(protocol, "peer_of", lambda connection: Peer(77, os.geteuid() + 1))
    with pytest.raises(SnapshotRefused, match="process 77 is of user") as raised:
        connect(RUN, "local", directory=directory)
    assert raised.value.reason == "user"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(protocol.files_of(RUN, "local", directory).socket))
        plain, _ = protocol.receive(connection)
        assert messages.answer_from_plain(plain).reason == "user"
        with pytest.raises(Closed):
            protocol.receive(connection)
    monkeypatch.undo()
    assert alive(directory)


def test_the_kernel_says_who_connected(pair):
    assert protocol.peer_of(pair[0]) == Peer(os.getpid(), os.geteuid())


# ---- a server ------------------------------------------------------------------------------------------------------
def test_the_first_message_is_hello(raw):
    assert reason(raw, messages.GetStatus()) == "order"
    assert isinstance(ask(raw, Hello(RUN)), Welcome)
    assert isinstance(ask(raw, messages.GetStatus()), messages.Status)


def test_other_versions_and_runs_are_refused(raw):
    assert reason(raw, Hello(RUN, 0, version=99)) == "version"
    assert reason(raw, Hello("job-0", 0)) == "run"
    assert reason(raw, messages.GetStatus()) == "order"


def test_stale_generations_are_refused_whatever_they_ask(raw, directory, serving):
    assert isinstance(ask(raw, Hello(RUN, 1)), Welcome)
    assert isinstance(ask(raw, Reserve(0, 100)), messages.Attached)
    assert isinstance(ask(raw, messages.Attach(0, True)), messages.Attached)
    launcher = connect(RUN, "local", directory=directory)
    launcher.ask(messages.RaiseGeneration(3), Done)
    for request in (messages.Begin(0, 1, 10, 100, 10), messages.GetStatus(), messages.RollBack(0), messages.End()):
        assert reason(raw, request) == "generation"
    assert reason(raw, messages.RaiseGeneration(2)) == "generation"
    assert reason(raw, Hello(RUN, 2)) == "generation"
    with pytest.raises(SnapshotRefused, match="generation 2 is stale"):
        connect(RUN, "local", 2, directory)
    assert reason(raw, Hello(RUN, 5)) == "generation"
    launcher.close()
    newest = connect(RUN, "local", 5, directory)
    newest.close()
    assert newest.welcome.generation == 5
    assert serving.store.generation == 5


def test_only_who_attached_a_rank_writes_it(raw, directory):
    assert isinstance(ask(raw, Hello(RUN)), Welcome)
    assert reason(raw, messages.Attach(0, False)) == "unknown"
    assert isinstance(ask(raw, Reserve(0, 100)), messages.Attached)
    assert isinstance(ask(raw, messages.Attach(0, False)), messages.Attached)
    assert reason(raw, messages.Attach(0, True)) == "generation"
    assert reason(raw, messages.Begin(0, 1, 10, 100, 10)) == "order"
    assert isinstance(ask(raw, Hello(RUN, 0)), Welcome)
    assert reason(raw, messages.Begin(0, 1, 10, 100, 10)) == "order"
    assert isinstance(ask(raw, messages.Attach(0, True)), messages.Attached)
    assert isinstance(ask(raw, messages.Begin(0, 1, 10, 100, 10)), messages.Begun)
    assert ask(raw, messages.Begin(0, 2, 20, 100, 10)) == messages.Skipped(1, State.WRITING)


def test_sizes_that_do_not_fit_are_refused(raw):
    assert isinstance(ask(raw, Hello(RUN, 0)), Welcome)
    assert reason(raw, Reserve(0, 0)) == "size"
    assert reason(raw, Reserve(2, 100)) == "unknown"
    assert isinstance(ask(raw, Reserve(0, 1 << 47)), messages.Unavailable)
    assert isinstance(ask(raw, Reserve(0, 100)), messages.Attached)
    assert isinstance(ask(raw, messages.Attach(0, True)), messages.Attached)
    assert reason(raw, messages.Begin(0, 1, 10, 101, 10)) == "size"
    assert reason(raw, messages.Begin(0, 1, 10, 10, 11)) == "size"
    assert isinstance(ask(raw, Reserve(0, 200)), messages.Attached), "nothing is in it yet"
    assert isinstance(ask(raw, messages.Begin(0, 1, 10, 200, 10)), messages.Begun)
    assert reason(raw, Reserve(0, 100)) == "size"


def test_only_memory_of_this_run_and_of_a_fixed_size_is_adopted(raw):
    assert isinstance(ask(raw, Hello(RUN, 0)), Welcome)
    adopt = messages.Adopt(1, 100, 0, Coding())
    assert reason(raw, adopt) == "malformed"
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, 1 << 20)
    assert reason(raw, adopt, [unsealed]) == "unsafe"
    os.close(unsealed)
    region = Region.create("other", 1 << 20)
    assert reason(raw, adopt, [region.descriptor]) == "size"
    region.close()
    assert reason(raw, messages.Attach(1, False)) == "unknown"


@pytest.mark.parametrize("where", ["first", "later"])
def test_garbage_closes_the_connection_and_nothing_else(where, directory, serving, raw):
    region = Region.create("garbage", 4096)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 3) + b"{]}", os.urandom(64), b"\xff" * 8):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(protocol.files_of(RUN, "local", directory).socket))
            if where == "later":
                ask(connection, Hello(RUN, 0))
            protocol.send(connection, {"kind": "GetStatus"}, [region.descriptor] * 4)
            protocol.receive(connection)
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            with pytest.raises((Closed, SnapshotRefused, ConnectionResetError)):  # noqa: PT012
                plain, _ = protocol.receive(connection)
                assert plain["reason"] == "malformed"
                protocol.receive(connection)
    for unknown in ({}, {"kind": "Fire"}, {"kind": "Begin"}, [], None, "x" * 1000):
        protocol.send(raw, unknown)
        assert protocol.receive(raw)[0]["reason"] == "malformed"
    assert alive(directory)
    region.close()
    eventually(lambda: not num_open("memfd:garbage"))


def test_too_many_descriptors_are_refused_and_closed(raw, serving, directory):
    region = Region.create("many", 4096)
    content = json.dumps({"kind": "GetStatus"}).encode()
    socket.send_fds(raw, [struct.pack("<I", len(content)) + content], [region.descriptor] * 20)
    assert protocol.receive(raw)[0]["reason"] == "malformed"
    region.close()
    assert alive(directory)
    eventually(lambda: not num_open("memfd:many"))


@pytest.mark.parametrize("what", ["accept", "peer", "thread"])
def test_nobody_can_connect_for_a_while_and_all_goes_on(what, directory, serving, monkeypatch):
    """As where there are no descriptors or threads left."""
    left = [2]

    def failing(original, error):
        def call(*arguments, **options):
            if threading.current_thread().name == "serving" and left[0]:
                left[0] -= 1
                raise error
            return original(*arguments, **options)

        return call

    known = connect(RUN, "local", directory=directory)
    if what == "accept":
        monkeypatch.setattr(socket.socket, "accept", failing(socket.socket.accept, OSError(24, "Too many open files")))
    elif what == "peer":
        monkeypatch.setattr(protocol, "peer_of", failing(protocol.peer_of, OSError(107, "gone")))
    else:
        start = failing(threading.Thread.start, RuntimeError("can't start new thread"))
        monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(3):
        with contextlib.suppress(SnapshotProcessUnavailable, SnapshotRefused):
            connect(RUN, "local", directory=directory).close()
    assert not left[0]
    assert alive(directory)
    known.ask(messages.GetStatus(), messages.Status)
    known.close()
    eventually(lambda: not serving._sessions)


def test_two_clients_at_once_have_a_rank_each(directory, clients, serving):
    first, second = clients(0, num_ranks=2), clients(1, num_ranks=2)
    threads = [threading.Thread(target=client.reserve, args=(100_000,)) for client in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    status = first.status()
    assert [(each.rank, each.data_bytes, each.writer_pid) for each in status.ranks] == [
        (0, 100_000, os.getpid()), (1, 100_000, os.getpid()),
    ]  # fmt: skip


def test_nobody_there_is_told_with_the_place(directory):
    with pytest.raises(SnapshotProcessUnavailable, match=f"no memory process serves run 'job-1' .*{directory}"):
        connect(RUN, "local", directory=directory)
