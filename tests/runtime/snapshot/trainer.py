"""A trainer to be killed: snapshots of known bytes, one after the other. ``python -m tests.runtime.snapshot.trainer``.

Arguments: directory, run, rank, number of ranks, generation. It says on stdout what it has come to.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from stowplan.core.errors import SnapshotProcessUnavailable, SnapshotRefused
from stowplan.runtime.snapshot.memory.client import SnapshotClient, Writing
from stowplan.runtime.snapshot.memory.schema import Schema, Tensor
from stowplan.runtime.snapshot.memory.slots import State

NUM_BYTES = 10 << 20  # three chunks
RESERVED_BYTES = NUM_BYTES + 4096
PIECE_BYTES = 256 << 10
SCHEMA = Schema((Tensor("state", "uint64", (NUM_BYTES // 8,), 0, NUM_BYTES),), values={"lr": 0.1})
_COUNTS = np.arange(NUM_BYTES // 8, dtype=np.uint64)


def content(rank: int, sequence: int) -> np.ndarray:
    """The bytes of a snapshot."""
    return (_COUNTS * np.uint64(2 * sequence + 1) + np.uint64(rank)).view(np.uint8)


def say(word: str, sequence: int = 0) -> None:
    os.write(1, f"{word} {sequence}\n".encode())


def train(client: SnapshotClient, rank: int) -> None:
    status = client.status()
    sequence = max((slot.sequence for each in status.ranks if each.rank == rank for slot in each.slots), default=0)
    while True:
        sequence += 1
        source = content(rank, sequence)
        writing = client.begin(sequence, 10 * sequence, SCHEMA)
        assert isinstance(writing, Writing)
        say("BEGIN", sequence)
        for begin in range(0, NUM_BYTES, PIECE_BYTES):
            writing.payload[begin : begin + PIECE_BYTES] = source[begin : begin + PIECE_BYTES].data
            time.sleep(0.0002)
        client.commit(sequence)
        say("COMMIT", sequence)
        if client.wait(sequence, State.GLOBAL) is State.GLOBAL:
            say("GLOBAL", sequence)


def main() -> None:
    directory, run, rank, num_ranks, generation = sys.argv[1:]
    client = SnapshotClient(
        run, int(rank), num_ranks=int(num_ranks), generation=int(generation), directory=Path(directory), idle_seconds=60
    )
    client.reserve(RESERVED_BYTES)
    say("READY")
    while True:
        try:
            train(client, int(rank))
        except (SnapshotProcessUnavailable, SnapshotRefused) as error:
            if isinstance(error, SnapshotRefused) and error.reason != "order":
                say("REFUSED")
                raise
            say("LOST")
            client.adopt()
            say("ADOPTED")


if __name__ == "__main__":
    main()
