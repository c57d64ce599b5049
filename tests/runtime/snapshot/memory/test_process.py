"""Real processes: trainers and memory processes that are killed, and what is in memory then."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from stowplan.core.errors import SnapshotMemoryUnavailable, SnapshotProcessUnavailable, SnapshotRefused
from stowplan.runtime.snapshot.memory import protocol
from stowplan.runtime.snapshot.memory.client import Writing, give_back, hold
from stowplan.runtime.snapshot.memory.connection import connect
from stowplan.runtime.snapshot.memory.locks import FileLock
from stowplan.runtime.snapshot.memory.process import main
from stowplan.runtime.snapshot.memory.slots import State
from tests.runtime.snapshot.conftest import RUN, eventually, process_of
from tests.runtime.snapshot.trainer import NUM_BYTES, RESERVED_BYTES, SCHEMA, content


def ended(process):
    """Also where nobody has reaped it yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def check_restorable(client, sequences):
    """The newest restorable snapshot is one of ``sequences``, and every one that can be read has its own bytes."""
    slots = [slot for slot in client.inspect() if slot.state >= State.LOCAL]
    assert max(slot.sequence for slot in slots) in sequences
    for slot in slots:
        schema, payload = client.read(slot.sequence)
        assert schema.tensors == SCHEMA.tensors
        assert schema.values == SCHEMA.values
        assert slot.step == 10 * slot.sequence
        assert np.array_equal(np.frombuffer(payload, np.uint8), content(client.rank, slot.sequence))


def write(client, sequence):
    return client.write(sequence, 10 * sequence, SCHEMA, [content(client.rank, sequence)])


# ---- the process ---------------------------------------------------------------------------------------------------
@pytest.fixture
def few_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(500, limits[1]), limits[1]))
    yield limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_it_is_nobody_s_child_in_a_session_of_its_own_without_torch(few_descriptors, clients, directory):
    clients()
    process = psutil.Process(process_of(directory))
    assert process.rlimit(psutil.RLIMIT_NOFILE) == (few_descriptors, few_descriptors)
    assert process.ppid() != os.getpid()
    assert os.getsid(process.pid) not in (os.getsid(0), process.ppid())
    assert os.getpgid(process.pid) != os.getpgid(0)
    assert process.cwd() == "/"
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_there_is_one_for_each_run_and_node_whoever_starts_it(trainers, directory):
    for trainer in [trainers(rank, 4) for rank in range(4)]:
        trainer.until("READY")
    pid = process_of(directory)
    command = ["--run", RUN, "--node", "local", "--num-ranks", "4", "--directory", str(directory)]
    subprocess.run([sys.executable, "-m", "stowplan.runtime.snapshot.memory.process", *command], check=True)
    assert process_of(directory) == pid

    def serving():  # who found one there already ends
        ours = [each for each in psutil.process_iter(["cmdline"]) if str(directory) in (each.info["cmdline"] or [])]
        return [each.pid for each in ours if "--run" in each.info["cmdline"]]

    eventually(lambda: serving() == [pid])


def test_it_outlives_the_process_group_of_its_starter(directory, clients):
    script = (
        "import sys; from pathlib import Path; from stowplan.runtime.snapshot.memory.client import SnapshotClient;"
        f"c = SnapshotClient({RUN!r}, 0, directory=Path(sys.argv[1]), idle_seconds=60); c.reserve({RESERVED_BYTES});"
        "print('up', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(directory)]
    starter = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    with starter:
        assert starter.stdout.readline() == "up\n"
        pid = process_of(directory)
        os.killpg(starter.pid, signal.SIGKILL)
    assert process_of(directory) == pid


@pytest.mark.parametrize("warned", [False, True], ids=["well", "warned"])
def test_it_ends_on_request_and_leaves_nothing_but_a_log_with_warnings(warned, clients, directory):
    client = clients()
    client.reserve(RESERVED_BYTES)
    process = psutil.Process(process_of(directory))
    if warned:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(directory / f"{RUN}@local.sock"))
            stranger.sendall(b"GET / HTTP/1.1")
            stranger.recv(100)
    (directory / f"{RUN}@local.start").touch()  # of a starter that was killed
    client.end()
    eventually(lambda: ended(process))
    assert [path.name for path in directory.iterdir()] == [f"{RUN}@local.log"] * warned
    with pytest.raises(SnapshotProcessUnavailable, match="told to" if warned else "no memory process"):
        connect(RUN, "local", directory=directory)


def test_the_socket_of_a_killed_process_is_removed(clients, directory):
    clients()
    process = psutil.Process(process_of(directory))
    process.kill()
    eventually(lambda: ended(process))

    def looked():  # the lock of a process that is killed is free a little later
        with pytest.raises(SnapshotProcessUnavailable):
            connect(RUN, "local", directory=directory)
        return [path.name for path in directory.iterdir()]

    eventually(lambda: looked() == [f"{RUN}@local.log"])


def test_a_socket_whose_process_does_not_listen_yet_stays(directory):
    files = protocol.files_of(RUN, "local", directory)
    lock = FileLock(files.lock)
    assert lock.acquire()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(files.socket))
        with pytest.raises(SnapshotProcessUnavailable):
            connect(RUN, "local", directory=directory)
        assert files.socket.exists()
    lock.release()


def test_it_ends_by_sigterm(clients, directory):
    clients()
    process = psutil.Process(process_of(directory))
    process.terminate()
    eventually(lambda: ended(process))


def test_it_ends_when_nobody_was_connected_for_long(clients, directory):
    client = clients(idle_seconds=0.3)
    process = psutil.Process(process_of(directory))
    time.sleep(1)
    assert not ended(process), "somebody is connected"
    client.close()
    eventually(lambda: ended(process))
    assert "nobody was connected for 0.3 s" in (directory / f"{RUN}@local.log").read_text()


def test_why_it_cannot_start_is_told(directory, clients, capsys):
    (directory / f"{RUN}@local.sock").mkdir()
    with pytest.raises(SnapshotProcessUnavailable, match=r"cannot be started: .*Is a directory"):
        clients()
    (directory / f"{RUN}@local.sock").rmdir()
    directory.chmod(0o755)
    with pytest.raises(SnapshotRefused, match="open to others"):
        main(["--run", RUN, "--node", "local", "--num-ranks", "1", "--directory", str(directory)])
    directory.chmod(0o700)


def test_too_little_memory_is_told_before_any_is_taken(clients):
    client = clients()
    with pytest.raises(SnapshotMemoryUnavailable, match=r"rank 0's snapshots \(2 slots of 128.00 TiB") as raised:
        client.reserve(1 << 47)
    assert raised.value.needed_bytes > 1 << 48
    client.reserve(RESERVED_BYTES)
    assert isinstance(write(client, 1), Writing)


# ---- a trainer is lost ---------------------------------------------------------------------------------------------
def test_a_snapshot_that_was_being_copied_is_never_restored(trainers, clients):
    trainer = trainers()
    complete = trainer.until("GLOBAL")
    trainer.until("BEGIN")
    trainer.kill()
    torn, committed = trainer.last("BEGIN"), trainer.last("COMMIT")
    client = clients(generation=1)
    client.reserve(RESERVED_BYTES)
    newest = max(slot.sequence for slot in client.inspect() if slot.state >= State.LOCAL)
    assert client.wait(newest, State.GLOBAL) is State.GLOBAL
    check_restorable(client, {committed, torn})
    assert newest >= complete
    assert {slot.state for slot in client.inspect()} <= {State.FREE, State.GLOBAL}, "nothing is left half written"


def test_its_memory_is_not_another_s_until_it_has_ended(clients, trainers, directory, monkeypatch):
    trainer = trainers()
    trainer.until("GLOBAL")
    trainer.process.send_signal(signal.SIGSTOP)
    client = clients(generation=1)
    with pytest.raises(SnapshotRefused, match=f"process {trainer.process.pid} still has rank 0's memory") as raised:
        client.reserve(RESERVED_BYTES)
    assert raised.value.reason == "busy"
    trainer.process.send_signal(signal.SIGCONT)
    trainer.until("REFUSED")  # its generation is stale
    trainer.process.wait()
    client.reserve(RESERVED_BYTES)
    check_restorable(client, {trainer.last("GLOBAL"), trainer.last("COMMIT"), trainer.last("COMMIT") + 1})


def test_who_is_killed_while_waiting_does_not_keep_the_process(clients, trainers, directory):
    client = clients(1, num_ranks=2, idle_seconds=0.3)
    process = psutil.Process(process_of(directory))
    trainer = trainers(0, 2)
    trainer.until("COMMIT")  # then it waits a minute for the other rank
    trainer.kill()
    client.close()
    eventually(lambda: ended(process))


# ---- the memory process is lost ------------------------------------------------------------------------------------
def test_training_goes_on_and_redundancy_is_reduced_until_all_ranks_have_given_their_memory_back(clients, directory):
    first, second = clients(0, num_ranks=2), clients(1, num_ranks=2)
    for client in (first, second):
        client.reserve(RESERVED_BYTES)
        write(client, 1)
    assert first.wait(1, State.GLOBAL) is State.GLOBAL
    assert first.status().reduced == ()
    process = psutil.Process(process_of(directory))
    process.kill()
    eventually(lambda: ended(process))
    with pytest.raises(SnapshotProcessUnavailable, match="Training can go on"):
        write(first, 2)
    first.adopt()
    assert any("rank 1 has no memory here" in reason for reason in first.status().reduced)
    assert first.status().global_sequence == 0
    second.adopt()
    eventually(lambda: first.status().reduced == ())
    assert second.status().global_sequence == 1
    for client in (first, second):
        check_restorable(client, {1})
        assert isinstance(write(client, 2), Writing)
    assert second.wait(2, State.GLOBAL) is State.GLOBAL


def test_damage_meanwhile_is_noticed(clients, directory):
    client = clients()
    client.reserve(RESERVED_BYTES)
    writing = write(client, 1)
    client.wait(1, State.GLOBAL)
    os.kill(process_of(directory), signal.SIGKILL)
    writing.payload[NUM_BYTES - 1] ^= 1
    client.adopt()
    eventually(lambda: any("snapshot 1" in reason and "is damaged" in reason for reason in client.status().reduced))


def test_an_agent_keeps_what_trainer_and_memory_process_lose_together(clients, trainers, directory):
    trainer = trainers()
    trainer.until("GLOBAL")
    agent = connect(RUN, "local", directory=directory)
    held = hold(agent, 0)
    agent.close()
    trainer.until("BEGIN")
    os.kill(process_of(directory), signal.SIGKILL)
    trainer.process.kill()
    trainer.kill()
    client = clients(generation=1)
    new = connect(RUN, "local", generation=1, directory=directory)
    give_back(new, held)
    held.close()
    new.close()
    client.reserve(RESERVED_BYTES)
    known = set(range(trainer.last("GLOBAL"), trainer.last("BEGIN") + 1))
    check_restorable(client, known)


# ---- any moment ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_kills", [30, pytest.param(300, marks=[pytest.mark.full, pytest.mark.timeout(3600)])])
def test_whatever_is_killed_whenever(num_kills, trainers, clients, directory, record_property):
    seed = int(os.environ.get("STOWPLAN_TEST_SEED", time.time_ns() % 10**6))
    print(f"STOWPLAN_TEST_SEED={seed}")
    choice = random.Random(seed)
    generation = torn = 0
    trainer = trainers()
    trainer.until("GLOBAL")
    for _ in range(num_kills):
        trainer.until("BEGIN")
        time.sleep(choice.uniform(0, 0.03))
        if choice.random() < 1 / 3:
            os.kill(process_of(directory), signal.SIGKILL)
            trainer.until("ADOPTED")
            trainer.until("GLOBAL")
            continue
        trainer.kill()
        begun, committed = trainer.last("BEGIN"), trainer.last("COMMIT")
        torn += begun > committed
        generation += 1
        client = clients(generation=generation)
        client.reserve(RESERVED_BYTES)
        check_restorable(client, {committed, begun} if committed else {begun - 1, begun})
        client.close()
        trainer = trainers(generation=generation)
        trainer.until("GLOBAL")
    record_property("torn", torn)
    print(f"{num_kills} SIGKILLs, {generation} of trainers, {torn} of these in mid-copy")
    assert torn
    assert protocol.files_of(RUN, "local", directory).socket.exists()
