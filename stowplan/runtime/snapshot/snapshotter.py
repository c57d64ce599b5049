"""A training's snapshots: taken into its nodes' memory while it goes on, and found again after a restart.

    with stowplan.Snapshotter(model=model, optimizer=optimizer, run="llama-7", interval=10) as snapshots:
        restored = snapshots.restore()
        for step in range(restored.step if restored else 0, num_steps):
            ...
            snapshots.save(step + 1)

Note: what all ranks agree on. Before each one all say how their last one stands. While any is on its way, all skip,
unless a rank has lost it, so that it cannot arrive. Where a group gave one up that others have, those discard it: the
one before, which all have, stays until the next is GLOBAL on all. A snapshot that some rank could not restore never
takes the place of one that all can. What fails on one rank ends the call on all.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stowplan.core.errors import (
    InvalidArgument,
    RankFailed,
    SnapshotProcessUnavailable,
    SnapshotRefused,
    UnrecoverableSnapshot,
)
from stowplan.runtime.snapshot.authentication import JobToken
from stowplan.runtime.snapshot.client import SnapshotClient, Writing
from stowplan.runtime.snapshot.codes import Name, code_for
from stowplan.runtime.snapshot.connection import start_or_connect
from stowplan.runtime.snapshot.contents import Piece
from stowplan.runtime.snapshot.disk import newest_complete
from stowplan.runtime.snapshot.disk_restore import restore_from_disk
from stowplan.runtime.snapshot.disk_tier import DiskStatus, DiskTier
from stowplan.runtime.snapshot.fail_points import arm, fail_at
from stowplan.runtime.snapshot.former import gathered, newest_first, taken_over
from stowplan.runtime.snapshot.interval import Timetable
from stowplan.runtime.snapshot.layouts import Found, RankLayout, memory_on, processes_on
from stowplan.runtime.snapshot.limits import SnapshotLimits
from stowplan.runtime.snapshot.members import Member, Members
from stowplan.runtime.snapshot.messages import RankStatus, Status
from stowplan.runtime.snapshot.pinning import page_locked
from stowplan.runtime.snapshot.place import Agreement, node_name, run_name
from stowplan.runtime.snapshot.process import IDLE_SECONDS, LOOPBACK
from stowplan.runtime.snapshot.reservation import with_reserve
from stowplan.runtime.snapshot.restore import Restored, reshard, restore
from stowplan.runtime.snapshot.schema import Schema
from stowplan.runtime.snapshot.sizes import described, expected_bytes
from stowplan.runtime.snapshot.slots import State
from stowplan.runtime.snapshot.state import Flat, TrainingState, flatten

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
    """``memory`` is this node's memory process's word; None where it cannot be reached. ``disk``: None without one.

    ``interval``: steps from one snapshot to the next, as it is now; None: no more are taken, as nothing fails.
    """

    num_saved: int
    num_skipped: int
    interval: int | None
    last: Saved | None
    memory: Status | None
    disk: DiskStatus | None


@dataclass(frozen=True, slots=True)
class _Standing:
    """How this rank's snapshots stand, for all ranks."""

    needed_bytes: int
    pending: bool = False
    newest: int = 0
    complete: int = 0  # the newest that is GLOBAL
    trouble: str = ""  # with the memory process
    reachable: bool = True
    writing_step: int | None = None  # to disk
    failed_step: int | None = None  # to be written to disk
    read: int = 0  # number of the snapshot that is being read for the disk
    read_late: bool = False
    blocking_seconds: float | None = None
    total_seconds: float | None = None
    step_seconds: float | None = None


class Snapshotter:
    """Snapshots of one rank's training, with all other ranks; each makes one after torch.distributed is set up.

    Args:
        model, optimizer, scheduler, scaler, data, extras: as of ``TrainingState``.
        run: names the job: the same in all restarts, another for each job. Default: STOWPLAN_RUN, torchrun's id.
        interval: ``save`` takes every so manyeth step only. Default: each that it is called with.
        mtbf_seconds: mean time between failures of the whole job; instead of an interval, which is then chosen by
            Young's rule from what snapshots cost and how long steps take, and never shorter than a snapshot takes.
        code, m: the erasure code over nodes ("mirror", "raim5", "rs") and how many nodes may be lost. Default: by m, 1.
        node: this node's name. Default: STOWPLAN_NODE, the host's name. Ranks of one name share a memory process.
        listen: this host's address for other nodes. Default: 127.0.0.1 where all are one host, else by the host's name.
        limits: of the network and the time that the exchange between nodes may take.
        directory: copies on disk, too, on a file system that all nodes share.
        disk_interval: steps from one copy to the next.
        disk_patience_seconds: for how long a copy may keep its snapshot in memory; it is given up then.
        idle_seconds: how long memory outlives the last process that is connected to it.

    Several nodes need a job token (STOWPLAN_JOB_TOKEN_FILE). Raises InvalidArgument, SnapshotRefused,
    SnapshotProcessUnavailable; RankFailed where that was on other ranks, here and in all methods.
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
        mtbf_seconds: float | None = None,
        code: Name | None = None,
        m: int = 1,
        node: str | None = None,
        listen: str | None = None,
        limits: SnapshotLimits | None = None,
        directory: str | Path | None = None,
        disk_interval: int | None = None,
        disk_patience_seconds: float = 600.0,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        if disk_interval is not None and (type(disk_interval) is not int or disk_interval < 1):
            raise InvalidArgument(f"disk_interval={disk_interval!r}: give a whole number of steps, 1 or more.")
        self._timetable = Timetable(interval, mtbf_seconds)
        self._parts = {
            "model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "data": data,
            "extras": extras or {},
        }  # fmt: skip
        self._disk_interval, self._disk_patience_seconds = disk_interval or 1, disk_patience_seconds
        self._limits = limits or SnapshotLimits()
        self._agreement = Agreement()
        self.place = place = self._agreement.place(node_name(node))
        code_of_job = code_for(place.num_nodes, m, code) if place.num_nodes > 1 else None
        self._layout = RankLayout.of(place.num_nodes, place.local_size, code_of_job)
        self._idle_seconds = idle_seconds
        self._listen = listen or (LOOPBACK if place.one_host else socket.gethostbyname(socket.gethostname()))
        self.run = ""
        self.generation = max(self._agreement.together("starting memory processes", lambda: self._started(run))) + 1
        own = Member(place.node_index, place.local_rank)
        process = self._layout.process(place.node)
        clients: dict[Member, SnapshotClient] = {}

        def connect() -> None:
            clients[own] = self._connected(process, place.local_rank, place.local_size)

        self._agreement.together("connecting to memory processes", connect)  # all are of the new generation then
        self._client = clients[own]
        self._members = Members(self._agreement, clients, code_of_job, self._limits)
        self._former: Members | None = None  # of another layout, until there is a snapshot of this one
        self._capacity_bytes = 0
        self._unlock: Callable[[], object] = lambda: None
        self._directory = Path(directory) if directory else None
        self._disk: DiskTier | None = None
        self._on_disk = 0  # number of the snapshot that was last offered to the disk
        if self._directory:
            self._disk = DiskTier(self._directory, world_size=place.world_size, attempt=self.generation)
        self._num_saved = self._num_skipped = 0
        self._last: Saved | None = None

    # ---- taking one ----
    def save(self, step: int) -> Saved:
        """Take a snapshot, if the interval says so and the one before is complete; all ranks call it after each step.

        The copy is over when it returns; checksums, coding and the disk go on beside training.

        Raises InvalidArgument: something that a snapshot cannot hold; SnapshotMemoryUnavailable, where it has grown.
        """
        self._timetable.pause(step)
        try:
            if not self._timetable.due(step):
                return Saved(step, skipped="not due")
            return self._saved(step)
        finally:
            self._timetable.resume(step)

    def _saved(self, step: int) -> Saved:
        begin = time.perf_counter()
        made: list[tuple[Flat, str, Schema]] = []

        def prepare() -> _Standing:
            flat = flatten(TrainingState(**self._parts, step=step))
            text, schema, needed_bytes = described(flat)
            made.append((flat, text, schema))
            return self._standing(needed_bytes)

        words = self._agreement.together(f"the snapshot of step {step}", prepare)
        try:
            reason = self._taken(step, words, *made[0])
        except (SnapshotProcessUnavailable, RankFailed) as error:
            failures = error.failures.values() if isinstance(error, RankFailed) else [error]
            if not all(isinstance(each, SnapshotProcessUnavailable) for each in failures):
                raise
            reason = f"a memory process was lost meanwhile: {error}"
        num_bytes = 0 if reason else words[self.place.rank].needed_bytes
        saved = Saved(step, time.perf_counter() - begin, num_bytes, reason)
        self._num_saved += not reason
        self._num_skipped += bool(reason)
        self._last = saved
        return saved

    def _taken(self, step: int, words: list[_Standing], flat: Flat, text: str, schema: Schema) -> str:
        """Take it, if it can be; why it was not."""
        complete = min(word.complete for word in words)
        if self._former is not None and complete:
            self._end_former()
        reason, kept = self._late(words, complete)
        if reason:
            return reason
        self._timetable.plan(step, *(_most(words, f"{kind}_seconds") for kind in ("blocking", "total", "step")))
        if any(word.newest > complete for word in words):
            self._agreement.together("discarding a snapshot", lambda: self._client.roll_back(complete))
        needed_bytes = max(word.needed_bytes for word in words)
        if needed_bytes > self._capacity_bytes:
            self._reserve(needed_bytes)
            kept = 0
        sequence = max(word.newest for word in words) + 1
        writing = self._client.begin(sequence, step, schema, kept=kept)
        if not isinstance(writing, Writing):
            raise SnapshotRefused("order", f"snapshot {sequence} cannot begin, though all were complete: {writing}.")
        fail_at("copy.begin")
        flat.copy_into(writing.payload)
        fail_at("copy.end")
        self._client.commit(sequence)
        fail_at("commit.end")
        if self._disk and step % self._disk_interval == 0:
            if any(word.writing_step is not None for word in words):
                self._disk.skip()
                for failed in (word.failed_step for word in words):
                    self._disk.give_up(-1 if failed is None else failed)  # that part of it will not come
            else:
                self._on_disk = sequence
                self._disk.offer([Piece(text, writing.payload)])
        return ""

    def _standing(self, needed_bytes: int) -> _Standing:
        trouble = ""
        try:
            own = self._own()
        except SnapshotProcessUnavailable as lost:
            try:
                self._client.adopt()
                own = self._own()
                trouble = "a memory process was lost, and its memory is being checked"
            except SnapshotProcessUnavailable as error:
                trouble = f"no memory process on node {self.place.node}: {lost} {error}"
                return _Standing(needed_bytes, trouble=trouble, reachable=False)
        slots = own.slots if own else ()
        reading = self._disk.reading_seconds if self._disk else None
        return _Standing(
            needed_bytes=needed_bytes,
            pending=any(State.FREE < slot.state < State.GLOBAL for slot in slots),
            newest=max((slot.sequence for slot in slots), default=0),
            complete=max((slot.sequence for slot in slots if slot.state is State.GLOBAL), default=0),
            trouble=trouble,
            writing_step=self._disk.status.writing if self._disk else None,
            failed_step=self._disk.status.failed_step if self._disk else None,
            read=self._on_disk if reading is not None else 0,
            read_late=reading is not None and reading > self._disk_patience_seconds,
            blocking_seconds=own.blocking_seconds if own else None,
            total_seconds=own.total_seconds if own else None,
            step_seconds=self._timetable.step_seconds,
        )

    def _late(self, words: list[_Standing], complete: int) -> tuple[str, int]:
        """Why no snapshot can be taken now; else the number of one to be kept. The same on all ranks."""
        if troubles := [word.trouble for word in words if word.trouble]:
            if self._capacity_bytes and all(word.reachable for word in words):
                self._members.meet()
            return troubles[0], 0
        lost = len({word.newest for word in words}) > 1  # by some rank, so it is discarded, not waited for
        if any(word.pending for word in words) and not lost:
            return "the snapshot before is not complete on all nodes", 0
        kept = max(word.read for word in words)
        if any(word.read_late for word in words) and self._disk:
            self._disk.overtake()
            kept = 0
        if kept > complete:
            return "the copy on disk is being written", 0
        return "", kept

    # ---- restoring ----
    def restore(self) -> Restored | None:
        """Put the newest snapshot that all ranks can have into the training; None where there is none, nor a copy.

        From memory, from other nodes' memory by the code, or else from disk. All ranks call it before the first step.
        Memory for snapshots is reserved now.

        Raises UnrecoverableSnapshot: too much is lost, and there is no copy on disk; SnapshotMismatch, InvalidSnapshot:
        it is not of this training; SnapshotMemoryUnavailable.
        """
        found = self._agreement.together("looking for snapshots", self._found)
        copy = self._agreement.gather(newest_complete(self._directory) if self._directory else None)[0]
        restored, lost = None, None
        for layout in newest_first([each for own in found for each in own]):
            try:
                restored = self._restored(layout, found, str(copy or ""))
                break
            except UnrecoverableSnapshot as error:
                lost = lost or error
        into = TrainingState(**self._parts)
        if restored is None and copy is not None:
            restored = self._agreed("restoring from disk", lambda: restore_from_disk(copy, into))
            self._agreement.together("discarding snapshots", lambda: self._client.roll_back(0))
        if restored is None and lost is not None:
            raise lost
        self._reserve_before_training()
        return restored

    def _restored(self, layout: RankLayout, found: list[list[Found]], newest_on_disk: str) -> Restored:
        capacity = max(each.data_bytes for own in found for each in own if each.layout == layout)
        into = TrainingState(**self._parts)
        if layout == self._layout:
            self._reserve_exactly(capacity)
            (piece,) = self._members.read(self._members.recovered(newest_on_disk))
            fail_at("restore.begin")
            restored = self._agreed("restoring", lambda: restore(piece.schema, piece.buffer, into))
            fail_at("restore.end")
            return restored
        place, clients = self.place, dict[Member, SnapshotClient]()
        self._agreement.together(
            "taking over a former layout's memory",
            lambda: clients.update(taken_over(layout, found, place.rank, place.node, self._connected)),
        )
        self._former = Members(self._agreement, clients, layout.code, self._limits)
        self._former.reserve(capacity)
        pieces = gathered(self._agreement, self._former.read(self._former.recovered(newest_on_disk)))
        return self._agreed("restoring", lambda: reshard(pieces, into))

    def _agreed(self, doing: str, work: Callable[[], Restored]) -> Restored:
        made: list[Restored] = []
        self._agreement.together(doing, lambda: made.append(work()))
        return made[0]

    # ---- looking after them ----
    def status(self) -> SnapshotterStatus:
        """How snapshots stand on this node."""
        try:
            memory = self._client.status()
        except SnapshotProcessUnavailable:
            memory = None
        disk = self._disk.status if self._disk else None
        interval = self._timetable.interval
        return SnapshotterStatus(self._num_saved, self._num_skipped, interval, self._last, memory, disk)

    def wait(self, timeout_seconds: float = 120.0) -> bool:
        """Wait until the last snapshot of this rank is GLOBAL; whether it is. False, too, without a memory process."""
        try:
            own = self._own()
            newest = max((slot.sequence for slot in own.slots), default=0) if own else 0
            return bool(newest) and self._client.wait(newest, State.GLOBAL, timeout_seconds) is State.GLOBAL
        except SnapshotProcessUnavailable:
            return False

    def end(self) -> None:
        """The job is over: copies on disk are written to their end, then the memory of all nodes is given up.

        All ranks call it. Without it the memory processes end when nobody was connected for ``idle_seconds``.
        """
        if self._disk:
            self._disk.wait()
        self._agreement.gather(None)  # all have what they wanted
        if self.place.local_rank == 0:
            for _, status in processes_on(self.run, self.place.node):
                with contextlib.suppress(SnapshotProcessUnavailable):
                    self._connected(status.node, 0, status.num_ranks).end()
        self.close()

    def close(self) -> None:
        """Let go of the memory, which stays with its process, and end what is written to disk."""
        if self._disk:
            self._disk.close()
        self._unlock()
        self._unlock = lambda: None
        if self._former:
            self._former.close()
        self._members.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- memory ----
    def _started(self, run: str | None) -> int:
        """The newest generation that a memory process of this node has heard of; what is older is refused soon."""
        self.run = run_name(run)
        arm(self.place.node, self.place.rank)
        if self._layout.code:
            JobToken.from_environment()  # before training, not when coding begins
        place = self.place
        connection = start_or_connect(
            self.run, self._layout.process(place.node), None, place.local_size, idle_seconds=self._idle_seconds,
            listen=self._listen,
        )  # fmt: skip
        connection.close()
        return max(status.generation for _, status in processes_on(self.run, place.node))

    def _connected(self, process: str, local_rank: int, local_size: int) -> SnapshotClient:
        return SnapshotClient(
            self.run, local_rank, node=process, num_ranks=local_size, generation=self.generation,
            idle_seconds=self._idle_seconds, listen=self._listen,
        )  # fmt: skip

    def _found(self) -> list[Found]:
        """One rank of each node looks."""
        return memory_on(self.run, self.place.node) if self.place.local_rank == 0 else []

    def _own(self) -> RankStatus | None:
        ranks = self._client.status().ranks
        return next((rank for rank in ranks if rank.rank == self.place.local_rank), None)

    def _reserve_before_training(self) -> None:
        """So that too little memory is told of now, and the first snapshot does not wait for it."""
        needed = self._agreement.together("preparing snapshots", lambda: expected_bytes(TrainingState(**self._parts)))
        if max(needed) > self._capacity_bytes:
            self._reserve(max(needed))

    def _reserve(self, needed_bytes: int) -> None:
        """Memory of another size, for which what is there is given up; also what a job of long ago has left."""
        self._agreement.together("discarding snapshots", lambda: self._client.roll_back(0))
        self._reserve_exactly(with_reserve(needed_bytes))

    def _reserve_exactly(self, data_bytes: int) -> None:
        self._unlock()
        self._members.reserve(data_bytes)
        self._capacity_bytes = data_bytes
        self._unlock = page_locked(self._client.memory)

    def _end_former(self) -> None:
        """All ranks have a snapshot of this layout."""
        if self._former is not None:
            self._former.close()
            self._former = None
        if self.place.local_rank == 0:
            for layout, status in processes_on(self.run, self.place.node):
                if layout != self._layout:
                    with contextlib.suppress(SnapshotProcessUnavailable):
                        self._connected(status.node, 0, layout.local_size).end()


def _most(words: list[_Standing], name: str) -> float | None:
    return max((seconds for word in words if (seconds := getattr(word, name)) is not None), default=None)
