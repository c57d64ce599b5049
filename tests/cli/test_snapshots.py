"""``stowplan snapshots status``: real memory processes, and none."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import pytest

from stowplan.runtime.snapshot.memory.client import SnapshotClient
from stowplan.runtime.snapshot.memory.layout import Coding
from stowplan.runtime.snapshot.memory.schema import Schema, Tensor
from stowplan.runtime.snapshot.memory.slots import State
from tests.cli.commands import run


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        yield Path(path)


@pytest.fixture
def client(directory):
    made = SnapshotClient("llama-7", 0, node="a", directory=directory, idle_seconds=30)
    yield made
    made.end()


def test_none_is_no_error(directory):
    assert run("snapshots", "status", "--directory", directory).stdout == "No memory process of snapshots runs here.\n"


def test_what_is_held_is_told(client, directory):
    client.reserve(4096)
    schema = Schema((Tensor("weights", "uint8", (3,), 0, 3),))
    client.write(1, 10, schema, [b"abc"])
    assert client.wait(1, State.GLOBAL) is State.GLOBAL
    said = run("snapshots", "status", "--directory", directory)
    assert said.exit_code == 0
    assert said.stdout.startswith("run llama-7, node a: process ")
    assert f"written by process {os.getpid()}" in said.stdout
    assert "snapshot 1, step 10: GLOBAL" in said.stdout
    assert "last that all ranks have: step 10 (snapshot 1); all trainers may be lost, not the node" in said.stdout
    assert re.search(r"the last one stopped training for 0\.\d+ s, took 0\.\d+ s in all", said.stdout)
    assert "reduced" not in said.stdout
    (status,) = json.loads(run("snapshots", "status", "--directory", directory, "--json").stdout)
    assert (status["run"], status["global_sequence"]) == ("llama-7", 1)
    other = run("snapshots", "status", "--directory", directory, "--run", "another", "--json")
    assert json.loads(other.stdout) == []


def test_a_run_s_memory_is_given_up(directory):
    other = SnapshotClient("llama-8", 0, node="a", directory=directory, idle_seconds=30)
    SnapshotClient("llama-7", 0, node="a", directory=directory, idle_seconds=30).close()
    assert "Ended process" in run("snapshots", "end", "--run", "llama-7", "--directory", directory).stdout
    left = json.loads(run("snapshots", "status", "--directory", directory, "--json").stdout)
    assert [status["run"] for status in left] == ["llama-8"]
    again = run("snapshots", "end", "--run", "llama-7", "--directory", directory)
    assert (again.exit_code, again.stdout) == (0, "No memory process of run llama-7 runs here.\n")
    other.end()


def test_what_a_code_stands_is_told(client, directory):
    client.reserve(4096, 4096, Coding("rs", 5, 2, 1))
    said = run("snapshots", "status", "--directory", directory).stdout
    assert "last that all ranks have: none yet; all trainers may be lost, and any 2 of 5 nodes (rs)" in said
    assert "2 slots of 4.00 KiB and 4.00 KiB of parity" in said
