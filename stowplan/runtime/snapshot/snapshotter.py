"""A training's snapshots: taken into its nodes' memory while it goes on, and found again after a restart.

    with stowplan.Snapshotter(model=model, optimizer=optimizer, run="llama-7", interval=10) as snapshots:
        restored = snapshots.restore()
        for step in range(restored.step if restored else 0, num_steps):
            ...
            snapshots.save(step + 1)

Note: what all ranks agree on. Before each one all say how their last one stands. While any is on its way, all skip.
Where a group gave one up that others have, those discard it: the one before, which all have, stays until the next is
GLOBAL on all. A snapshot that some rank could not restore never takes the place of one that all can.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stowplan.core.errors import (
    InvalidArgument,
    SnapshotProcessUnavailable,
    SnapshotRefused,
    UnrecoverableSnapshot,
)
from stowplan.core.units import MIB
from stowplan.runtime.snapshot.authentication import JobToken
from stowplan.runtime.snapshot.client import SnapshotClient, Writing
from stowplan.runtime.snapshot.codes import Code, Layout, Name, code_for
from stowplan.runtime.snapshot.connection import start_or_connect
from stowplan.runtime.snapshot.contents import Piece
from stowplan.runtime.snapshot.disk import newest_complete
from stowplan.runtime.snapshot.disk_restore import restore_from_disk
from stowplan.runtime.snapshot.disk_tier import DiskStatus, DiskTier
from stowplan.runtime.snapshot.gathered import restore_shares
from stowplan.runtime.snapshot.layout import Coding, payload_offset
from stowplan.runtime.snapshot.messages import RankStatus, Status
from stowplan.runtime.snapshot.place import Agreement, node_name, run_name
from stowplan.runtime.snapshot.process import IDLE_SECONDS, LOOPBACK
from stowplan.runtime.snapshot.restore import Restored
from stowplan.runtime.snapshot.schema import Schema, Tensor, schema_to_bytes
from stowplan.runtime.snapshot.shares import agreed_portions
from stowplan.runtime.snapshot.slots import State
from stowplan.runtime.snapshot.state import TrainingState, flatten
from stowplan.runtime.snapshot.state_schema import dump_schema

__all__ = ["Saved", "Snapshotter", "SnapshotterStatus"]


@dataclass(frozen=True, slots=True)
class Saved:
    """What ``save`` did: ``seconds`` training waited for it, ``num_bytes`` of this rank; why ``skipped``, if it was."""

    step: int
    seconds: float = 0.0
    num_bytes: int = 0
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotterStatus:
    """``memory`` is this node's memory process's word; None where it cannot be reached. ``disk``: None without one."""

    num_saved: int
    num_skipped: int
    last: Saved | None
    memory: Status | None
    disk: DiskStatus | None


@dataclass(frozen=True, slots=True)
class _Standing:
    needed_bytes: int
    pending: bool
    newest: int
    complete: int  # the newest that is GLOBAL
    rejoined: bool
    disk_step: int | None


class Snapshotter:
    """Snapshots of one rank's training, with all other ranks; each makes one after torch.distributed is set up.

    Args:
        model, optimizer, scheduler, scaler, data, extras: as of ``TrainingState``.
        run: names the job: the same in all restarts, another for each job. Default: STOWPLAN_RUN, torchrun's id.
        interval: ``save`` takes every so manyeth step only. Default: each that it is called with.
        code, m: the erasure code over nodes ("mirror", "raim5", "rs") and how many nodes may be lost. Default: by m, 1.
        node: this node's name. Default: STOWPLAN_NODE, the host's name. Ranks of one name share a memory process.
        listen: this host's address for other nodes. Default: 127.0.0.1 where all are one host, else by the host's name.
        directory: copies on disk, too, on a file system that all nodes share.
        disk_interval: steps from one copy to the next.
        idle_seconds: how long memory outlives the last process that is connected to it.

    Several nodes need a job token (STOWPLAN_JOB_TOKEN_FILE). Raises InvalidArgument, SnapshotRefused,
    SnapshotProcessUnavailable.
    """

    def __init__(
        self,
        *,
        model: Any,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        data: Any = None,
        extras: Mapping[str, Any] | None = None,
        run: str | None = None,
        interval: int | None = None,
        code: Name | None = None,
        m: int = 1,
        node: str | None = None,
        listen: str | None = None,
        directory: str | Path | None = None,
        disk_interval: int | None = None,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        for name, steps in (("interval", interval), ("disk_interval", disk_interval)):
            if steps is not None and (type(steps) is not int or steps < 1):
                raise InvalidArgument(f"{name}={steps!r}: give a whole number of steps, 1 or more.")
        self._parts = {
            "model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "data": data,
            "extras": extras or {},
        }  # fmt: skip
        self._interval, self._disk_interval = interval, disk_interval or 1
        self._agreement = Agreement()
        self.place = place = self._agreement.place(node_name(node))
        self._code: Code | None = code_for(place.num_nodes, m, code) if place.num_nodes > 1 else None
        if self._code:
            JobToken.from_environment()  # before training, not when coding begins
        address = listen or (LOOPBACK if place.one_host else socket.gethostbyname(socket.gethostname()))
        run = run_name(run)
        self.generation = self._next_generation(run, idle_seconds, address)
        self._client = SnapshotClient(
            run, place.local_rank, node=place.node, num_ranks=place.local_size, generation=self.generation,
            idle_seconds=idle_seconds, listen=address,
        )  # fmt: skip
        self._agreement.gather(None)  # all are of the new generation
        self._directory = Path(directory) if directory else None
        self._disk: DiskTier | None = None
        if self._directory:
            self._disk = DiskTier(self._directory, world_size=place.world_size, attempt=self.generation)
        self._capacity_bytes = 0
        self._num_saved = self._num_skipped = 0
        self._last: Saved | None = None

    def save(self, step: int) -> Saved:
        """Take a snapshot, if the interval says so and the one before is complete; all ranks call it after each step.

        The copy is over when it returns; checksums, coding and the disk go on beside training.

        Raises InvalidArgument: something that a snapshot cannot hold; SnapshotMemoryUnavailable, the first time.
        """
        if self._interval and step % self._interval:
            return Saved(step, skipped="not due")
        begin = time.perf_counter()
        state = TrainingState(**self._parts, step=step)
        flat = flatten(state, agreed_portions(self._agreement, state))
        text = dump_schema(flat.schema).decode()
        schema = Schema((Tensor("state", "uint8", (flat.num_bytes,), 0, flat.num_bytes),), values=text)
        needed = payload_offset(len(schema_to_bytes(schema))) + flat.num_bytes
        words = self._agreement.gather(self._standing(needed))
        if reason := self._late(words):
            return self._noted(Saved(step, time.perf_counter() - begin, skipped=reason))
        complete = min(word.complete for word in words)
        if any(word.newest > complete for word in words):
            self._client.roll_back(complete)
            self._agreement.gather(None)  # before anybody begins
        if max(word.needed_bytes for word in words) > self._capacity_bytes:
            self._reserve(_with_reserve(max(word.needed_bytes for word in words)))
        sequence = max(word.newest for word in words) + 1
        writing = self._client.begin(sequence, step, schema)
        if not isinstance(writing, Writing):
            raise SnapshotRefused("order", f"snapshot {sequence} cannot begin although all were complete: {writing}.")
        flat.copy_into(writing.payload)
        self._client.commit(sequence)
        if self._disk and step % self._disk_interval == 0:
            self._disk.offer([Piece(text, writing.payload)])
        return self._noted(Saved(step, time.perf_counter() - begin, needed))

    def restore(self) -> Restored | None:
        """Put the newest snapshot that all ranks can have into the training; None where there is none, nor a copy.

        From memory, from other nodes' memory by the code, or else from disk. All ranks call it before the first step.

        Raises UnrecoverableSnapshot: too much is lost, and there is no copy on disk; SnapshotMismatch, InvalidSnapshot:
        it is not of this training.
        """
        ranks = self._agreement.gather(self._own())
        capacity = max((rank.data_bytes for rank in ranks if rank), default=0)
        copy = self._agreement.gather(newest_complete(self._directory) if self._directory else None)[0]
        into = TrainingState(**self._parts)
        lost: UnrecoverableSnapshot | None = None
        if capacity:
            self._reserve(capacity)
            try:
                sequence = self._recovered(str(copy or ""))
                schema, payload = self._read(sequence)
                return restore_shares(self._agreement, Piece(schema.values, payload), into)
            except UnrecoverableSnapshot as error:
                lost = error
        if copy is not None:
            if capacity:
                self._client.roll_back(0)
            return restore_from_disk(copy, into)
        written = any(slot.state for rank in ranks if rank for slot in rank.slots)
        if lost is not None and written:
            raise lost
        return None

    def status(self) -> SnapshotterStatus:
        """How snapshots stand on this node."""
        try:
            memory = self._client.status()
        except SnapshotProcessUnavailable:
            memory = None
        disk = self._disk.status if self._disk else None
        return SnapshotterStatus(self._num_saved, self._num_skipped, self._last, memory, disk)

    def wait(self, timeout_seconds: float = 120.0) -> bool:
        """Wait until the last snapshot of this rank is GLOBAL; whether it is."""
        own = self._own()
        newest = max((slot.sequence for slot in own.slots), default=0) if own else 0
        return bool(newest) and self._client.wait(newest, State.GLOBAL, timeout_seconds) is State.GLOBAL

    def close(self) -> None:
        """Let go of the memory, which stays with its process, and end what is written to disk."""
        if self._disk:
            self._disk.close()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- agreement ----
    def _next_generation(self, run: str, idle_seconds: float, listen: str) -> int:
        """One more than any memory process has heard of; what is left of former starts is refused from then on."""
        place = self.place
        connection = start_or_connect(
            run, place.node, None, place.local_size, idle_seconds=idle_seconds, listen=listen
        )  # fmt: skip
        known = connection.welcome.generation
        connection.close()
        return max(self._agreement.gather(known)) + 1

    def _standing(self, needed_bytes: int) -> _Standing:
        rejoined = False
        try:
            own = self._own()
        except SnapshotProcessUnavailable:
            rejoined = True
            if self._capacity_bytes:
                self._client.adopt()
            own = self._own()
        slots = own.slots if own else ()
        return _Standing(
            needed_bytes=needed_bytes,
            pending=any(State.FREE < slot.state < State.GLOBAL for slot in slots),
            newest=max((slot.sequence for slot in slots), default=0),
            complete=max((slot.sequence for slot in slots if slot.state is State.GLOBAL), default=0),
            rejoined=rejoined,
            disk_step=self._disk.status.writing if self._disk else None,
        )

    def _late(self, words: list[_Standing]) -> str:
        """Why no snapshot can be taken now; the same on all ranks."""
        if any(word.rejoined for word in words):
            self._meet()
            return "a memory process was lost and its memory is being checked"
        if any(word.pending for word in words):
            return "the snapshot before is not complete on all nodes"
        if any(word.disk_step is not None for word in words):
            return "the copy on disk is being written"
        return ""

    def _read(self, sequence: int) -> tuple[Schema, memoryview]:
        """Schema and bytes of this rank. Raises UnrecoverableSnapshot, on all ranks, where any has damaged ones."""
        problem: UnrecoverableSnapshot | None = None
        try:
            found = self._client.read(sequence)
        except UnrecoverableSnapshot as error:
            problem = error
        bad = [rank for rank, fine in enumerate(self._agreement.gather(problem is None)) if not fine]
        if bad:
            names = [f"rank {rank}'s bytes of snapshot {sequence}" for rank in bad]
            raise problem or UnrecoverableSnapshot(names, "they were damaged since they were recovered")
        return found

    def _recovered(self, newest_on_disk: str) -> int:
        """The snapshot that all ranks have now. Raises UnrecoverableSnapshot, on all."""
        if self._code is None:
            have = {
                slot.sequence for slot in self._client.inspect() if slot.state >= State.LOCAL and not slot.damaged_data
            }
            common = set.intersection(*self._agreement.gather(have))
            if not common:
                raise UnrecoverableSnapshot(["some rank's bytes of each snapshot"], "one node alone has no parity")
            self._client.roll_back(max(common))
            return max(common)
        attempt = 0
        while True:
            problem: UnrecoverableSnapshot | None = None
            found = 0
            try:
                found = self._client.recover(range(self.place.num_nodes), newest_on_disk, attempt).sequence
            except UnrecoverableSnapshot as error:
                problem = error
            words = self._agreement.gather((found, str(problem or "")))
            if problem or not all(sequence for sequence, _ in words):
                names = sorted({text for sequence, text in words if not sequence})
                raise problem or UnrecoverableSnapshot(names, "other ranks' groups")
            if len({sequence for sequence, _ in words}) == 1:
                return found
            self._client.roll_back(min(sequence for sequence, _ in words))
            self._agreement.gather(None)
            attempt += 1

    # ---- memory ----
    def _own(self) -> RankStatus | None:
        ranks = self._client.status().ranks
        return next((rank for rank in ranks if rank.rank == self.place.local_rank), None)

    def _reserve(self, data_bytes: int) -> None:
        """Memory for two snapshots and parity, the same on all ranks; smaller memory is given up first."""
        if self._capacity_bytes:
            self._client.roll_back(0)
            self._agreement.gather(None)
        coding, parity_bytes = Coding(), 0
        if self._code:
            coding = Coding(self._code.name, self._code.n, self._code.m, self.place.node_index)
            parity_bytes = Layout(self._code, data_bytes).parity_bytes
        self._client.reserve(data_bytes, parity_bytes, coding)
        self._capacity_bytes = data_bytes
        self._meet()

    def _meet(self) -> None:
        """Tell all nodes of this rank's group where the others are."""
        if self._code is None:
            return
        place = self.place
        words = self._agreement.gather((place.local_rank, place.node_index, self._client.listen()))
        self._client.meet({node: address for rank, node, address in words if rank == place.local_rank})
        self._agreement.gather(None)

    def _noted(self, saved: Saved) -> Saved:
        self._num_saved += not saved.skipped
        self._num_skipped += bool(saved.skipped)
        self._last = saved
        return saved


def _with_reserve(num_bytes: int) -> int:
    """Schemas and extras grow a little."""
    return num_bytes + num_bytes // 16 + MIB
