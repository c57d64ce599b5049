"""A trainer's side: its memory, snapshots written into it and read back; and an agent's, which holds memory for others.

    client = SnapshotClient(run, rank, num_ranks=8, generation=restarts)
    client.reserve(data_bytes)
    writing = client.begin(sequence, step, schema)
    if isinstance(writing, Writing):
        ...  # copy tensors into writing.payload, at the offsets of the schema
        client.commit(sequence)  # returns at once; checksums are computed in the memory process

When the memory process is gone, calls raise SnapshotProcessUnavailable and training can go on: the memory is still
mapped here, and ``adopt`` gives it to a new process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stowplan.core.errors import InvalidArgument, SnapshotProcessUnavailable, SnapshotRefused, UnrecoverableSnapshot
from stowplan.runtime.snapshot.codes.kernels import as_bytes
from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
from stowplan.runtime.snapshot.memory import messages
from stowplan.runtime.snapshot.memory.connection import Connection, start_or_connect
from stowplan.runtime.snapshot.memory.layout import Coding, Geometry, payload_offset
from stowplan.runtime.snapshot.memory.messages import Attached, Begun, Done, Skipped, SlotStatus, Status
from stowplan.runtime.snapshot.memory.protocol import IDLE_SECONDS, LOOPBACK, close_all
from stowplan.runtime.snapshot.memory.region import Region
from stowplan.runtime.snapshot.memory.schema import Schema, schema_from_bytes, schema_to_bytes
from stowplan.runtime.snapshot.memory.slots import State

__all__ = ["Held", "SnapshotClient", "Writing", "give_back", "hold"]

_LOOK_SECONDS = 600.0  # at all bytes of a rank


@dataclass(frozen=True, slots=True)
class Writing:
    """A slot to be filled: ``payload`` is its memory, ``Schema.payload_bytes`` long."""

    sequence: int
    slot: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Held:
    """A descriptor of a rank's memory, which lives on while it is open, whoever else ends."""

    attached: Attached
    descriptor: int

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)


class SnapshotClient:
    """For one local rank of one run on one node. ``generation`` is how often the job was restarted.

    Connects to the node's memory process; the first of ``num_ranks`` ranks starts it. Not for several threads at once,
    ``wait`` and ``status`` excepted. Raises SnapshotProcessUnavailable and SnapshotRefused, as all its methods do.
    """

    def __init__(
        self,
        run: str,
        rank: int,
        *,
        node: str = "local",
        num_ranks: int = 1,
        generation: int = 0,
        directory: Path | None = None,
        idle_seconds: float = IDLE_SECONDS,
        listen: str = LOOPBACK,
    ) -> None:
        self.run, self.rank, self.node, self.generation = run, rank, node, generation
        self._num_ranks, self._directory, self._idle_seconds = num_ranks, directory, idle_seconds
        self._listen = listen
        self._region: Region | None = None
        self._attached: Attached | None = None
        self._connection = self._connect()

    # ---- memory ----
    def reserve(self, data_bytes: int, parity_bytes: int = 0, coding: Coding | None = None) -> None:
        """Memory for two snapshots of up to ``data_bytes`` (schema and payload) and their parity; populated and mapped.

        Where there is memory of these sizes already, as after a restart, this is it, with the snapshots in it. Raises
        SnapshotMemoryUnavailable, which names the size, before any is taken.
        """
        request = messages.Reserve(self.rank, data_bytes, parity_bytes, coding or Coding())
        known = self._attached and (self._attached.data_bytes, self._attached.parity_bytes, self._attached.coding)
        if known != (data_bytes, parity_bytes, request.coding):
            self._let_go()  # of smaller memory before there is more
        self._connection.ask(request, Attached, timeout_seconds=None)
        self._attach()

    @property
    def memory(self) -> memoryview:
        """All of this rank's memory, as it is mapped here. Raises SnapshotRefused ("order"): none is reserved."""
        return self._mapped()[1].view

    def adopt(self) -> bool:
        """Give this rank's memory to a new memory process, after the former one was lost; one is started if need be.

        Whether the memory is mapped anew, as it was given back already: what page-locked it has to do so again.
        """
        self._connection.close()
        self._connection = self._connect()
        if self._region is None:
            return False
        attached, region = self._mapped()
        request = messages.Adopt(self.rank, attached.data_bytes, attached.parity_bytes, attached.coding)
        try:
            self._connection.ask(request, Attached, [region.descriptor])
        except SnapshotRefused as refused:
            if refused.reason != "busy":
                raise
            self._attach()  # an agent, or an earlier call, has given it back already
            return True
        return False

    # ---- writing ----
    def begin(
        self, sequence: int, step: int, schema: Schema, *, shares: Sequence[int] = (), kept: int = 0
    ) -> Writing | Skipped:
        """A slot for snapshot ``sequence``, with the schema in it, or what it would have to wait for.

        ``shares``: the bytes at the payload's end that need no parity: this node's, and copies of those of the m before
        it. The snapshot whose number is ``kept``, which has to be GLOBAL, is not overwritten.

        Sequence numbers are the same on all ranks, and higher than all before. All ranks skip together: agree on it
        (``Status``) before, or ``abandon`` what others skip.
        """
        attached, region = self._mapped()
        content = schema_to_bytes(schema)
        start = payload_offset(len(content))
        data_bytes = start + schema.payload_bytes
        request = messages.Begin(self.rank, sequence, step, data_bytes, len(content), kept, tuple(shares))
        answer: object = self._connection.ask(request, (Begun, Skipped))[0]
        if isinstance(answer, Skipped):
            return answer
        assert isinstance(answer, Begun)
        geometry = Geometry(attached.data_bytes, attached.parity_bytes, attached.coding.n)
        data = geometry.data_view(region.view, answer.slot, data_bytes)
        data[:start] = content.ljust(start, b"\0")
        return Writing(sequence, answer.slot, data[start:])

    def commit(self, sequence: int) -> None:
        """All bytes are there, and stay as they are: LOCAL once the memory process has computed the checksums."""
        self._connection.ask(messages.Written(self.rank, sequence), Done)

    def write(self, sequence: int, step: int, schema: Schema, buffers: Sequence[object]) -> Writing | Skipped:
        """``begin``, a copy of each tensor's buffer in the schema's order, and ``commit``."""
        arrays = [as_bytes(buffer, f"buffers[{index}]") for index, buffer in enumerate(buffers)]
        sizes = [tensor.num_bytes for tensor in schema.tensors]
        if [len(array) for array in arrays] != sizes:
            raise InvalidArgument(
                f"buffers have {[len(array) for array in arrays]} bytes, and the schema says {sizes}."
            )
        writing = self.begin(sequence, step, schema)
        if isinstance(writing, Writing):
            payload = np.frombuffer(writing.payload, np.uint8)
            for tensor, array in zip(schema.tensors, arrays, strict=True):
                np.copyto(payload[tensor.offset : tensor.offset + tensor.num_bytes], array)
            self.commit(sequence)
        return writing

    def abandon(self, sequence: int) -> None:
        """Give up a snapshot that is not beyond LOCAL."""
        self._connection.ask(messages.Abandon(self.rank, sequence), Done)

    def wait(self, sequence: int, state: State = State.LOCAL, timeout_seconds: float = 60.0) -> State:
        """What the snapshot has come to: ``state`` or beyond, FREE if it was given up, less if the time is over.

        Other calls wait meanwhile.
        """
        request = messages.Await(self.rank, sequence, state, timeout_seconds)
        waited, _ = self._connection.ask(request, messages.Waited, timeout_seconds=timeout_seconds + 10)
        return waited.state

    # ---- reading ----
    def inspect(self) -> tuple[SlotStatus, ...]:
        """Both slots, after a look at all their bytes."""
        inspected, _ = self._connection.ask(
            messages.Inspect(self.rank), messages.Inspected, timeout_seconds=_LOOK_SECONDS
        )
        return inspected.slots

    def read(self, sequence: int) -> tuple[Schema, memoryview]:
        """A snapshot's schema and, where they are in memory, its payload's bytes; all checksums are right.

        Raises UnrecoverableSnapshot: this rank does not have it, or has it damaged.
        """
        attached, region = self._mapped()
        for index, slot in enumerate(self.inspect()):
            if slot.sequence == sequence and slot.state >= State.LOCAL:
                if slot.damaged_data:
                    lost = [f"bytes {begin} to {begin + length}" for begin, length in slot.damaged_data]
                    raise UnrecoverableSnapshot(lost, f"rank {self.rank} alone has no parity of its own bytes")
                geometry = Geometry(attached.data_bytes, attached.parity_bytes, attached.coding.n)
                data = geometry.data_view(region.view, index, slot.data_bytes).toreadonly()
                return schema_from_bytes(data[: slot.schema_bytes]), data[payload_offset(slot.schema_bytes) :]
        raise UnrecoverableSnapshot([f"snapshot {sequence}"], f"rank {self.rank} does not have it in memory")

    def status(self) -> Status:
        """Of the memory process, all ranks of the node, and what redundancy lacks."""
        return self._connection.ask(messages.GetStatus(), Status)[0]

    # ---- restarts, and the end ----
    def listen(self, limits: SnapshotLimits | None = None) -> tuple[str, int]:
        """Where this rank's exchange with its group listens: host and port. Needs memory with a code."""
        request = messages.Listen(self.rank, limits or SnapshotLimits())
        answer, _ = self._connection.ask(request, messages.Listening)
        return answer.host, answer.port

    def meet(self, addresses: Mapping[int, tuple[str, int]]) -> None:
        """Where all nodes of this rank's group listen, after each start of a memory process."""
        peers = tuple(messages.Peer(node, *address) for node, address in sorted(addresses.items()))
        self._connection.ask(messages.Meet(self.rank, peers), Done)

    def recover(self, alive: Sequence[int], newest_on_disk: str = "", attempt: int = 0) -> messages.Recovered:
        """Make the newest snapshot whole that this rank's group can; all nodes call it, with the same ``alive``.

        Raises UnrecoverableSnapshot, SnapshotRefused ("peer": a node did not answer).
        """
        request = messages.Recover(self.rank, tuple(alive), newest_on_disk, attempt)
        return self._connection.ask(request, messages.Recovered, timeout_seconds=None)[0]

    def roll_back(self, sequence: int) -> None:
        """The job restores ``sequence`` (0: nothing): what is newer on this node is given up."""
        self._connection.ask(messages.RollBack(sequence), Done)

    def raise_generation(self, generation: int) -> None:
        """For launchers: the job was restarted, so older generations are refused from now on."""
        self._connection.ask(messages.RaiseGeneration(generation), Done)
        self.generation = generation

    def end(self) -> None:
        """End the memory process; its memory is gone once all who have it mapped let go of it."""
        self._connection.ask(messages.End(), Done)
        self._connection.close()
        self.close()

    def close(self) -> None:
        """Unmap the memory and disconnect; snapshots stay in the memory process.

        While parts of a payload are still held, the memory stays mapped, and no other process may write it.
        """
        self._let_go()
        self._connection.close()

    def _let_go(self) -> None:
        if self._region is not None and self._region.close():
            with contextlib.suppress(SnapshotProcessUnavailable, SnapshotRefused):  # gone, or fenced off
                self._connection.ask(messages.Detach(self.rank), Done)
        self._region = self._attached = None

    def _connect(self) -> Connection:
        return start_or_connect(
            self.run, self.node, self.generation, self._num_ranks, directory=self._directory,
            idle_seconds=self._idle_seconds, listen=self._listen,
        )  # fmt: skip

    def _attach(self) -> None:
        attached, descriptors = self._connection.ask(messages.Attach(self.rank, write=True), Attached)
        region = _received(descriptors)
        region.populate()
        if self._region is not None:
            self._region.close()
        self._attached, self._region = attached, region

    def _mapped(self) -> tuple[Attached, Region]:
        if self._attached is None or self._region is None:
            raise SnapshotRefused("order", "this rank has no memory yet: reserve it first.")
        return self._attached, self._region


def hold(connection: Connection, rank: int) -> Held:
    """For agents: keep a rank's memory alive even if its trainer and the memory process are lost together."""
    attached, descriptors = connection.ask(messages.Attach(rank, write=False), Attached)
    close_all(descriptors[1:])
    return Held(attached, descriptors[0])


def give_back(connection: Connection, held: Held) -> None:
    """For agents: let a new memory process adopt what is held; the connection needs a generation."""
    attached = held.attached
    request = messages.Adopt(attached.rank, attached.data_bytes, attached.parity_bytes, attached.coding)
    connection.ask(request, Attached, [held.descriptor])
    connection.ask(messages.Detach(attached.rank), Done)


def _received(descriptors: list[int]) -> Region:
    close_all(descriptors[1:])
    if not descriptors:
        raise SnapshotRefused("malformed", "memory was attached, and no descriptor came with the answer.")
    return Region.received(descriptors[0])
